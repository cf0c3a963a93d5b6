"""Arithmetic over ranks on lists of tensors."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist

from fabricfn.flat.buckets import Tensors, complete, join, join_rows, plan, split
from fabricfn.flat.hosting import over_the_host
from fabricfn.flat.wire import (
    SUMMED,
    Group,
    combine_all,
    combine_mine,
    divide,
    floats_for_means,
    group_size,
    sum_in_place,
    sum_mine,
)
from fabricfn.tracing import tracing


def all_reduce_mean(tensors: Tensors, group: Group) -> list[torch.Tensor]:
    """The mean over the ranks of each tensor; the mean of integers is float64. Every rank must call it."""
    return all_reduce(tensors, group, "mean")


@over_the_host
@torch.no_grad()
def all_reduce(tensors: Tensors, group: Group, op: str) -> list[torch.Tensor]:
    """The reduction over the ranks of each tensor, the same bits on every rank. Every rank must call it."""
    tensors = floats_for_means(tensors, op)
    if group is None:
        return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    buffers: list[torch.Tensor] = []
    works: list[dist.Work | None] = []
    buckets = plan(tensors)
    for places in buckets:
        buffer = join([tensors[place] for place in places])
        if op not in ("sum", "mean") or buffer.dtype not in SUMMED:
            buffer = combine_all(buffer, group, op)
            works.append(None)
        else:
            divide(buffer, group, op, early=True)
            works.append(sum_in_place(buffer, group))
        buffers.append(buffer)
    results: list[torch.Tensor | None] = [None] * len(tensors)
    for places, buffer, work in zip(buckets, buffers, works, strict=True):
        if work is not None:
            work.wait()
        divide(buffer, group, op, early=False)
        split(buffer, [tensors[place].shape for place in places], places, results)
    return complete(results)


@torch.no_grad()
def reduce_scatter(tensors: Tensors, group: Group, op: str) -> list[torch.Tensor]:
    """The part of the reduction that belongs to this rank: of `size` equal parts along dim 0, the one of this rank."""
    tensors, size = floats_for_means(tensors, op), group_size(group)
    results: list[torch.Tensor | None] = [None] * len(tensors)
    for places in plan(tensors):
        part = [tensors[place] for place in places]
        rows = join_rows(part, size)
        if op not in ("sum", "mean") or rows.dtype not in SUMMED:
            buffer = combine_mine(rows, group, op)
        else:
            divide(rows, group, op, early=True)
            buffer = sum_mine(rows, group)
            divide(buffer, group, op, early=False)
        shapes = [torch.Size((tensor.shape[0] // size, *tensor.shape[1:])) for tensor in part]
        split(buffer, shapes, places, results)
    return complete(results)


def anywhere(flags: Sequence[bool], group: Group, device: torch.device) -> list[bool]:
    """Which of the flags are set on some rank."""
    if tracing():  # ranks that run one graph agree
        return list(flags)
    both = torch.tensor(flags, dtype=torch.uint8, device=device)
    if group is not None:
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in cast("list[int]", both.tolist())]
