"""The private part of torch's `fully_shard` that binding needs: everything that a new torch version may move.

[Note: shards] FSDP keeps each parameter as a DTensor and, beside it, the flat and padded data that it gathers from. To
make it look at a record's shard, both are pointed there; nothing is copied unless the shard lacks the padding.
`tests/test_fsdp.py` pins every name that is used here.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate

from fabricfn.errors import CapabilityError, ModelError
from fabricfn.leases import increment_version
from fabricfn.sharding import is_sharded


def check_version() -> None:
    """Raise `CapabilityError` when this torch lacks what the strategy needs."""
    needed = ("reset_iter_state", "set_reduce_scatter_unused_params")
    missing = [name for name in needed if not hasattr(FSDPModule, name)]
    if missing:
        raise CapabilityError(
            f'strategy="fsdp" needs torch 2.13 or newer, this is {torch.__version__} (FSDPModule has no'
            f' {", ".join(missing)}). Update torch, or write strategy="ddp".'
        )


def shard_slots(box: nn.Module) -> dict[int, Any]:
    """FSDP's own record of each parameter, by the id of the sharded Parameter."""
    return {id(one.sharded_param): one for group in _groups(box) for one in group.fsdp_params}


def empty(params: Iterable[Any]) -> None:
    """Take the memory of their own away from shards: `point` lends them that of values before anybody looks."""
    for param in params:
        param._sharded_param_data.untyped_storage().resize_(0)


def gather_ahead(box: Any) -> None:
    """Let the backward pass of a unit compute while the unit before it is being gathered.

    FSDP does so with streams; where there are none, as on CPU, its gathering blocks unless it is told otherwise.
    """
    box._set_unshard_async_op(True)


def _groups(box: nn.Module) -> Iterator[Any]:
    for module in box.modules():
        if isinstance(module, FSDPModule):
            yield from module._get_fsdp_state()._fsdp_param_groups


def point(params: Sequence[Any], values: Sequence[Any], names: Sequence[str]) -> bool:
    """Let FSDP look at the values' shards; whether some had to be copied, since they lack the padding."""
    copied = False
    for param, value, name in zip(params, values, names, strict=True):
        local = part_of(value, name, param._sharding_spec.placements, param.sharded_size)
        data = local
        if local.shape != param.padded_sharded_param_size or not local.is_contiguous():
            copied = True
            dim: int = param.fsdp_placement.dim
            data = local.new_zeros(param.padded_sharded_param_size)
            local = data.narrow(dim, 0, local.shape[dim]).copy_(local)
        param._sharded_param_data = data.view(-1)
        param.sharded_param._local_tensor = local
    return copied


def part_of(value: Any, name: str, placements: Any, size: torch.Size) -> torch.Tensor:
    """The part of a value that this rank holds, without a copy; `ModelError` unless it is cut in this way."""
    if not is_sharded(value):
        raise ModelError(
            f"{name} of this Model is a whole tensor, but here every rank holds a shard of it. Load it with"
            " ff.load(rt, path, like=model), or cut it: torch.distributed.tensor.distribute_tensor(value,"
            " model.params[name].device_mesh, model.params[name].placements)."
        )
    local = cast("torch.Tensor", value._local_tensor)
    if local.shape != size or value.placements != placements:
        raise ModelError(
            f"{name} of this Model is sharded in another way than the module that was set up: {value.placements}"
            f" with {tuple(local.shape)} on this rank, against {placements} with"
            f" {tuple(size)}. Redistribute it: value.redistribute(placements=...)."
        )
    return local


def gathered(param: Any) -> torch.Tensor | None:
    """The whole parameter that forward passes compute with; None before the first one."""
    return getattr(param, "_unsharded_param", None)


def close(params: Sequence[Any]) -> bool:
    """After a run: the backward pass of every graph so far fails from now on, which FSDP itself prevents.

    Returns:
        Whether a gradient came after the unit was done with its own: it is not in the result.
    """
    slots = [param._unsharded_param for param in params if hasattr(param, "_unsharded_param")]
    increment_version(slots)
    return any(slot.grad is not None for slot in slots)


def clear(params: Sequence[Any]) -> None:
    """Drop the gradients of a run that failed."""
    for param in params:
        if param is not None:
            param.unsharded_accumulated_grad = None
            if (slot := gathered(param)) is not None:
                slot.grad = None


def let_go(box: Any) -> None:
    """Drop whatever is gathered, and the traces of a run that was left in the middle."""
    if box._get_fsdp_state()._is_root:  # before the first forward there is nothing, and torch fails
        box.reset_iter_state()


def is_idle(box: Any) -> bool:
    """Whether no run was left in the middle: by an exception, a backward pass through a leaked graph, or a unit that
    was gathered ahead and never ran, which would go stale.
    """
    return all(group._training_state.name == "IDLE" and group._all_gather_result is None for group in _groups(box))


def went_back(box: Any) -> bool:
    """Inside the forward of the box: whether a backward pass ran meanwhile, after which nothing is gathered."""
    return box._get_fsdp_state()._training_state.name != "FORWARD"


def widen(params: Sequence[Any], mesh: Any) -> None:
    """Describe what FSDP cut over the data axis alone as lying on the whole mesh, the same along its other axis.

    What tensor parallelism cut before is described so already.
    """
    for param in params:
        if param is not None and not param.is_dtensor:
            old = param._sharding_spec
            spec = type(old)(mesh, (*old.placements, Replicate()), tensor_meta=old.tensor_meta)
            param._sharding_spec = param.sharded_param._spec = spec
