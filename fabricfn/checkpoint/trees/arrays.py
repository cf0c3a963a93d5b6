"""Arrays and bytes: torch tensors, numpy arrays and numpy scalars as leaves of a checkpoint, bit for bit."""

import enum
import os
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import torch

from fabricfn.checkpoint.format.manifest import BLOCK, DTYPES, NUMPY, RAW_DTYPES, Leaf, class_of, too_large
from fabricfn.checkpoint.trees.placements import Unmapped, layout_of, local_tensor, parts_of
from fabricfn.sharding import is_sharded

WRITE_INSTEAD: tuple[tuple[Any, str], ...] = (
    (torch.nn.Module, "its Model, as ff.setup_model(rt, module) returns it; or module.state_dict()"),
    (torch.Generator, "generator.get_state()"),
    (torch.utils.data.DataLoader, "its cursor: for batch, cursor in ff.batches(rt, loader, with_cursor=True)"),
    ((torch.dtype, torch.device), "str(value)"),
    ((set, frozenset), "sorted(value)"),
    (enum.Enum, "value.name, and Class[name] when it is back"),
    (os.PathLike, "str(path)"),
    (np.ndarray, "np.asarray(value)"),
    ((dict, list, tuple), "dict(value), list(value), tuple(value)"),
    ((int, float, str, bytes), "the plain value: int(value), str(value), ..."),
)
ANYTHING = (
    "a dict, a list or a dataclass of tensors, numbers and strings; or say how such objects are stored:"
    " types=[ff.CheckpointType(cls=..., to_tree=..., from_tree=...)]"
)


def array_leaf(value: Any, host: bool) -> Leaf | str | None:
    """The leaf of an array, without pieces; what is wrong with it; or None when `value` is no array.

    A DTensor is a tensor of its global shape.

    Args:
        value: anything.
        host: whether tensors in host memory shall be marked, because the run computes on another device.
    """
    kind = class_of(value)
    if issubclass(kind, torch.Tensor):
        return _tensor_leaf(value, host)
    if kind is np.ndarray or issubclass(kind, np.generic):
        name = str(value.dtype.name)
        if name not in NUMPY:
            return f"a numpy {kind.__name__} of dtype {value.dtype} cannot be stored. Write a list, or numbers."
        if not value.dtype.isnative:
            return f"a numpy {kind.__name__} of foreign byte order ({value.dtype.str}). Write value.astype({name!r})."
        return Leaf(kind="array" if kind is np.ndarray else "number", dtype=name, shape=tuple(value.shape))
    return None


def _tensor_leaf(value: torch.Tensor, host: bool) -> Leaf | str:
    kind, name = type(value), str(value.dtype).removeprefix("torch.")
    if is_sharded(value):
        fault = shard_fault(value)
        if fault:
            return fault
    elif kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return f"a tensor of class {kind.__name__} cannot be stored. Write value.as_subclass(torch.Tensor)."
    if value.layout is not torch.strided or value.is_nested:
        return f"a tensor of layout {value.layout} cannot be stored. Write value.to_dense() or its parts."
    if value.is_meta:
        return "a tensor on the meta device has no values. Write value.to_empty(device=...) and fill it."
    if name not in DTYPES and name not in RAW_DTYPES:
        return f"a tensor of dtype {name} cannot be stored. Write another dtype, or its parts."
    if too_large(value.shape):
        return f"a tensor of shape {list(value.shape)} cannot be stored. Write value.flatten()."
    return Leaf(kind="tensor", dtype=name, shape=tuple(value.shape), host=host and value.device.type == "cpu")


def shard_fault(value: torch.Tensor) -> str:
    """Why the part of this rank of a DTensor cannot be told; empty when it can."""
    local = local_tensor(value)
    if type(local) is not torch.Tensor:
        return f"a DTensor of parts of class {type(local).__name__} cannot be stored. Write value.full_tensor()."
    try:
        parts_of(value)
    except Unmapped as error:
        return f"a DTensor cannot be stored: {error}"
    return ""


def advice(value: Any) -> str:
    """What is wrong with a leaf of a type that a checkpoint does not know, and what to write."""
    if type(value) is str:
        return f"{value[:20]!r} has a pair of surrogates, which JSON gives back as one character. Write bytes."
    for kind, instead in WRITE_INSTEAD:
        if isinstance(value, kind):
            return f"a {type(value).__name__} cannot be stored. Write {instead}."
    return f"a {type(value).__name__} cannot be stored. Write {ANYTHING}."


def identity(value: Any) -> Hashable | None:
    """Equal for arrays that are the very same memory, seen alike; None where there is no memory to share."""
    if isinstance(value, torch.Tensor):
        local = local_tensor(value)
        if not local.numel() or local.is_meta or not local.data_ptr():  # XLA tells nobody where its memory is
            return None
        bits = (local.is_conj(), local.is_neg())
        place = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride())
        return ("tensor", place, bits, layout_of(value))
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
