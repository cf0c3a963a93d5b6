"""Clipping gradients, by norm or by value, without waiting for the device."""

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from fabricfn import flat
from fabricfn.errors import ConfigurationError, GradientError
from fabricfn.leases import Lease, bump, caller
from fabricfn.records import Grads, watching
from fabricfn.runtimes import Runtime
from fabricfn.sharding import any_sharded, counted_here, is_sharded, local_of, with_locals
from fabricfn.states import overlap
from fabricfn.tracing import tracing
from fabricfn.tree import tree_flatten, tree_unflatten
from fabricfn.watching import collective
from fabricfn.world import World

G = TypeVar("G")

_kernels: Any = torch
"""The functions on lists of tensors have no types."""


@collective("clip_gradients", sharded=True)
def clip_gradients(
    rt: Runtime,
    grads: G,
    *,
    max_norm: float | None = None,
    norm_type: float | str = 2.0,
    clip_val: float | None = None,
    error_if_nonfinite: bool = False,
    donate: bool = False,
) -> tuple[G, torch.Tensor]:
    """Limit gradients: all together to a norm, or each number to an interval.

    With `max_norm`, everything is multiplied by `max_norm / (total_norm + 1e-6)` where that is below 1, as
    `torch.nn.utils.clip_grad_norm_` does; one norm over all the models of a tree. With `clip_val`, each number is put
    into [-clip_val, clip_val].

    Where gradients are sharded (DTensors, under fsdp), every rank must call it: the norm is that of the whole
    gradients, each number counted once, by one all-gather of one number a rank for all tensors and meshes together
    (with `clip_val`, too). Not collective under strategies that keep whole gradients on every rank.

    Args:
        grads: one `Grads` or any pytree of them. Entries that are None stay None.
        max_norm: the largest norm; give either this or `clip_val`.
        norm_type: any p > 0, or "inf".
        clip_val: the largest absolute value of a number.
        error_if_nonfinite: look whether the norm is finite; this waits for the device.
        donate: scale in place and give the gradients away; using them again raises `DonatedError`. Same bits.

    Returns:
        (clipped, total_norm): the norm before clipping (with `clip_val`: the 2-norm, unless `norm_type` says
        otherwise), a 0-dim tensor on the device of the gradients, the same on every rank.

    Raises:
        ConfigurationError: both or neither of `max_norm` and `clip_val`, or a negative limit.
        GradientError: a sparse gradient; the norm is not finite, and `error_if_nonfinite` (then every rank raises).
            Names the parameters.
        DonatedError: the gradients were given away.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(4, 1))
        >>> loss, grads = ff.value_and_grad(rt, lambda net, x: net(x).sum())(model, torch.ones(3, 4))
        >>> grads, norm = ff.clip_gradients(rt, grads, max_norm=1.0)
        >>> round(norm.item(), 3)
        6.708
    """
    if (max_norm is None) == (clip_val is None):
        raise ConfigurationError(
            f"clip_gradients takes one limit, either max_norm or clip_val; it got {max_norm=}, {clip_val=}. Write"
            " clip_gradients(rt, grads, max_norm=1.0)."
        )
    limit = max_norm if clip_val is None else clip_val
    if limit is None or not limit >= 0:
        raise ConfigurationError(f"a limit for clipping is a number >= 0; it is {limit}")
    records: list[Grads]
    records, spec = ([grads], None) if type(grads) is Grads else tree_flatten(grads, _is_grads)
    strangers = {type(record).__name__ for record in records if type(record) is not Grads}
    if strangers:
        raise ConfigurationError(
            f"clip_gradients takes Grads, or a pytree of them; it found {', '.join(sorted(strangers))}. Write"
            " grads, norm = clip_gradients(rt, grads, max_norm=1.0)."
        )
    for record in records:
        lease = record.lease
        if lease.spent is not None or lease.values is not None:
            lease.check("Grads")
    tensors: list[torch.Tensor] = [g for record in records for g in record.params.values() if g is not None]
    order = _order(norm_type)
    whole = tensors if any_sharded(tensors) else None
    with torch.no_grad():
        if whole is None:
            total_norm = _total_norm(records, tensors, order, rt.device)
        else:
            total_norm = _sharded_norm(records, order, rt.world.whole)
            tensors = [local_of(tensor) for tensor in tensors]
        if error_if_nonfinite and not torch.isfinite(total_norm):
            raise GradientError(_blame(records, total_norm, rt.global_rank))
        # a sum's two gradients may be views of one memory; a graph decides by itself what is in place
        in_place = donate and not tracing() and overlap(tensors) is None
        clipped = _clip(tensors, total_norm, max_norm, clip_val, in_place, rt.precision.loss_scale is not None)
        if whole is not None:
            clipped = with_locals(whole, clipped)
            if in_place:
                bump(whole)
    out = _given_away(records) if in_place else _replaced(records, clipped)
    if donate:
        where = caller()
        for record in records:
            record.lease.spend(where)
    made: Any = out[0] if spec is None else tree_unflatten(spec, out)
    return made, total_norm


def _is_grads(node: Any) -> bool:
    return type(node) is Grads


def _order(norm_type: float | str) -> float:
    try:
        order = float(norm_type)
    except (TypeError, ValueError):
        order = math.nan
    if not order > 0:
        raise ConfigurationError(f'norm_type is a number > 0 or "inf"; it is {norm_type!r}')
    return order


def _total_norm(
    records: Sequence[Grads], tensors: Sequence[torch.Tensor], order: float, device: torch.device
) -> torch.Tensor:
    """The norm of all numbers together, as `torch.nn.utils.get_total_norm` computes it."""
    if not tensors:
        return torch.zeros((), device=device)
    try:
        norms: list[torch.Tensor] = [*_kernels._foreach_norm(tensors, order)]
    except (RuntimeError, TypeError):
        _refuse_sparse(records)
        raise
    first = norms[0].device
    if any(norm.device != first for norm in norms):
        norms = [norm.to(first) for norm in norms]
    total: torch.Tensor = _kernels.linalg.vector_norm(torch.stack(norms), order)
    return total


def _sharded_norm(records: Sequence[Grads], order: float, world: World) -> torch.Tensor:
    """The norm of all numbers together, where some tensors are DTensors. Every rank must call it.

    Each number is counted by one rank: of a DTensor by the first of those that hold the same part, of a plain tensor
    by rank 0. The ranks gather one norm each, and each takes the norm of these, so all have the same bits.
    """
    counted: list[torch.Tensor] = []
    dtype = torch.bool
    for name, grad in (item for record in records for item in record.params.items()):
        if grad is None:
            continue
        try:
            ours = counted_here(grad, world.world_size) if is_sharded(grad) else world.rank == 0
        except ValueError as error:
            raise GradientError(
                f"the gradient of {name} has {error}. Give it a place on every rank: grad.redistribute(...)."
            ) from None
        dtype = torch.promote_types(dtype, grad.dtype)
        if ours and local_of(grad).numel():  # there is no largest number of an empty part
            counted.append(local_of(grad))
    own = _total_norm(records, counted, order, world.device).to(world.device, dtype)
    (norms,) = flat.all_gather([own], world.group)
    total: torch.Tensor = _kernels.linalg.vector_norm(norms, order)
    return total


def _refuse_sparse(records: Sequence[Grads]) -> None:
    for name, grad in (item for record in records for item in record.params.items()):
        if grad is not None and grad.layout is not torch.strided:
            raise GradientError(
                f"the gradient of {name} is {grad.layout}; clip_gradients takes dense ones. Set the layer up with"
                " sparse=False, or write ff.tree_map(lambda g: g.to_dense() if g.is_sparse else g, grads)."
            )


def _clip(
    tensors: Sequence[torch.Tensor],
    total_norm: torch.Tensor,
    max_norm: float | None,
    clip_val: float | None,
    in_place: bool,
    mark: bool,
) -> Sequence[torch.Tensor]:
    """With `mark`, what is infinite becomes NaN and not `clip_val`: a loss scale must see it and leave the step out."""
    if not tensors:
        return ()
    if max_norm is not None:
        factor = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
        if any(tensor.device != factor.device for tensor in tensors):
            made = [tensor * factor.to(tensor.device) for tensor in tensors]
            return _written(tensors, made) if in_place else made
        if in_place:
            _kernels._foreach_mul_(tensors, factor)
            return tensors
        return _kernels._foreach_mul(tensors, factor)
    assert clip_val is not None
    zeros = _kernels._foreach_mul(tensors, 0.0) if mark else ()
    made = tensors
    if in_place:
        _kernels._foreach_clamp_max_(tensors, clip_val)
    else:
        made = _kernels._foreach_clamp_max(tensors, clip_val)
    _kernels._foreach_clamp_min_(made, -clip_val)
    if mark:
        _kernels._foreach_add_(made, zeros)
    return made


def _written(tensors: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    for tensor, new in zip(tensors, made, strict=True):
        tensor.copy_(new)
    return tensors


def _replaced(records: Sequence[Grads], clipped: Sequence[torch.Tensor]) -> list[Grads]:
    tensors = iter(clipped)
    out: list[Grads] = []
    for record in records:
        params = {name: None if old is None else next(tensors) for name, old in record.params.items()}
        made = Grads(
            params=MappingProxyType(params),
            new_buffers=record.new_buffers,
            ref=record.ref,
            loss_scale=record.loss_scale,
        )
        out.append(made)
    return out


def _given_away(records: Sequence[Grads]) -> list[Grads]:
    out: list[Grads] = []
    for record in records:
        lease = Lease() if record.lease.values is None else watching(record.params)
        made = Grads(
            params=record.params,
            new_buffers=record.new_buffers,
            ref=record.ref,
            loss_scale=record.loss_scale,
            lease=lease,
        )
        out.append(made)
    return out


def _blame(records: Sequence[Grads], total_norm: torch.Tensor, rank: int) -> str:
    names: list[Any] = [
        name
        for record in records
        for name, grad in record.params.items()
        if grad is not None and not bool(torch.isfinite(local_of(grad)).all())
    ]
    sharded = any(map(is_sharded, (grad for record in records for grad in record.params.values())))
    nothing = "every number of this rank's parts is" if sharded else "every number is, their norm is not"
    found = f"in {', '.join(names[:8])}{', ...' if names[8:] else ''}" if names else nothing
    return (
        f"the gradients are not finite on rank {rank}: their norm is {total_norm.item()} ({found}). Leave the step out,"
        " lower the learning rate, or look for the first NaN with torch.autograd.detect_anomaly()."
    )
