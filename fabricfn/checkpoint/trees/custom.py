"""Types of the caller: a pair of functions per class takes its values apart and puts them together.

They are arguments of `save` and `load`, not a registry: what a call does can be read where it stands, and a checkpoint
names a tag, nothing to import.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch

from fabricfn.checkpoint.trees.adapters import ADAPTERS, OBJECT_STATE, Adapter, Types
from fabricfn.errors import ConfigurationError
from fabricfn.leases import Place

KNOWN: frozenset[type] = frozenset(
    (
        *(bool, int, float, complex, str, bytes, type(None), dict, list, tuple, MappingProxyType),
        *(torch.Tensor, torch.nn.Parameter, np.ndarray, *ADAPTERS),
    )
)
"""Classes whose values every checkpoint can hold; nobody may give them another meaning."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointType:
    """How `save` and `load` take values of a class of your own apart and put them together: see their `types`.

    Law: `from_tree(like, to_tree(value))` is `value`, whatever value of the class `like` is. Both run on every rank.
    Tensors among the parts are stored as everywhere: DTensors by parts, shared memory once.

    Example:
        >>> import collections, tempfile, fabricfn as ff
        >>> queue = ff.CheckpointType(
        ...     cls=collections.deque,
        ...     to_tree=lambda value: {"items": list(value), "maxlen": value.maxlen},
        ...     from_tree=lambda like, tree: collections.deque(tree["items"], tree["maxlen"]),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     _ = ff.save(rt, folder + "/last", {"losses": collections.deque([3.0, 2.5], 100)}, types=[queue])
        ...     ff.load(rt, folder + "/last", {"losses": collections.deque()}, types=[queue])
        {'losses': deque([3.0, 2.5], maxlen=100)}
    """

    cls: type
    """The exact class; sub-classes have an entry of their own."""
    to_tree: Callable[[Any], Mapping[Any, Any]]
    """value -> a dict of its parts by name; the parts are anything that a checkpoint may hold."""
    from_tree: Callable[[Any, dict[Any, Any]], Any]
    """(like, parts) -> value. `like` is the value in the template, None where the template has none. The parts are
    those that the checkpoint has, in the classes of `to_tree(like)`; under `donate=True` its tensors, filled."""
    tag: str = ""
    """What the checkpoint calls the type; the name of the class by default. Keep it when the class is renamed."""


def types_of(types: Sequence[CheckpointType]) -> Types:
    """The adapters of these types, by class.

    Raises:
        ConfigurationError: two of one class or tag, or one that is taken.
    """
    found: dict[type, Adapter] = {}
    tags: dict[str, type] = {adapter.tag: cls for cls, adapter in ADAPTERS.items()}
    for entry in types:
        if type(cast("object", entry)) is not CheckpointType:
            raise ConfigurationError(
                "types= holds ff.CheckpointType(cls=..., to_tree=..., from_tree=...); this is a"
                f" {type(entry).__name__}."
            )
        tag = entry.tag or entry.cls.__name__
        if entry.cls in KNOWN:
            raise ConfigurationError(
                f"types=: a checkpoint holds every {entry.cls.__name__} as it is; CheckpointType is for other classes."
            )
        if entry.cls in found:
            raise ConfigurationError(f"types= has two entries for the class {entry.cls.__name__}; keep one.")
        if tag in tags or tag == OBJECT_STATE:
            owner = tags[tag].__name__ if tag in tags else tag
            raise ConfigurationError(
                f"types=: the tag {tag!r} of {entry.cls.__name__} is taken by {owner}. Give another one: tag=..."
            )
        tags[tag] = entry.cls
        found[entry.cls] = _adapter(entry, tag)
    return found


def _adapter(entry: CheckpointType, tag: str) -> Adapter:
    make = entry.from_tree

    def from_tree(like: Any, fields: dict[Any, Any], where: Place | None) -> Any:
        return make(like, fields)

    return Adapter(tag=tag, to_tree=entry.to_tree, from_tree=from_tree, cls=entry.cls)
