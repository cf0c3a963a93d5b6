"""Collectives with one rank at the centre: `gather`, `broadcast`, `scatter`.

In the last two only that rank knows the tree, and the others may pass anything in its place.
"""

import dataclasses
import functools
import pickle
from typing import Any

import torch

from fabricfn import flat
from fabricfn.collectives.agreement import Agreement, Parcel, agree, attempt, take_apart
from fabricfn.collectives.groups import Axis, Members, along, device_for
from fabricfn.collectives.messages import broadcast_bytes
from fabricfn.collectives.objects import pickled
from fabricfn.collectives.parcels import divisible, meet, movable, rebuild_tensors, travel, words_device
from fabricfn.errors import ConfigurationError
from fabricfn.runtimes import Runtime
from fabricfn.tree import Tree, TreeSpec, tree_unflatten
from fabricfn.watching import collective
from fabricfn.world import World


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What the source says about its tree; plain data."""

    spec: TreeSpec | None
    """None where all ranks have the same structure: records with an engine cannot be pickled, and need not be."""
    firsts: list[int]
    """Which leaves are one tensor."""
    tensors: dict[int, tuple[torch.dtype, tuple[int, ...], str | None]]
    """Place -> dtype, shape, kind of device (None is the rank's own)."""
    objects: dict[int, Any]
    """Place -> any other leaf."""


@collective("gather", apart=True)
def gather(rt: Runtime, tree: Tree, dst: int = 0, *, axis: Axis = None) -> Tree | None:
    """`all_gather` for one rank only.

    Args:
        rt: the runtime.
        tree: dense tensors of any dtype, and numbers.
        dst: the rank (in the world) that gets the result.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it. See [Note: collectives].

    Returns:
        On `dst` a new tree of tensors [world_size, *s]; None on the others.

    Raises:
        MismatchError: the ranks' calls or trees differ; on every rank.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.gather(rt, {"x": torch.ones(2)})
        {'x': tensor([[1., 1.]])}
    """
    rt, members = along(rt, axis)
    call = f"gather(dst={dst})"

    def prepare(parcel: Parcel) -> list[torch.Tensor]:
        members.place_of(dst, "dst")
        return movable(parcel, rt.world, members, call)

    parcel, tensors, agreement = meet(rt.world, members, call, tree, prepare)
    receives = dst == rt.rank
    place = members.ranks.index(dst)

    def run(sent: list[torch.Tensor]) -> list[torch.Tensor]:
        return flat.gather(sent, place, members.group) or sent

    results = travel(parcel, tensors, agreement, rt.world, members, run)
    return rebuild_tensors(parcel, results, rt.world) if receives else None


@collective("broadcast", apart=True)
def broadcast(rt: Runtime, tree: Tree, src: int = 0, *, axis: Axis = None) -> Tree:
    """The tree of rank `src`, on every rank.

    Args:
        rt: the runtime.
        tree: on `src` any tree: tensors, and leaves of any other type, which are pickled (as a whole, for classes that
            are no pytree nodes). What the other ranks pass is ignored; where it has the same structure, shapes and
            dtypes (and nothing but tensors), two messages fewer are needed.
        src: the rank (in the world) whose tree it is.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it. See [Note: collectives].

    Returns:
        On every rank, `src` included, a new tree; tensors that were on the device of `src` are on the device of this
        rank.

    Raises:
        ConfigurationError: a leaf cannot be sent.
        MismatchError: another rank is in another collective, or has a problem with the tree; on every rank.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.broadcast(rt, {"path": "runs/7", "lr": 0.1, "w": torch.ones(2)})
        {'path': 'runs/7', 'lr': 0.1, 'w': tensor([1., 1.])}
    """
    rt, members = along(rt, axis)
    call = f"broadcast(src={src})"
    parcel = take_apart(tree)

    def prepare() -> list[torch.Tensor]:
        members.place_of(src, "src")
        if rt.rank != src:
            return []
        odd = [place for place in parcel.odd if isinstance(parcel.leaves[place], torch.Tensor)]
        leaves = movable(dataclasses.replace(parcel, odd=odd), rt.world, members, call)
        return [leaf for leaf, own in zip(leaves, parcel.leaves, strict=True) if isinstance(own, torch.Tensor)]

    tensors, problem = attempt(prepare)
    agreement = agree(rt.world, members, call, parcel, problem, same_tree=False)
    run = functools.partial(flat.broadcast, src=members.ranks.index(src), group=members.group)
    if _is_known(parcel, agreement):
        tensors = tensors or movable(parcel, rt.world, members, call)
        return tree_unflatten(parcel.spec, travel(parcel, tensors, agreement, rt.world, members, run))
    outline = _outline(rt.world, members, src, call, parcel, agreement)
    sends = rt.rank == src
    like = _chosen(outline, tensors, rt.world, members) if sends else _empties(outline, rt.world, members)
    return _assemble(outline, parcel, run(like), rt.world)


@collective("scatter", apart=True)
def scatter(rt: Runtime, tree: Tree, src: int = 0, *, axis: Axis = None) -> Tree:
    """Row r of every leaf of rank `src` goes to rank r; the inverse of `gather`.

    Args:
        rt: the runtime.
        tree: on `src` a tree of tensors [world_size, *s]; what the other ranks pass is ignored, None will do.
        src: the rank (in the world) whose tree it is.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it. See [Note: collectives].

    Returns:
        On every rank a new tree of tensors [*s].

    Raises:
        ConfigurationError: a leaf of `src` is no tensor or has another first dimension.
        MismatchError: the same, on the other ranks; or another rank is in another collective.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.scatter(rt, torch.tensor([[1, 2]]))
        tensor([1, 2])
    """
    rt, members = along(rt, axis)
    call = f"scatter(src={src})"
    parcel = take_apart(tree)

    def prepare() -> list[torch.Tensor]:
        members.place_of(src, "src")
        if rt.rank != src:
            return []
        tensors = movable(parcel, rt.world, members, call)
        divisible(parcel, tensors, len(members.ranks), call, exactly=True)
        return tensors

    tensors, problem = attempt(prepare)
    agreement = agree(rt.world, members, call, parcel, problem, same_tree=False)
    outline = _outline(rt.world, members, src, call, parcel, agreement)
    like = [tensor[0] for tensor in _empties(outline, rt.world, members)]
    rows = _chosen(outline, tensors, rt.world, members) if rt.rank == src else None
    results = flat.scatter(like, rows, members.ranks.index(src), members.group)
    return _assemble(outline, parcel, results, rt.world)


def _is_known(parcel: Parcel, agreement: Agreement) -> bool:
    """Whether every rank knows the source's tree. What a leaf is, is in the digests: all ranks decide alike."""
    only_tensors = all(isinstance(leaf, torch.Tensor) for leaf in parcel.leaves)
    return agreement.same_tree and agreement.same_aliases and only_tensors


def _outline(world: World, members: Members, src: int, call: str, parcel: Parcel, agreement: Agreement) -> Outline:
    """What the source's tree is like; it need not be told when all trees are alike and hold tensors only."""
    if _is_known(parcel, agreement):
        return _describe(world, parcel, with_spec=False)
    data, problem = b"", None
    if world.rank == src:
        own = _describe(world, parcel, with_spec=not agreement.same_tree)
        data, problem = attempt(pickled, (own.spec, own.firsts, own.tensors, own.objects))
    received = broadcast_bytes(data or b"", members.ranks.index(src), members.group, words_device(world, members))
    fields: Any = None
    if received:
        fields, problem = attempt(_unpickled, received)
    agree(world, members, f"{call}, reading the tree of rank {src}", take_apart(()), problem)
    return Outline(spec=fields[0], firsts=fields[1], tensors=fields[2], objects=fields[3])


def _describe(world: World, parcel: Parcel, *, with_spec: bool) -> Outline:
    tensors: dict[int, tuple[torch.dtype, tuple[int, ...], str | None]] = {}
    objects: dict[int, Any] = {}
    for place, leaf in enumerate(parcel.leaves):
        if isinstance(leaf, torch.Tensor):
            kind = leaf.device.type
            tensors[place] = (leaf.dtype, tuple(leaf.shape), None if kind == world.device.type else kind)
        else:
            objects[place] = leaf
    return Outline(spec=parcel.spec if with_spec else None, firsts=parcel.firsts, tensors=tensors, objects=objects)


def _unpickled(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:  # whatever a class raises, or its module is not here
        raise ConfigurationError(f"this rank cannot read the objects that were sent: {error}") from error


def _empties(outline: Outline, world: World, members: Members) -> list[torch.Tensor]:
    """What the source's tensors are written into, where the group can carry them."""
    empties: list[torch.Tensor] = []
    for place, (dtype, shape, kind) in outline.tensors.items():
        if outline.firsts[place] == place:
            device = world.device if kind is None else torch.device(kind)
            empties.append(torch.empty(shape, dtype=dtype, device=device_for(device, world, members.group)))
    return empties


def _chosen(outline: Outline, tensors: list[torch.Tensor], world: World, members: Members) -> list[torch.Tensor]:
    by_place = dict(zip(outline.tensors, tensors, strict=True))
    return [
        tensor.to(device_for(tensor.device, world, members.group))
        for place, tensor in by_place.items()
        if outline.firsts[place] == place
    ]


def _assemble(outline: Outline, parcel: Parcel, results: list[torch.Tensor], world: World) -> Tree:
    travelled = iter(results)
    leaves = dict(outline.objects)
    for place, (_, _, kind) in outline.tensors.items():
        first = outline.firsts[place]
        if first == place:
            leaves[place] = next(travelled).to(world.device if kind is None else torch.device(kind))
        else:
            leaves[place] = leaves[first]
    spec = parcel.spec if outline.spec is None else outline.spec
    return tree_unflatten(spec, [leaves[place] for place in sorted(leaves)])
