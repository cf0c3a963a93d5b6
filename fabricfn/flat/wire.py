"""What flat buffers do in a process group. `group=None` is one rank."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fabricfn.flat.buckets import LARGE, Tensors
from fabricfn.tracing import tracing

Group = dist.ProcessGroup | None

SUMMED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
)
"""The dtypes that every backend sums by itself."""
HALVES = (torch.float16, torch.bfloat16)

COMBINE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda rows: rows.sum(0, dtype=rows.dtype),
    "product": lambda rows: rows.prod(0, dtype=rows.dtype),
    "max": lambda rows: rows.amax(0),
    "min": lambda rows: rows.amin(0),
    "any": lambda rows: rows.any(0),
    "all": lambda rows: rows.all(0),
}
"""What "one row a rank" becomes. "mean" is a sum that is divided.

Everything but sums is computed by torch from the ranks' rows, in the order of the ranks, and not by the backend: gloo
drops a NaN from a maximum or keeps it depending on who holds it, and knows fewer dtypes.
"""

# torch 2.13 renamed both and warns at the old names
_new_names = hasattr(dist, "all_gather_single")
_gather_into: Any = getattr(dist, "all_gather_single" if _new_names else "all_gather_into_tensor")
_scatter_into: Any = getattr(dist, "reduce_scatter_single" if _new_names else "reduce_scatter_tensor")
_untyped: Any = dist
_exchange_into, _reduce_into = _untyped.all_to_all_single, _untyped.all_reduce


def group_size(group: Group) -> int:
    """The number of ranks."""
    return 1 if group is None else group.size()


def gathered(buffer: torch.Tensor, group: Group) -> torch.Tensor:
    """[n] of each rank -> [size, n]."""
    if group is None:
        return buffer[None]
    rows = buffer.new_empty((group.size(), buffer.numel()))
    if buffer.numel():
        _gather_into(as_bytes(rows).view(-1), as_bytes(buffer), group=group)
    return rows


def exchanged(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """Row r of [size, n] goes to rank r -> [size, n], row r from rank r."""
    if group is None or not rows.numel():
        return rows
    received = torch.empty_like(rows)
    _exchange_into(as_bytes(received), as_bytes(rows), group=group)
    return received


def gather_in_place(rows: torch.Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Row r of [size, n], filled on rank r, comes to all ranks, once the work has been waited for."""
    if not rows.numel():
        return None
    return _gather_into(as_bytes(rows).view(-1), as_bytes(rows[group.rank()]), group=group, async_op=True)


def exchange_into(received: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Row r of [size, n] goes to rank r; `received` has a row from each rank once the work has been waited for."""
    if not rows.numel():
        return None
    return _exchange_into(as_bytes(received), as_bytes(rows), group=group, async_op=True)


def combine_mine(rows: torch.Tensor, group: Group, op: str) -> torch.Tensor:
    """[size, n] -> [n]: the reduction of row r of all ranks, r being this rank."""
    return COMBINE[op](exchanged(rows, group))


def combine_all(buffer: torch.Tensor, group: Group, op: str) -> torch.Tensor:
    """[n] -> [n]: the reduction. Above `LARGE` each rank combines its part only, which moves a constant amount."""
    size = group_size(group)
    if buffer.nbytes <= LARGE:
        return COMBINE[op](gathered(buffer, group))
    width = -(-buffer.numel() // size)
    rows = buffer.new_zeros(size * width)
    rows[: buffer.numel()] = buffer
    mine = combine_mine(rows.view(size, width), group, op)
    return gathered(mine, group).view(-1)[: buffer.numel()]


def sum_in_place(buffer: torch.Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """The buffer becomes the sum over the ranks, once the work has been waited for."""
    if not buffer.numel():
        return None
    if tracing():
        return _traced(buffer, torch.ops._c10d_functional.all_reduce(as_real(buffer), "sum", group.group_name))
    return _reduce_into(as_real(buffer), group=group, async_op=True)


def broadcast_in_place(buffer: torch.Tensor, src: int, group: Group) -> dist.Work | None:
    """The buffer becomes that of rank `src` of the group, once the work has been waited for."""
    if group is None or not buffer.numel():
        return None
    if tracing():
        return _traced(buffer, torch.ops._c10d_functional.broadcast(as_real(buffer), src, group.group_name))
    broadcast: Any = dist.broadcast
    return broadcast(as_bytes(buffer), group_src=src, group=group, async_op=True)


def _traced(buffer: torch.Tensor, coming: Any) -> None:
    """Operations of a graph in place of a message: the compiler knows them."""
    arrived = torch.ops._c10d_functional.wait_tensor(coming)
    buffer.copy_(torch.view_as_complex(arrived) if buffer.is_complex() else arrived)


def divide(buffer: torch.Tensor, group: Group, op: str, *, early: bool) -> None:
    """Sums become means. 16-bit floats are divided early, as DDP does: a sum of theirs may overflow."""
    if op == "mean" and early == (buffer.dtype in HALVES):
        buffer.div_(group_size(group))


def as_bytes(buffer: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes."""
    return buffer.view(torch.uint8)


def as_real(buffer: torch.Tensor) -> torch.Tensor:
    """The same memory without complex numbers."""
    return torch.view_as_real(buffer) if buffer.is_complex() else buffer


def floats_for_means(tensors: Tensors, op: str) -> Tensors:
    """Integers and bools as float64, if it is their mean that is wanted."""
    if op != "mean":
        return tensors
    return [tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double() for tensor in tensors]


def sum_mine(rows: torch.Tensor, group: Group) -> torch.Tensor:
    """[size, n] -> [n]: the sum of row r of all ranks, r being this rank."""
    mine = rows[0].clone()
    if group is not None and rows.numel():
        _scatter_into(as_real(mine), as_real(rows).reshape(-1), group=group)
    return mine
