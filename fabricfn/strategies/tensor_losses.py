"""Losses of tensors that are cut over tensor-parallel peers: rules of ours, where torch's are wrong or gather too much.

[Note: losses of parts] torch (2.13) runs an operation that it has no rule for on the parts, if its decomposition allows
that. A loss with reduction="mean" then divides by the size of the part: the gradient of `F.mse_loss` of a DTensor on
two ranks is twice too large, without an error. So these operations get whole tensors here. `log_softmax` and
`nll_loss`, of which cross entropy is made, work on parts of the classes, and a few numbers a row travel. (torch's own
`loss_parallel` leaves the derivative of `log_softmax` out: wrong for whatever is no plain cross entropy.)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from fabricfn.sharding import is_sharded, with_local
from fabricfn.tree import tree_map

_aten: Any = torch.ops.aten
_functions: Any = torch
"""Some of its functions have no types."""


def whole_of(tensor: Any) -> Any:
    """The whole tensor, without a gradient; anything else is whole already."""
    if not is_sharded(tensor):
        return tensor
    local: Any = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)._local_tensor
    return local.wait() if hasattr(local, "wait") else local


def everywhere(tree: Any, mesh: Any) -> Any:
    """Whole plain tensors as DTensors that every peer holds."""

    def place(leaf: Any) -> Any:
        plain = isinstance(leaf, torch.Tensor)
        return DTensor.from_local(leaf, mesh, [Replicate()] * mesh.ndim, run_check=False) if plain else leaf

    return tree_map(place, tree)


def on_whole(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on whole tensors; plain ones are whole already. Its results are plain: whole on every peer."""
    return operation(*map(whole_of, args), **{name: whole_of(arg) for name, arg in kwargs.items()})


def on_whole_everywhere(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same with DTensors for results, as the gradient of a DTensor must be one."""
    mesh = next(arg.device_mesh for arg in (*args, *kwargs.values()) if is_sharded(arg))
    return everywhere(on_whole(operation, args, kwargs), mesh)


def is_cut(tensor: Any, dim: int) -> bool:
    """Whether it is cut into equal parts along this dimension, and no other way."""
    mesh = tensor.device_mesh
    return mesh.ndim == 1 and tensor.placements[0] == Shard(dim) and tensor.shape[dim] % mesh.size() == 0


def log_softmax(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`log_softmax(x, dim, half_to_float)`."""
    x, dim, to_float = args[0], args[1] % max(1, args[0].dim()), args[2]
    if not is_cut(x, dim):
        return on_whole_everywhere(operation, args, kwargs)
    part, group = x._local_tensor.float() if to_float else x._local_tensor, x.device_mesh.get_group()
    top = part.amax(dim, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    part = part - top
    total = part.exp().sum(dim, keepdim=True)
    dist.all_reduce(total, group=group)
    return with_local(x, part - total.log())


def log_softmax_backward(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`log_softmax_backward_data(grad, output, dim, dtype)`."""
    grad, output, dim, dtype = args
    if not is_sharded(output) or not is_cut(output, dim % max(1, output.dim())):
        return on_whole_everywhere(operation, args, kwargs)
    part = (grad if is_sharded(grad) else everywhere(grad, output.device_mesh)).redistribute(
        placements=output.placements
    )
    total = part._local_tensor.sum(dim, keepdim=True)
    dist.all_reduce(total, group=output.device_mesh.get_group())
    return with_local(output, (part._local_tensor - output._local_tensor.exp() * total).to(dtype))


def classes(x: Any, target: Any, weight: Any, ignored: int) -> tuple[int, Any, Any, Any]:
    """The dimension of the classes, each target's place among those of this rank, whether it is one, its weight."""
    dim = 0 if x.dim() == 1 else 1
    target, size = whole_of(target), x._local_tensor.size(dim)
    counts = target != ignored
    known = ((target >= 0) & (target < x.shape[dim])) | ~counts
    _functions._assert_async(known.all(), f"a target is out of bounds, there are {x.shape[dim]} classes")
    place = target - x.device_mesh.get_local_rank() * size
    mine = (place >= 0) & (place < size) & counts
    weights = counts.to(x.dtype)
    if weight is not None:
        weights = weights * whole_of(weight)[torch.where(counts, target, 0)]
    return dim, torch.where(mine, place, 0).unsqueeze(dim), mine, weights


def nll_loss(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`nll_loss_forward(x, target, weight, reduction, ignored)` -> (the loss, the sum of weights)."""
    x, target, weight, reduction, ignored = args
    if not is_sharded(x) or not is_cut(x, 0 if x.dim() == 1 else 1):
        return on_whole(operation, args, kwargs)
    dim, place, mine, weights = classes(x, target, weight, ignored)
    found = torch.where(mine, x._local_tensor.gather(dim, place).squeeze(dim), 0)
    dist.all_reduce(found, group=x.device_mesh.get_group())
    losses, total = -found * weights, weights.sum()
    if reduction:
        losses = losses.sum() / (total if reduction == 1 else 1)
    return losses, total


def nll_loss_backward(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`nll_loss_backward(grad, x, target, weight, reduction, ignored, total)`."""
    grad, x, target, weight, reduction, ignored, total = args
    if not is_sharded(x) or not is_cut(x, 0 if x.dim() == 1 else 1):
        return on_whole_everywhere(operation, args, kwargs)
    dim, place, mine, weights = classes(x, target, weight, ignored)
    share = whole_of(grad) * weights / (whole_of(total) if reduction == 1 else 1)
    grads = torch.zeros_like(x._local_tensor)
    return with_local(x, grads.scatter_(dim, place, torch.where(mine, -share, 0).unsqueeze(dim)))


_WHOLE = (
    *("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss"),
    *("multi_margin_loss", "multilabel_margin_loss_forward", "multilabel_margin_loss"),
)
RULES: dict[Any, Any] = {
    **{
        getattr(_aten, f"{name}{end}").default: rule
        for name in _WHOLE
        for end, rule in (("", on_whole), ("_backward", on_whole_everywhere))
        if hasattr(_aten, f"{name}{end}")
    },
    _aten._log_softmax.default: log_softmax,
    _aten._log_softmax_backward_data.default: log_softmax_backward,
    _aten.nll_loss_forward.default: nll_loss,
    _aten.nll_loss2d_forward.default: nll_loss,
    _aten.nll_loss_backward.default: nll_loss_backward,
    _aten.nll_loss2d_backward.default: nll_loss_backward,
}
"""operation -> what is done instead, where one of its tensors is cut."""
