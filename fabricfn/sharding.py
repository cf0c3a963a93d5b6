"""Sharded tensors (torch's DTensor): the part of this rank, and records of parts. Strategies that shard make them.

A DTensor has the global shape and holds this rank's part; functions that work number by number take the parts, which
spares torch's dispatch of each operation (100 us a tensor on CPU). DTensor is not imported here: that costs 0.7 s, and
who has one has imported it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T", bound=torch.Tensor | None)

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "_local_tensor")


def any_sharded(tensors: Iterable[Any]) -> bool:
    """Whether some of them are DTensors; 30 ns a plain tensor."""
    return not _PLAIN.issuperset(map(type, tensors)) and any(map(is_sharded, tensors))


def local_of(tensor: T) -> T:
    """The part of this rank, which shares the DTensor's memory and may be empty; any other tensor is itself."""
    return tensor if type(tensor) in _PLAIN else getattr(tensor, "_local_tensor", tensor)


def with_local(like: Any, local: torch.Tensor) -> torch.Tensor:
    """A DTensor of the global shape and placement of `like`, whose part of this rank is `local`, without a copy.

    `local` has the shape of `like`'s part; its dtype may differ. Where `like` is no DTensor, it is `local` itself.
    """
    if not is_sharded(like):
        return local
    spec = like._spec
    if local.dtype is not like.dtype:
        meta = spec.tensor_meta
        spec = type(spec)(spec.mesh, spec.placements, tensor_meta=type(meta)(meta.shape, meta.stride, local.dtype))
    # `__init__` does nothing, and imports torch's compiler for it (0.5 s)
    kind = cast("Any", type(like))
    return kind.__new__(kind, local, spec, requires_grad=False)


def with_locals(likes: Sequence[Any], locals_: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`with_local` of each pair."""
    return [with_local(like, local) for like, local in zip(likes, locals_, strict=True)]


def hollow(tensor: Any) -> Any:
    """A DTensor of the same shape, placement and dtype without memory, to be the `like` of others."""
    return with_local(tensor, tensor._local_tensor.to("meta"))


def same_placement(one: Any, other: Any) -> bool:
    """Whether two DTensors have one global shape and lie on the same ranks in the same way."""
    a, b = one._spec, other._spec
    return a is b or (one.shape == other.shape and a.placements == b.placements and a.mesh == b.mesh)


def part_for(spec: Any, leaf: Any) -> Any:
    """The part of a DTensor that is placed as `spec` (of a DTensor) says; anything else is itself."""
    if spec is None or not is_sharded(leaf):
        return leaf
    fits = leaf._spec is spec or (leaf._spec.placements == spec.placements and leaf._spec.mesh == spec.mesh)
    return leaf._local_tensor if fits else leaf


def counted_here(tensor: Any, world_size: int) -> bool:
    """Whether this rank is the one that counts its part: of the ranks with the same part, exactly one does.

    Raises:
        ValueError: nobody can tell, since the ranks hold terms of a sum, or some ranks are not in the mesh.
    """
    mesh = tensor._spec.mesh
    if any(placement.is_partial() for placement in tensor._spec.placements):
        raise ValueError(f"placements {tensor._spec.placements}: each rank holds a term of a sum")
    if mesh.size() != world_size:
        raise ValueError(f"a mesh of {mesh.size()} ranks, where there are {world_size}")
    coordinate = mesh.get_coordinate()
    return coordinate is not None and all(
        at == 0 for at, placement in zip(coordinate, tensor._spec.placements, strict=True) if placement.is_replicate()
    )


def sharded_as(like: Any, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal on all ranks, placed as the DTensor `like`. Nothing travels."""
    kind = cast("Any", type(like))
    spec = like._spec
    placed: Any = kind.from_local(whole, spec.mesh, run_check=False).redistribute(placements=spec.placements)
    return placed


def refusal(tree_leaves: Iterable[Any]) -> str | None:
    """Why leaves cannot be sent to other ranks as objects: a rank's part would pose as the part of another."""
    if not any(map(is_sharded, tree_leaves)):
        return None
    return (
        "a DTensor holds this rank's part and cannot travel to other ranks. Gather it: ff.gather_params(rt, model), or"
        " value.full_tensor(), which every rank must call"
    )


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank of its mesh. Every one of these ranks must call it, in the same order."""
    whole: Any = tensor
    return whole.full_tensor() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor. Collective as `full` is."""
    return full(tensor) if is_sharded(tensor) else tensor.clone()


REACHED = "_fabricfn_reached"
"""The attribute of a sharded slot that is called when a gradient has come by another way than its unit's own."""
