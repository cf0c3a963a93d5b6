"""State in tensors of a library's own class, such as the 8-bit ones of torchao.

[Note: packed] Such a tensor computes what its library needs, and can be neither cloned nor stored. Its parts can, plain
tensors that torch's protocol for sub-classes names (`__tensor_flatten__`). So between steps a row has `Packed` in its
place, and users and checkpoints see a dict of the parts.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from fabricfn.sharding import is_sharded
from fabricfn.tree import register

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """The parts of one tensor."""

    parts: Mapping[str, Any]
    kind: Any
    """A function of the parts that puts them together; None after loading, until the class has shown one of its own."""


def _flatten(packed: Packed) -> tuple[Sequence[Any], Any, Sequence[str]]:
    return list(packed.parts.values()), (tuple(packed.parts), packed.kind), list(packed.parts)


def _unflatten(static: Any, children: Iterable[Any]) -> Packed:
    names, kind = static
    return Packed(parts=dict(zip(names, children, strict=True)), kind=kind)


register(Packed, _flatten, _unflatten)


def apart(row: Mapping[str, Any]) -> Row:
    """A row with parts in place of the tensors that have some."""
    return {slot: _packed(value) if _has_parts(value) else value for slot, value in row.items()}


def together(row: Mapping[str, Any], first: Callable[[], Mapping[str, Any]]) -> Row:
    """The inverse of `apart`; `first` makes a row to learn from, where there is nothing yet that says how."""
    if any(type(value) is Packed and value.kind is None for value in row.values()):
        row = _learnt(row, apart(first()))
    return {slot: value.kind(value.parts) if type(value) is Packed else value for slot, value in row.items()}


def shown(row: Mapping[str, Any]) -> Row:
    """A row as its owner sees it."""
    return {slot: dict(value.parts) if type(value) is Packed else value for slot, value in row.items()}


def hidden(row: Mapping[str, Any], like: Mapping[str, Any]) -> Row:
    """The inverse of `shown`; a dict of tensors may be anything, where `like` has nothing in that slot."""
    return {slot: _as_like(value, like.get(slot)) for slot, value in row.items()}


def _has_parts(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__") and not is_sharded(value)


def _packed(tensor: Any) -> Packed:
    names, context = tensor.__tensor_flatten__()
    kind = functools.partial(_joined, type(tensor), context, tensor.size(), tensor.stride())
    return Packed(parts={name: getattr(tensor, name) for name in names}, kind=kind)


def _joined(cls: Any, context: Any, size: Any, stride: Any, parts: Mapping[str, Any]) -> Any:
    return cls.__tensor_unflatten__(dict(parts), context, size, stride)


def _as_like(value: Any, like: Any) -> Any:
    if type(value) is not dict or not (like is None or type(like) is Packed):
        return cast("Any", value)
    return Packed(parts=cast("Row", value), kind=None if like is None else like.kind)


def _learnt(row: Mapping[str, Any], first: Mapping[str, Any]) -> Row:
    """The row with the kinds of another; what is a dict there is one here."""
    out: Row = {}
    for slot, value in row.items():
        kind = getattr(first.get(slot), "kind", None)
        unknown = type(value) is Packed and value.kind is None
        out[slot] = value if not unknown else Packed(parts=value.parts, kind=kind) if kind else dict(value.parts)
    return out
