"""Collectives in which all ranks play the same part: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`."""

import functools
from collections.abc import Callable
from typing import cast

import torch

from fabricfn import flat
from fabricfn.collectives.agreement import Parcel, agree, take_apart
from fabricfn.collectives.autograd import Link, rows_of_ranks, stack_over_ranks, sum_over_ranks
from fabricfn.collectives.groups import Axis, Members, along
from fabricfn.collectives.parcels import (
    divisible,
    meet,
    movable,
    rebuild,
    rebuild_tensors,
    reducible,
    rows_of,
    travel,
    words_device,
)
from fabricfn.errors import CapabilityError
from fabricfn.runtimes import Runtime
from fabricfn.tree import Tree
from fabricfn.watching import collective
from fabricfn.world import World

Tensors = list[torch.Tensor]


@collective("all_reduce", apart=True)
def all_reduce(rt: Runtime, tree: Tree, op: str = "mean", *, axis: Axis = None, differentiable: bool = False) -> Tree:
    """The reduction over the ranks of every leaf; the same bits on every rank.

    Dtypes stay, but for the mean of integers and bools, which is float64 (of Python numbers: float). A sum of integers
    wraps around as in torch. A NaN on one rank is a NaN in the result.

    Args:
        rt: the runtime.
        tree: tensors of any shape, and numbers, which come back as numbers. "any" and "all" take bools; "sum" and
            "product" take no bool tensors, and count Python bools.
        op: "mean", "sum", "max", "min", "product", "any" or "all". Sums and means are the backend's; the others cost
            one row a rank up to 1 MiB, and an all-to-all and a gather above. A small tree on the CPU (16 leaves, 480
            bytes, up to 64 ranks) travels with the check, in one message, and is combined in the order of the ranks.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it. See [Note: collectives].
        differentiable: keep the graph ("mean" and "sum"). The gradient that arrives is that of the sum of all ranks'
            losses, and every rank must run the backward pass.

    Returns:
        On every rank the same new tree.

    Raises:
        ConfigurationError: an unknown op, or a leaf that does not know it.
        MismatchError: the ranks' calls or trees differ; on every rank.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.all_reduce(rt, {"loss": torch.tensor([1.0, 3.0]), "count": 2}, "sum")
        {'loss': tensor([1., 3.]), 'count': 2}
        >>> ff.all_reduce(rt, 2)
        2.0
    """
    rt, members = along(rt, axis)
    call = f"all_reduce(op={op!r}{', differentiable=True' if differentiable else ''})"

    def prepare(parcel: Parcel) -> Tensors:
        tensors = reducible(parcel, rt.world, members, call, op)
        if differentiable and op not in ("mean", "sum"):
            raise CapabilityError(f'{call}: only op="mean" and op="sum" keep the graph.')
        return tensors

    parcel, tensors, agreement = meet(
        rt.world, members, call, tree, prepare, graph=differentiable, rides=not differentiable
    )
    link = _link(rt.world, members)

    def run(sent: Tensors) -> Tensors:
        return flat.all_reduce(sent, members.group, op)

    def arrived(rows: Tensors) -> Tensors:
        return flat.combined(rows, members.group, op)

    def run_in_graph(sent: Tensors) -> Tensors:
        if op == "sum":
            return list(sum_over_ranks(link, *sent))
        size = len(members.ranks)
        early = [tensor / size if tensor.dtype in flat.HALVES else tensor for tensor in sent]
        sums = sum_over_ranks(link, *early)
        return [total if total.dtype in flat.HALVES else total / size for total in sums]

    chosen = _in_graph_where_needed(run, run_in_graph) if differentiable else run
    return rebuild(parcel, travel(parcel, tensors, agreement, rt.world, members, chosen, arrived))


@collective("all_gather", apart=True)
def all_gather(
    rt: Runtime, tree: Tree, *, axis: Axis = None, uneven: bool = False, differentiable: bool = False
) -> Tree:
    """Every rank's leaves, stacked along a new first dimension: [*s] becomes [world_size, *s].

    Args:
        rt: the runtime.
        tree: dense tensors of any dtype, and numbers, of which tensors [world_size] of 64 bits are made.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it. See [Note: collectives].
        uneven: concatenate along dim 0 instead, by rank; first dimensions may differ between ranks, and be 0. What has
            no dimension counts as one row.
        differentiable: keep the graph, for contrastive losses. The gradient that arrives is that of the sum of all
            ranks' losses, and every rank must run the backward pass.

    Returns:
        On every rank the same new tree. One rank adds the leading 1 too.

    Raises:
        MismatchError: the ranks' calls or trees differ; on every rank.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.all_gather(rt, torch.tensor([1, 2])).shape
        torch.Size([1, 2])
    """
    rt, members = along(rt, axis)
    options = [name for name, on in (("uneven", uneven), ("differentiable", differentiable)) if on]
    call = f"all_gather({', '.join(f'{name}=True' for name in options)})"

    def prepare(parcel: Parcel) -> Tensors:
        tensors = movable(parcel, rt.world, members, call)
        return rows_of(tensors) if uneven else tensors

    parcel, tensors, agreement = meet(
        rt.world, members, call, tree, prepare, uneven=uneven, graph=differentiable, rides=not options
    )
    link = _link(rt.world, members)

    def run(sent: Tensors) -> Tensors:
        if uneven:
            return flat.all_gather_rows(sent, _row_counts(rt.world, members, sent), members.group)
        return flat.all_gather(sent, members.group)

    def run_in_graph(sent: Tensors) -> Tensors:
        if uneven:
            return list(rows_of_ranks(link, _row_counts(rt.world, members, sent), *sent))
        return list(stack_over_ranks(link, *sent))

    chosen = _in_graph_where_needed(run, run_in_graph) if differentiable else run
    return rebuild_tensors(parcel, travel(parcel, tensors, agreement, rt.world, members, chosen), rt.world)


@collective("reduce_scatter", apart=True)
def reduce_scatter(rt: Runtime, tree: Tree, op: str = "mean", *, axis: Axis = None) -> Tree:
    """The part of `all_reduce` that belongs to this rank: every leaf is cut along dim 0 into one part a rank.

    Args:
        rt: the runtime.
        tree: tensors [n, ...], n a multiple of the number of ranks.
        op: as in `all_reduce`.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it. See [Note: collectives].

    Returns:
        On rank r a new tree of tensors [n / world_size, ...]: rows r * n / world_size and following of the reduction.

    Raises:
        ConfigurationError: a leaf that cannot be cut, an unknown op.
        MismatchError: the ranks' calls or trees differ; on every rank.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.reduce_scatter(rt, torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    rt, members = along(rt, axis)
    call = f"reduce_scatter(op={op!r})"

    def prepare(parcel: Parcel) -> Tensors:
        tensors = reducible(parcel, rt.world, members, call, op)
        divisible(parcel, tensors, len(members.ranks), call)
        return tensors

    parcel, tensors, agreement = meet(rt.world, members, call, tree, prepare)
    run = functools.partial(flat.reduce_scatter, group=members.group, op=op)
    return rebuild(parcel, travel(parcel, tensors, agreement, rt.world, members, run))


@collective("all_to_all", apart=True)
def all_to_all(rt: Runtime, tree: Tree, *, axis: Axis = None) -> Tree:
    """Every rank sends one part of each leaf to every rank: parts are cuts along dim 0.

    Args:
        rt: the runtime.
        tree: tensors [n, ...], n a multiple of the number of ranks; part i goes to rank i.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it. See [Note: collectives].

    Returns:
        A new tree of the same shapes: part i came from rank i. Applied twice it gives back the tree.

    Raises:
        ConfigurationError: a leaf that cannot be cut.
        MismatchError: the ranks' calls or trees differ; on every rank.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.all_to_all(rt, torch.tensor([1, 2]))
        tensor([1, 2])
    """
    rt, members = along(rt, axis)
    call = "all_to_all()"

    def prepare(parcel: Parcel) -> Tensors:
        tensors = movable(parcel, rt.world, members, call)
        divisible(parcel, tensors, len(members.ranks), call)
        return tensors

    parcel, tensors, agreement = meet(rt.world, members, call, tree, prepare)
    run = functools.partial(flat.all_to_all, group=members.group)
    return rebuild(parcel, travel(parcel, tensors, agreement, rt.world, members, run))


def _link(world: World, members: Members) -> Link:
    def peers(call: str, grads: Tensors) -> None:
        agree(world, members, call, take_apart(grads), None)

    return Link(group=members.group, agree=peers)


def _in_graph_where_needed(
    run: Callable[[Tensors], Tensors], run_in_graph: Callable[[Tensors], Tensors]
) -> Callable[[Tensors], Tensors]:
    def both(sent: Tensors) -> Tensors:
        inside = [torch.is_grad_enabled() and tensor.requires_grad for tensor in sent]
        results = iter(run_in_graph([t for t, wanted in zip(sent, inside, strict=True) if wanted]))
        others = iter(run([t for t, wanted in zip(sent, inside, strict=True) if not wanted]))
        return [next(results if wanted else others) for wanted in inside]

    return both


def _row_counts(world: World, members: Members, tensors: Tensors) -> list[list[int]]:
    mine = torch.tensor([tensor.shape[0] for tensor in tensors], dtype=torch.int64, device=words_device(world, members))
    return cast("list[list[int]]", flat.all_gather([mine], members.group)[0].tolist())
