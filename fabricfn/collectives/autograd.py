"""Collectives that keep the graph. Their backward passes are collectives too.

[Note: gradients of collectives] The gradient that rank r gets for its input is that of the *sum of all ranks' losses*.
With the mean over ranks that data-parallel training takes afterwards, that is the gradient of the mean loss: a
contrastive loss over gathered embeddings gets the gradient of one process that sees the whole batch. Each backward is
written with another of these functions, so second derivatives work too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch

from fabricfn import flat
from fabricfn.flat import Group

Outputs = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How the backward pass finds its peers."""

    group: Group
    agree: Callable[[str, list[torch.Tensor]], None]
    """Raises on every rank unless all of them come to this backward pass."""


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, *tensors: torch.Tensor) -> Outputs:
        ctx.link = link
        return tuple(flat.all_reduce(tensors, link.group, "sum"))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.link.agree("the backward pass of all_reduce", list(grads))
        return None, *sum_over_ranks(ctx.link, *grads)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, *tensors: torch.Tensor) -> Outputs:
        ctx.link = link
        return tuple(flat.all_gather(tensors, link.group))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.link.agree("the backward pass of all_gather", list(grads))
        return None, *_outputs(_SumAndPick.apply(ctx.link, *grads))


class _SumAndPick(torch.autograd.Function):
    """[size, *s] -> [*s]: row r of the sum over ranks, r being this rank."""

    @staticmethod
    def forward(ctx: Any, link: Link, *tensors: torch.Tensor) -> Outputs:
        ctx.link = link
        return tuple(part[0] for part in flat.reduce_scatter(tensors, link.group, "sum"))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.link.agree("the backward pass of the backward pass of all_gather", list(grads))
        return None, *stack_over_ranks(ctx.link, *grads)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Link, rows: list[list[int]], *tensors: torch.Tensor) -> Outputs:
        ctx.link, ctx.rows = link, rows
        return tuple(flat.all_gather_rows(tensors, rows, link.group))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.link.agree("the backward pass of all_gather(uneven=True)", list(grads))
        me = 0 if ctx.link.group is None else ctx.link.group.rank()
        sums = sum_over_ranks(ctx.link, *grads)
        starts = [sum(counts[place] for counts in ctx.rows[:me]) for place in range(len(grads))]
        parts = zip(sums, starts, ctx.rows[me], strict=True)
        return None, None, *(total.narrow(0, start, count) for total, start, count in parts)


def sum_over_ranks(link: Link, *tensors: torch.Tensor) -> Outputs:
    """The sum over the ranks of each tensor, in the graph."""
    return _outputs(_Sum.apply(link, *tensors))


def stack_over_ranks(link: Link, *tensors: torch.Tensor) -> Outputs:
    """[*s] -> [size, *s], in the graph."""
    return _outputs(_Stack.apply(link, *tensors))


def rows_of_ranks(link: Link, rows: list[list[int]], *tensors: torch.Tensor) -> Outputs:
    """The concatenation along dim 0, in the graph; `rows[rank][i]` is the first dimension of tensor i there."""
    return _outputs(_Rows.apply(link, rows, *tensors))


def _outputs(result: Any) -> Outputs:
    return cast("Outputs", result)
