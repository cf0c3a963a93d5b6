"""Leases: who may use which values, and whether they were given away.

[Note: lease] A `Lease` stands for one set of values. Records that hold the very same tensors share it
(`dataclasses.replace`, `eval_mode`); a record built otherwise (`tree_map`, `load`) has its own. Giving values away with
`donate=True` spends the lease, and updating tensors in place bumps their versions, so that every other record over the
same memory is found out when it is bound.

[Note: versions] A DTensor has two counters: its own, which operations on it bump, and that of this rank's part, which
operations on the part bump. Neither bumps the other; `detach()` shares the first one and `.data` the second (measured,
torch 2.13). So a lease watches both, and who updates in place bumps both.
"""

import operator
import sys
from collections.abc import Collection, Mapping, Sequence
from types import FrameType
from typing import Any

import torch

from fabricfn.engine import Frame
from fabricfn.errors import DonatedError
from fabricfn.sharding import any_sharded, is_sharded, local_of

_version = operator.attrgetter("_version")
increment_version = torch._C._increment_version
"""What `torch.autograd.graph.increment_version` calls."""


class Lease:
    """The right to one set of values: whether they were given away, and the tensors' versions when it was made."""

    values: Mapping[str, Any] | None = None
    """The mapping whose tensors this lease is for."""
    versions: tuple[int, ...] | None = None
    """Their version counters when the lease was made."""
    spent: "Place | None" = None
    """Where the values were given away; None while they are alive."""
    frames: Sequence[Frame] = ()
    """The frames whose slots point to these values now."""
    known: Any = None
    """What a compiled step found out about the values, to be spared the next time: see `compiling.arguments`."""
    apart: bool = False
    """A donated step made the values, in place: no two that it changes share memory, and their shapes fit."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        if values is not None:  # the defaults are the class's: most leases are made in the hot loop and never looked at
            self.values = values
            self.versions = versions_of(values.values())

    def check(self, what: str) -> None:
        """Raise `DonatedError` when the values were given away, or changed by a record that shares them."""
        if self.spent is not None:
            raise DonatedError(
                f"this {what} was given away with donate=True at {shown(self.spent)}; its memory now belongs to the"
                " result of that call. Use that result, or call without donate=True."
            )
        if self.values is not None and self.versions != versions_of(self.values.values()):
            raise DonatedError(
                f"this {what} shares tensors with a record that was given away with donate=True, or they were changed"
                " in place. Copy before you give away: ff.tree_map(torch.clone, ...)."
            )

    def spend(self, where: "Place") -> None:
        """Mark the values as given away at `where`."""
        self.spent = where


NO_LEASE = Lease()
"""The default of a record that is built from scratch: it gets a lease of its own."""


def versions_of(values: Collection[Any]) -> tuple[int, ...] | None:
    """The version counters of every tensor; None when some leaf is no tensor (shapes, specs)."""
    try:
        versions = tuple(map(_version, values))
        if any_sharded(values):
            versions += tuple(local_of(value)._version for value in values if is_sharded(value))
        return versions
    except (AttributeError, RuntimeError):  # not a tensor; an inference tensor tracks no version
        return None


def bump(tensors: Sequence[torch.Tensor]) -> None:
    """Bump the versions of tensors that were updated in place: see [Note: versions]."""
    increment_version(tensors)
    if any_sharded(tensors):
        increment_version([local_of(tensor) for tensor in tensors if is_sharded(tensor)])


Place = tuple[str, int]
"""A file and a line; put into words only when somebody asks."""
NOWHERE: Place = ("", 0)


def shown(place: Place) -> str:
    """As messages show it: "train.py:12"."""
    return f"{place[0].rpartition('/')[2]}:{place[1]}"


COUNTING = "fabricfn.watching.calling"
"""What stands between a public function and its caller."""


def caller() -> Place:
    """Where the function that calls this was called."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == COUNTING:
        frame = frame.f_back
    assert frame is not None
    return frame.f_code.co_filename, frame.f_lineno


def unbind(lease: Lease) -> None:
    """Let no frame look at these values any longer; older open graphs over its slots then fail in backward."""
    for frame in lease.frames:
        increment_version(frame.slots)
        frame.owner = None
    lease.frames = ()
