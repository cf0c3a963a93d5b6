"""`diff_checkpoints`: which entries of two checkpoints differ, and by how much. A block at a time."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from fabricfn.checkpoint.exportable import exportable, stored
from fabricfn.checkpoint.exporting import block_of, blocks
from fabricfn.checkpoint.foreign.dcp import whole_tree
from fabricfn.checkpoint.foreign.kinds import is_foreign
from fabricfn.checkpoint.foreign.places import opened_raw
from fabricfn.checkpoint.foreign.values import Refused, Stored, leaves, settled, tensor_text
from fabricfn.checkpoint.format.manifest import path_text, paths_of, plain_leaf, plain_value
from fabricfn.checkpoint.listing import plain_text
from fabricfn.checkpoint.storage.objects import Options, unresolved
from fabricfn.checkpoint.storage.opening import opened
from fabricfn.checkpoint.trees.outline import Only, listing, patterns_of, selector
from fabricfn.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One entry that differs."""

    path: str
    a: str
    """What stands there in the first: "float32[2, 3]", or a plain value; empty where it has no such entry."""
    b: str
    """In the second."""
    count: int = 0
    """How many elements differ, where both are tensors of one shape."""
    size: int = 0
    """Of so many."""
    max_abs: float = 0.0
    """The largest difference of two elements; nan where one of them is nan, or cannot be subtracted."""

    def __str__(self) -> str:
        if not self.a or not self.b:
            return f"{self.path}: only in the {'second' if self.b else 'first'}, {self.a or self.b}"
        names = self.a if self.a == self.b else f"{self.a} -> {self.b}"
        if not self.size:
            return f"{self.path}: {names}"
        return f"{self.path}: {names}, {self.count:,} of {self.size:,} differ, by at most {self.max_abs:.3g}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """What two checkpoints do not have in common. `print` shows it as a list."""

    a: str
    b: str
    num_equal: int
    """The entries that are equal in both."""
    changes: tuple[Change, ...]
    """The others, in the order of the first checkpoint, then those of the second alone."""

    @property
    def equal(self) -> bool:
        """Whether there are none."""
        return not self.changes

    def __str__(self) -> str:
        changed, gone, added = (
            sum(1 for change in self.changes if kind == (bool(change.a), bool(change.b)))
            for kind in ((True, True), (True, False), (False, True))
        )
        head = f"{self.a} and {self.b}: {self.num_equal} entries equal, {changed} differ"
        head += f", {gone} only in the first" * bool(gone) + f", {added} only in the second" * bool(added)
        return "\n".join([head, *(f"  {change}" for change in self.changes)])


def diff_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    only: Only = None,
    atol: float = 0.0,
    storage_options: Mapping[str, Any] | None = None,
) -> Differences:
    """Which entries of two checkpoints differ, and by how much. A block at a time, so both may be larger than memory.

    Laws: how the entries are cut into files, by whatever strategy and number of ranks, makes no difference. Without
    `atol` equal means the same bits: 0.0 is not -0.0, and a nan is itself. Not collective: one process calls it, of a
    run or of none. `fabricfn diff A B` prints what this returns.

    Args:
        a: a checkpoint of `save`, or its URL; or what `load_raw` reads: PyTorch, safetensors, Hugging Face, torch's
            distributed checkpoints.
        b: the other one. Where just one of them is another tool's, ours is taken as `consolidate` would write it.
        only: which entries, by path or pattern ("model", "opt/state/*").
        atol: tensors of floating numbers that differ by no more than this are equal.
        storage_options: arguments of fsspec's file system for URLs.

    Returns:
        `Differences`: `equal`, `changes`, and for each change the path, what stands there, how many elements differ
        and the largest absolute difference.

    Raises:
        CheckpointError: there is no whole checkpoint, a block is damaged, `only` selects nothing in both, or an entry
            of another tool's file cannot be read (all are named).

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     for step in (1, 2):
        ...         receipt = ff.save(rt, f"{folder}/{step}", {"w": torch.tensor([1.0, step]), "step": step})
        ...     for change in ff.diff_checkpoints(folder + "/1", folder + "/2").changes:
        ...         print(change)
        w: float32[2], 1 of 2 differ, by at most 1
        step: 1 -> 2
    """
    paths = (a, b)
    with contextlib.ExitStack() as stack:
        mixed = is_foreign(a) != is_foreign(b)
        left, right = (_entries(path, mixed, only, stack, storage_options) for path in paths)
        if not left and not right:
            raise CheckpointError(f"only={patterns_of(only) or only!r} selects nothing in {a} and {b}.")
        changes = [
            _change(path, left.get(path, _NOTHING), right.get(path, _NOTHING), atol) for path in {**left, **right}
        ]
    found = tuple(change for change in changes if change is not None)
    first, second = (os.fspath(path) for path in paths)
    return Differences(a=first, b=second, num_equal=len(changes) - len(found), changes=found)


_NOTHING = object()


def _entries(
    path: str | os.PathLike[str], mixed: bool, only: Only, stack: contextlib.ExitStack, options: Options
) -> dict[str, Any]:
    """Path -> tensor that is to be read, or plain value."""
    selected = selector(only)
    found: dict[str, Any] = {}
    if mixed:
        found = {tensor.name: tensor.stored for tensor in exportable(path, None, stack, options)}
        return {name: item for name, item in found.items() if selected((name,))}
    if not is_foreign(path):
        source = stack.enter_context(opened(path, options=options))
        for number, keys in paths_of(source.manifest.tree).items():
            if selected(keys):
                tensor = stored(source, number)
                found[path_text(keys)] = plain_value(source.manifest.leaves[number]) if tensor is None else tensor
        return found
    tree = whole_tree(opened_raw(unresolved(path), stack))
    for keys, item in leaves(tree):
        if selected(keys):
            found |= {path_text((*keys, *below)): leaf for below, leaf in leaves(settled(item))}
    refused = [f"{name}: {item.text}" for name, item in found.items() if type(item) is Refused]
    if refused:
        raise CheckpointError(
            f"{os.fspath(path)} has entries that cannot be compared; leave them out:{listing(refused)}"
        )
    return found


def _change(path: str, a: Any, b: Any, atol: float) -> Change | None:
    """How an entry differs; None when it does not."""
    if type(a) is Stored and type(b) is Stored and a.shape == b.shape:
        return _compared(path, a, b, atol)
    if type(a) is type(b) and type(a) is not Stored and (plain_leaf(a) or a) == (plain_leaf(b) or b):
        return None
    return Change(path=path, a=_text(a), b=_text(b))


def _text(value: Any) -> str:
    if value is _NOTHING:
        return ""
    return tensor_text(value) if type(value) is Stored else f"{plain_text(value):.60}"


def _compared(path: str, a: Stored, b: Stored, atol: float) -> Change | None:
    """Two tensors of one shape, a block at a time."""
    count, distances, most = 0, [0.0], block_of(a, b)
    for one, other in zip(blocks(a, path, most), blocks(b, path, most), strict=True):
        left, right = one.reshape(-1), other.reshape(-1)
        if left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            continue  # quicker than to count
        differs = _differs(left, right)
        if differs.any():
            count += int(differs.sum())
            distances.append(_distance(left, right, differs))
    largest = math.nan if any(map(math.isnan, distances)) else max(distances)
    if a.dtype == b.dtype and (not count or (a.dtype.is_floating_point and atol > 0 and largest <= atol)):
        return None
    return Change(path=path, a=tensor_text(a), b=tensor_text(b), count=count, size=math.prod(a.shape), max_abs=largest)


def _differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """For each element whether its bits differ; between two dtypes, whether its value does."""
    if a.dtype == b.dtype:
        return (a.view(torch.uint8) != b.view(torch.uint8)).view(len(a), -1).any(1)
    return _exact(a) != _exact(b)


def _distance(a: torch.Tensor, b: torch.Tensor, differs: torch.Tensor) -> float:
    """The largest of the elements that differ. Integers beyond 2**53 are rounded, but never to nothing."""
    if torch.float4_e2m1fn_x2 in (a.dtype, b.dtype):  # two numbers a byte, which torch does not convert
        return math.nan
    found = float((_exact(a)[differs] - _exact(b)[differs]).abs().max())
    return found if a.is_floating_point() or a.is_complex() else max(found, 1.0)


def _exact(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)
