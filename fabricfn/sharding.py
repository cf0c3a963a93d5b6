"""Sharded tensors (torch's DTensor): the part of this rank, and records of parts. Strategies that shard make them.

A DTensor has the global shape and holds this rank's part; functions that work number by number take the parts, which
spares torch's dispatch of each operation (100 us a tensor on CPU). DTensor is not imported here: that costs 0.7 s, and
who has one has imported it.
"""

from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=torch.Tensor | None)

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "_local_tensor")


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
    return type(like)(local, spec, requires_grad=False)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank of its mesh. Every one of these ranks must call it, in the same order."""
    whole: Any = tensor
    return whole.full_tensor() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor. Collective as `full` is."""
    return full(tensor) if is_sharded(tensor) else tensor.clone()


REACHED = "_fabricfn_reached"
"""The attribute of a sharded slot that is called when a gradient has come by another way than its unit's own."""
