"""Random numbers for tensors that are cut over tensor-parallel peers.

[Note: numbers of parts] Peers draw from equal generators. If each drew for its part alone, all parts would get the same
numbers (on CPU torch does that). So every peer draws those of the whole tensor and takes its part: the bits are those
of one process, at the price of memory for the whole while it is drawn.
"""

from typing import Any

import torch

from fabricfn.sharding import local_of, sharded_as, with_local
from fabricfn.strategies.tensor_losses import on_whole_everywhere

_aten: Any = torch.ops.aten


def part_of(like: Any, whole: torch.Tensor) -> torch.Tensor:
    """The part of this rank of a whole tensor."""
    return local_of(sharded_as(like, whole))


def empty(like: Any) -> torch.Tensor:
    """Memory for the whole of a tensor that is cut."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like._local_tensor.device)


def fill(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that fills its first argument with random numbers."""
    x: Any = args[0]
    x._local_tensor.copy_(part_of(x, operation(empty(x), *args[1:], **kwargs)))
    return x


def make(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that makes random numbers in the shape of its first argument."""
    return with_local(args[0], part_of(args[0], operation(empty(args[0]), *args[1:], **kwargs)))


def dropout(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`native_dropout(x, p, train)` -> (what is left, the mask)."""
    x: Any = args[0]
    scales, mask = operation(empty(x).fill_(1), *args[1:], **kwargs)
    return with_local(x, x._local_tensor * part_of(x, scales)), with_local(x, part_of(x, mask))


RULES: dict[Any, Any] = {
    **dict.fromkeys((_aten.bernoulli_.float, _aten.normal_.default, _aten.uniform_.default), fill),
    _aten.exponential_.default: fill,
    **dict.fromkeys((_aten.rand_like.default, _aten.randn_like.default), make),
    **dict.fromkeys((_aten.randint_like.default, _aten.randint_like.low_dtype), make),
    _aten.native_dropout.default: dropout,
    _aten.bernoulli.default: on_whole_everywhere,
}
"""operation -> what is done instead, where its tensor is cut."""
