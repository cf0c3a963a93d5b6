"""Arrays and bytes: torch tensors, numpy arrays and numpy scalars as leaves of a checkpoint, bit for bit."""

import math
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import torch

from fabricfn.checkpoint.manifest import BLOCK, DTYPES, RAW_DTYPES, Leaf, class_of
from fabricfn.checkpoint.opening import Source, read_piece

WRITE_INSTEAD: tuple[tuple[Any, str], ...] = (
    (torch.nn.Module, "module.state_dict()"),
    (torch.optim.Optimizer, "optimizer.state_dict()"),
    (torch.optim.lr_scheduler.LRScheduler, "scheduler.state_dict()"),
    (torch.Generator, "generator.get_state()"),
    (torch.utils.data.DataLoader, "its cursor: for batch, cursor in ff.batches(rt, loader, with_cursor=True)"),
    ((torch.dtype, torch.device), "str(value)"),
    ((set, frozenset), "sorted(value)"),
    ((int, float, str, bytes), "the plain value: int(value), str(value), ..."),
)
ANYTHING = "a dict, a list or a dataclass of tensors, numbers and strings (str(path) for a path)"


def array_leaf(value: Any, host: bool) -> Leaf | str | None:
    """The leaf of an array, without pieces; what is wrong with it; or None when `value` is no array.

    Args:
        value: anything.
        host: whether tensors in host memory shall be marked, because the run computes on another device.
    """
    kind = class_of(value)
    if issubclass(kind, torch.Tensor):
        return _tensor_leaf(value, host)
    if kind is np.ndarray or issubclass(kind, np.generic):
        name = str(value.dtype.name)
        if name not in DTYPES and name not in RAW_DTYPES:
            return f"a numpy {kind.__name__} of dtype {value.dtype} cannot be stored. Write a list, or numbers."
        if not value.dtype.isnative:
            return f"a numpy {kind.__name__} of foreign byte order ({value.dtype.str}). Write value.astype({name!r})."
        return Leaf(kind="array" if kind is np.ndarray else "number", dtype=name, shape=tuple(value.shape))
    return None


def _tensor_leaf(value: torch.Tensor, host: bool) -> Leaf | str:
    kind, name = type(value), str(value.dtype).removeprefix("torch.")
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return f"a tensor of class {kind.__name__} cannot be stored. Write value.as_subclass(torch.Tensor)."
    if value.layout is not torch.strided or value.is_nested:
        return f"a tensor of layout {value.layout} cannot be stored. Write value.to_dense() or its parts."
    if value.is_meta:
        return "a tensor on the meta device has no values. Write value.to_empty(device=...) and fill it."
    if name not in DTYPES and name not in RAW_DTYPES:
        return f"a tensor of dtype {name} cannot be stored. Write another dtype, or its parts."
    return Leaf(kind="tensor", dtype=name, shape=tuple(value.shape), host=host and value.device.type == "cpu")


def advice(value: Any) -> str:
    """What is wrong with a leaf of a type that a checkpoint does not know, and what to write."""
    for kind, instead in WRITE_INSTEAD:
        if isinstance(value, kind):
            return f"a {type(value).__name__} cannot be stored. Write {instead}."
    return f"a {type(value).__name__} cannot be stored. Write {ANYTHING}."


def identity(value: Any) -> Hashable | None:
    """Equal for arrays that are the very same memory, seen alike; None where there is no memory to share."""
    if isinstance(value, torch.Tensor):
        if not value.numel() or value.is_meta:
            return None
        bits = (value.is_conj(), value.is_neg())
        return ("tensor", value.device, value.data_ptr(), value.dtype, value.shape, value.stride(), bits)
    if type(value) is np.ndarray and value.size:
        return ("array", value.__array_interface__["data"][0], value.dtype, value.shape, value.strides)
    return None


def chunks(value: Any) -> Iterator[memoryview]:
    """The bytes of an array in the order of its elements; without a copy where they lie so, else a block at a time."""
    if isinstance(value, torch.Tensor):
        yield from _tensor_chunks(value.detach())
    elif value.nbytes:
        yield _memory(np.ascontiguousarray(value).reshape(-1).view(np.uint8))


def _tensor_chunks(value: torch.Tensor) -> Iterator[memoryview]:
    if not value.numel():
        return
    plain = value.device.type == "cpu" and value.is_contiguous() and not value.is_conj() and not value.is_neg()
    if plain or value.nbytes <= BLOCK:
        yield bytes_of(value.resolve_conj().resolve_neg().cpu().contiguous())
        return
    rows = BLOCK // (value.nbytes // len(value))
    for begin in range(0, len(value), max(1, rows)):
        yield from _tensor_chunks(value[begin : begin + rows] if rows > 1 else value[begin])


def bytes_of(value: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor in host memory, not a copy."""
    row = value.as_strided((value.numel(),), (1,))  # not reshape: one element may keep a stride that `view` refuses
    return _memory(row.view(torch.uint8).numpy())


def _memory(value: Any) -> memoryview:
    return memoryview(value)


def read_array(source: Source, leaf: Leaf, into: torch.Tensor, what: str) -> None:
    """Fill a tensor in host memory with a leaf; every byte is checked, and every element must be covered."""
    covered = 0
    for piece in leaf.pieces:
        part = into
        for dim, (begin, length) in enumerate(zip(piece.offset, piece.shape, strict=True)):
            part = part.narrow(dim, begin, length)
        if part.is_contiguous():
            read_piece(source, piece, bytes_of(part), what)
        else:
            rows = torch.empty(piece.shape, dtype=into.dtype, device="cpu")
            read_piece(source, piece, bytes_of(rows), what)
            part.copy_(rows)
        covered += math.prod(piece.shape)
    assert covered == into.numel(), f"{what}: {covered} of {into.numel()} elements were covered"


def torch_dtype(leaf: Leaf) -> torch.dtype:
    """The dtype of a leaf, numpy's included."""
    return getattr(torch, leaf.dtype)
