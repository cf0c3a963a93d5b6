"""What a loss function returns: checked, detached, summed over micro-batches, turned into a mean over ranks."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from fabricfn.errors import GradientError
from fabricfn.flat import all_reduce
from fabricfn.tracing import refuse_later, times, tracing
from fabricfn.tree import tree_map
from fabricfn.world import World

Buffers = Literal["rank0", "mean", "local"]
Reduce = Literal["mean", "canonical"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What `value_and_grad` and its siblings were asked for."""

    loss_fn: Callable[..., Any]
    has_aux: bool
    weighted: bool
    allow_unused: bool = False
    buffers: Buffers = "rank0"


@dataclasses.dataclass(slots=True)
class Sums:
    """The results of the micro-batches so far."""

    loss: Any = 0
    weight: Any = 0
    count: int = 0
    aux: list[Any] | None = None
    scale: Any = None
    """By what the losses are multiplied before the backward pass; see [Note: loss scale]."""


def collect(job: Job, sums: Sums, result: Any) -> torch.Tensor:
    """Add the result of one call of the loss function to the sums; the loss to be differentiated, with its graph."""
    aux: Any = None
    if job.has_aux:
        result, aux = unpacked(result, "has_aux=True", "(loss, aux)")
        sums.aux = [*(sums.aux or ()), tree_map(detached, aux)]
    if job.weighted:
        result, weight = unpacked(result, "weighted=True", "(loss_sum, weight)")
        if isinstance(weight, torch.Tensor) and weight.requires_grad:
            raise GradientError("the weight of weighted=True is a constant and must not require grad: detach it.")
        sums.weight = sums.weight + weight
    if not isinstance(result, torch.Tensor) or result.dim() != 0:
        if isinstance(result, torch.Tensor):
            found = f"found one of shape {tuple(result.shape)}. Reduce it, for instance with .mean()"
        else:
            found = f"found {type(result).__name__}. Return the loss itself, without .item() or .backward(); for a pair"
            found += " write has_aux=True or weighted=True"
        raise GradientError(f"loss_fn must return a scalar tensor, {found}.")
    if result.is_complex():
        raise GradientError("loss_fn must return a real number, found a complex one. Take .abs() or .real of it.")
    sums.count += 1
    loss = result.detach().clone() if result.is_leaf else result.detach()  # it may be a parameter itself
    sums.loss = loss if sums.count == 1 else sums.loss + loss
    return result if sums.scale is None else times(result, sums.scale)


def detached(leaf: Any) -> Any:
    """A tensor without its graph; anything else as it is."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def unpacked(result: Any, option: str, shape: str) -> tuple[Any, Any]:
    """A pair that the loss function owes."""
    try:
        first, second = result
    except (TypeError, ValueError):
        raise GradientError(f"with {option} loss_fn must return {shape}, found {type(result)!r}.") from None
    return first, second


def finish(job: Job, sums: Sums, world: World) -> tuple[torch.Tensor, Any]:
    """(loss, the factor that the mean over ranks of the summed gradients still lacks, None for 1)."""
    unscale = None if sums.scale is None else 1 / sums.scale
    if not job.weighted:
        return sums.loss if sums.count == 1 else sums.loss / sums.count, unscale
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    both = torch.stack([torch.as_tensor(part, dtype=dtype, device=world.wire) for part in (sums.loss, sums.weight)])
    out = sums.loss.dtype if sums.loss.is_floating_point() else dtype
    if tracing():
        loss, weight = all_reduce([both], world.group, "sum")[0].unbind()
        refuse_later(weight == 0, _weightless)
        factor = world.world_size / weight
        return (loss / weight).to(out), factor if unscale is None else factor * unscale
    if world.group is not None:
        dist.all_reduce(both, group=world.group)
    loss, weight = cast("list[float]", both.tolist())
    if weight == 0:
        raise _weightless()
    return torch.tensor(loss / weight, dtype=out).to(world.device), world.world_size / weight * (unscale or 1)


def _weightless() -> GradientError:
    return GradientError("the weights of all ranks sum to zero, so the weighted mean does not exist.")
