"""Steps under a loss scale: one whose gradients are not finite is left out, on all ranks alike.

See [Note: loss scale] in `scaling.py`. This waits for the device: whether there is a step decides what the values are.
In a graph ([Note: traced]) it is computed all the same, and each number taken or left.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fabricfn.errors import CapabilityError
from fabricfn.optimizers.layout import is_tensor
from fabricfn.records import Grads, Model
from fabricfn.runtimes import Runtime
from fabricfn.scaling import LossScale, first_scale, next_scale
from fabricfn.sharding import is_sharded, local_of
from fabricfn.states import Counter, Optimizer, Plan
from fabricfn.tracing import tracing
from fabricfn.tree import tree_flatten, tree_map, tree_unflatten
from fabricfn.world import World

_foreach_norm: Callable[..., Sequence[Tensor]] = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]

SMALL = 1 << 14
"""Numbers of a gradient that is looked at together with others, in a graph."""
Buffers = Mapping[str, Tensor] | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gradients of a step say."""

    finite: bool | Tensor
    """Whether the step is made; in a graph a tensor."""
    scales: Sequence[LossScale]
    """What each model goes on with."""

    def rescaled(self, models: Sequence[Model]) -> list[Model]:
        """The models with their next loss scales."""
        return [dataclasses.replace(model, loss_scale=scale) for model, scale in zip(models, self.scales, strict=True)]

    def advance(self, plan: Plan) -> Callable[..., Any]:
        """What is done in place of the plan's `advance`."""
        if isinstance(self.finite, Tensor):
            return functools.partial(choose, plan, self.finite)
        return plan.advance if self.finite else stay

    def kept(self, models: Sequence[Model], buffers: Sequence[Buffers]) -> list[Buffers]:
        """The buffers that each model goes on with: none of those that belong to a step that is left out."""
        if not isinstance(self.finite, Tensor):
            return [new if self.finite else None for new in buffers]
        return [
            new and {name: torch.where(self.finite, value, model.buffers[name]) for name, value in new.items()}
            for model, new in zip(models, buffers, strict=True)
        ]


def judge(
    rt: Runtime, models: Sequence[Model], found: Sequence[Grads], gradients: Sequence[Tensor | None], name: str
) -> Verdict:
    """Whether the step is to be made, under a precision with a loss scale. Every rank gets the same answer.

    A model goes on from the scale that it had when the gradients were made: several optimizers that share them (one for
    the matrices, one for the rest) change it once.

    Raises:
        CapabilityError: the optimizer makes its gradients itself, by a closure.
        GradientError: the loss scale cannot fall any further.
    """
    settings = rt.precision.loss_scale
    assert settings is not None
    if not found:
        raise CapabilityError(
            f"{name} with closure= evaluates several gradients in one step, of which none can be left out when it is"
            ' not finite: a loss scale needs optimizer_step(rt, models, opt, grads). Write precision="bf16-mixed" or'
            " dataclasses.replace(precision, loss_scale=None) for an optimizer with a closure."
        )
    finite = all_finite(gradients, rt.world.whole)
    scales: list[LossScale] = []
    for model, grads in zip(models, found, strict=True):
        before = grads.loss_scale or model.loss_scale or first_scale(settings)
        assert before is not None
        scales.append(next_scale(before, settings, finite=finite, rank=rt.rank))
    return Verdict(finite=finite, scales=scales)


def all_finite(gradients: Sequence[Tensor | None], world: World) -> bool | Tensor:
    """Whether every number is finite, on all ranks. Collective if and only if some of the gradients are sharded."""
    present = [grad for grad in gradients if grad is not None]
    if present and tracing():
        return _finite_in_graph(present)
    found = finite_here([local_of(grad) for grad in present])
    if world.group is None or not any(map(is_sharded, present)):
        return found  # whole gradients are the same on every rank
    flag = torch.tensor(float(found), device=world.device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=world.group)
    return flag.item() == 1.0


def _finite_in_graph(gradients: Sequence[Tensor]) -> Tensor:
    # a kernel for each small one would cost more than copying them together, and a copy of a large one more than that
    small = [grad.reshape(-1) for grad in gradients if grad.numel() <= SMALL]
    looked_at = [grad for grad in gradients if grad.numel() > SMALL] + ([torch.cat(small)] if small else [])
    return torch.stack([numbers.isfinite().all() for numbers in looked_at]).all()


def finite_here(gradients: Sequence[Tensor]) -> bool:
    """Whether every number of these tensors is finite.

    The norms take a sixth of the time of isfinite of each (80 tensors of 4096 numbers, CPU), and are never finite
    where a number is not; where one is not finite, it may be a sum of squares that was too large.
    """
    values = [
        grad if grad.layout is torch.strided else grad.coalesce().values() if grad.is_sparse else grad.values()
        for grad in gradients
    ]
    if not values:
        return True
    with torch.no_grad():
        norms = _foreach_norm(values, 2)
        if len({(norm.dtype, norm.device) for norm in norms}) > 1:
            norms = [norm.to(norms[0].device, torch.float32) for norm in norms]
        if math.isfinite(torch.stack([*norms]).sum().item()):
            return True
        return all(bool(value.isfinite().all()) for value in values)


def stay(
    opt: Optimizer,
    params: list[Tensor],
    grads: list[Tensor | None],
    hyperparams: Sequence[Mapping[str, Any]],
    donate: bool,
    evaluate: Callable[[], tuple[Any, list[Tensor | None]]] | None,
) -> tuple[Any, Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """In place of a plan's `advance`: nothing moves. Without donation the state gets memory of its own, as ever."""
    if donate:
        return opt.store, opt.shared, opt.hyperparams

    def copy(leaf: Any) -> Any:
        return leaf.detach().clone() if is_tensor(leaf) else leaf

    store, shared = tree_map(copy, (opt.store, dict(opt.shared)))
    return store, shared, opt.hyperparams


def choose(
    plan: Plan, finite: Tensor, opt: Optimizer, params: list[Tensor], *rest: Any
) -> tuple[Any, Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """In place of a plan's `advance` in a graph: everything moves, and stays where the gradients are not finite."""
    leaves, spec = tree_flatten((opt.store, dict(opt.shared)))
    before = [*map(_remembered, (*params, *leaves))]
    store, shared, hyperparams = plan.advance(opt, params, *rest)
    after, after_spec = tree_flatten((store, dict(shared)))
    if after_spec != spec:
        raise CapabilityError(
            f"the first step of {plan.name} makes its state, and a compiled step with a loss scale cannot leave that"
            " out. Make the first step with ff.optimizer_step outside, or write dampening=0."
        )
    chosen = [_chosen(finite, *two) for two in zip((*params, *after), before, strict=True)]
    store, shared = tree_unflatten(spec, chosen[len(params) :])
    return store, shared, hyperparams


def _remembered(leaf: Any) -> tuple[Any, Any, int]:
    """(the leaf, its value, its version)."""
    return (leaf, leaf.clone(), leaf._version) if is_tensor(leaf) else (leaf, leaf, 0)


def _chosen(finite: Tensor, new: Any, before: tuple[Any, Any, int]) -> Any:
    old, value, version = before
    if is_tensor(new):
        if new is old and new._version == version:
            return new
        made = torch.where(finite, new, value)
        return new.copy_(made) if new is old else made
    if type(new) is Counter and new is not old:
        steps = torch.where(finite, new.tensor(), old.tensor())
        counts: Any = new.tensors
        return Counter(0, new.device, (0, dataclasses.replace(counts, first=steps, chosen=True)))
    if new != old:
        raise CapabilityError(
            f"this optimizer keeps {new!r:.40} in its state, which a compiled step with a loss scale cannot leave as"
            " it was. Keep a tensor in place of the number."
        )
    return new
