"""One step of any optimizer: pure, or in place with `donate=True`."""

from collections.abc import Callable, Mapping, Sequence
from itertools import compress, repeat
from typing import Any, TypeVar

from torch import Tensor

from fabricfn.errors import ConfigurationError, ModelError
from fabricfn.leases import NOWHERE, Place, bump, caller, unbind
from fabricfn.optimizers.fused import in_place
from fabricfn.optimizers.kernels import clones
from fabricfn.optimizers.layout import joined, mappings, parts, values_of
from fabricfn.optimizers.overrides import overridden
from fabricfn.optimizers.shards import parts_of_grads, parts_of_params
from fabricfn.optimizers.skipping import judge
from fabricfn.records import Grads, Model, check_fit, handed_on, renewed
from fabricfn.runtimes import Runtime
from fabricfn.sharding import with_locals
from fabricfn.states import Optimizer, Plan, exposed_after, overlap
from fabricfn.watching import collective

M = TypeVar("M")
Closure = Callable[[Any], tuple[Any, Any]]


@collective("optimizer_step")
def optimizer_step(
    rt: Runtime,
    models: M,
    opt: Optimizer,
    grads: Any = None,
    *,
    closure: Closure | None = None,
    donate: bool = False,
    **overrides: Any,
) -> tuple[M, Optimizer]:
    """One step of the optimizer.

    Pure by default: models, opt and grads stay as they are, down to the bits. With `donate=True` the tensors are
    updated in place and the inputs are given away; the results have the same bits. A parameter whose gradient is None
    is left out, as in torch. Every rank calls it and computes the same values or, of DTensors, its own parts; ranks
    that share the optimizer's state (`ddp(shard_optimizer=True)`) send each other what each has computed.

    Under a precision with a loss scale ("16-mixed"), a step whose gradients are not all finite is left out, on all
    ranks alike: parameters, state and buffers keep their bits, `opt.step` counts the call, and `model.loss_scale` goes
    on (see `LossScale`). Donated inputs are given away all the same.

    Args:
        models: one Model or the tree of Models that `setup_optimizer` was given.
        opt: its state.
        grads: what `value_and_grad` returned for them.
        closure: instead of grads, `models -> (loss, grads)`; for optimizers that evaluate the loss several times
            (LBFGS). What it is given are models of their own, fit to be differentiated.
        donate: update in place. Using models, opt or grads again raises `DonatedError`, and so does using any record
            that shares their tensors.
        **overrides: hyperparameters for this step alone (`lr=1e-4`); a list has one value per group.

    Returns:
        (models, opt): the new values, with the buffers that the forward pass changed, in the structure of the inputs;
        `opt.step` is one higher.

    Raises:
        DonatedError: some input was given away, or shares tensors with one that was.
        GradientError: gradients of another model, or placed otherwise than its parameters; gradients that are still not
            finite at the smallest loss scale.
        CapabilityError: closure under a precision with a loss scale.
        ConfigurationError: an unknown hyperparameter; another tree of models than the optimizer's; grads and closure.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.5)
        >>> loss, grads = ff.value_and_grad(rt, lambda net, x: net(x).sum())(model, torch.ones(1, 2))
        >>> after, opt = ff.optimizer_step(rt, model, opt, grads)
        >>> torch.equal(after.params["weight"], model.params["weight"] - 0.5), opt.step
        (True, 1)
    """
    if type(opt) is not Optimizer:
        raise ConfigurationError(
            f"the third argument must be the Optimizer, found {type(opt).__name__}. Write"
            " optimizer_step(rt, models, opt, grads)."
        )
    plan = opt.plan
    if opt.lease.spent is not None or opt.lease.values is not None:
        opt.lease.check("Optimizer")
    if (grads is None) == (closure is None):
        raise ConfigurationError(
            "optimizer_step takes either grads or closure=; it got "
            + ("neither" if grads is None else "both")
            + ". Write optimizer_step(rt, models, opt, grads)."
        )
    given = parts(plan, models, Model)
    params = _params(plan, given)
    found: list[Grads] = [] if closure is not None else parts(plan, grads, Grads)
    gradients = _gradients(plan, given, found)
    hyperparams = overridden(opt, overrides) if overrides else opt.hyperparams
    verdict = None if rt.precision.loss_scale is None else judge(rt, given, found, gradients, plan.name)
    advance = plan.advance if verdict is None else verdict.advance(plan)
    whole = params
    if plan.parted:
        params, gradients = parts_of_params(plan, params), parts_of_grads(plan, gradients) if found else []
    if not donate:
        params = _copied(plan, params)
    else:
        _refuse_shared(plan, given, params)
    trial = None if closure is None else _Trial(plan, given, params, closure)
    where = caller() if donate else NOWHERE
    try:
        store, shared, hyperparams = advance(
            opt, params, gradients, hyperparams, donate, None if trial is None else trial.evaluate
        )
    except BaseException:
        if donate:  # half of the tensors may be changed
            _spend(plan, given, whole, opt, found, where)
        raise
    buffers = trial.buffers if trial is not None else [one.new_buffers for one in found]
    buffers = buffers if verdict is None else verdict.kept(given, buffers)
    if donate:
        touched = _touched(plan, whole)
        made = [handed_on(*three) for three in zip(given, buffers, repeat(where), touched, strict=False)]
        for model in made:
            model.lease.apart = True
    else:
        if plan.parted:
            params = with_locals(whole, params)
        renew = zip(given, mappings(plan, params), buffers, strict=True)
        made = [renewed(model, values, new) for model, values, new in renew]
    if verdict is not None:
        made = verdict.rescaled(made)
    rt.strategy.settle()
    after = Optimizer(store=store, shared=shared, hyperparams=tuple(hyperparams), step=opt.step + 1, plan=plan)
    if donate:
        _give_away(opt, found, where, after)
    return joined(plan, made), after


def _params(plan: Plan, models: Sequence[Model]) -> list[Tensor]:
    """The parameters by position; refuses models whose values were given away."""
    out: list[Tensor] = []
    for model, names in zip(models, plan.names, strict=True):
        lease = model.lease
        unknown = lease.spent is not None or not lease.frames  # a bound model's values cannot have changed unnoticed
        if unknown:
            lease.check("Model")
        out += values_of(model.params, names, Model)
        if unknown:
            _check_shapes(plan, out, len(out) - len(names), names)
    return out


def _check_shapes(plan: Plan, values: Sequence[Tensor], start: int, names: Sequence[str]) -> None:
    for name, value, shape in zip(names, values[start:], plan.shapes[start:], strict=False):
        if getattr(value, "shape", None) != shape:
            raise ModelError(
                f"{name} is {value!r:.60}; the optimizer was set up for a tensor of shape {tuple(shape)}. Set up an"
                " optimizer for this Model."
            )


def _gradients(plan: Plan, models: Sequence[Model], found: Sequence[Grads]) -> list[Tensor | None]:
    out: list[Tensor | None] = []
    for model, grads, names in zip(models, found, plan.names, strict=False):
        lease = grads.lease
        if lease.spent is not None or lease.values is not None:
            lease.check("Grads")
        check_fit(model, grads)
        out += values_of(grads.params, names, Grads)
    return out


def _copied(plan: Plan, params: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that may be changed in place; the frozen ones are shared, since no optimizer touches them."""
    if plan.moving is None:
        return clones(params)
    return [param.clone() if moves else param for param, moves in zip(params, plan.moving, strict=True)]


def _touched(plan: Plan, params: Sequence[Tensor]) -> list[list[Tensor] | None]:
    """Per model, the tensors that a step may have changed; None is all."""
    if plan.moving is None:
        return [None for _ in plan.names]
    out: list[list[Tensor] | None] = []
    start = 0
    for names in plan.names:
        span = slice(start, start + len(names))
        out.append([param for param, moves in zip(params[span], plan.moving[span], strict=True) if moves])
        start += len(names)
    return out


class _Trial:
    """Evaluates the user's closure at the values that the optimizer tries."""

    def __init__(self, plan: Plan, models: Sequence[Model], params: Sequence[Tensor], closure: Closure) -> None:
        self.plan = plan
        self.models = models
        self.params = params
        self.closure = closure
        self.buffers: list[Mapping[str, Tensor] | None] = [None for _ in models]

    def evaluate(self) -> tuple[Any, list[Tensor | None]]:
        """(loss, gradients by position) at the present values; buffers go from one evaluation to the next."""
        plan = self.plan
        params = _copied(plan, self.params)
        values = mappings(plan, with_locals(plan.likes or (), params) if plan.parted else params)
        trial = [renewed(*three) for three in zip(self.models, values, self.buffers, strict=True)]
        result: Any = self.closure(joined(plan, trial))
        pair: list[Any] = [*result] if type(result) is tuple else []
        if len(pair) != 2:
            raise ConfigurationError(
                f"closure must return (loss, grads); it returned {result!r:.60}. Write"
                " closure=lambda models: grad_fn(models, x, y)."
            )
        loss, grads = pair
        found = parts(plan, grads, Grads)
        gradients = _gradients(plan, trial, found)
        for i, one in enumerate(found):
            if one.new_buffers is not None:
                self.buffers[i] = {**(self.buffers[i] or {}), **one.new_buffers}
        return loss, parts_of_grads(plan, gradients) if plan.parted else gradients


def _refuse_shared(plan: Plan, models: Sequence[Model], params: Sequence[Tensor]) -> None:
    """Raise `ModelError` if two parameters that move have one memory; frozen ones may be shared."""
    if len(models) == 1 and models[0].lease.apart:  # any other record over its memory is found out by the versions
        return
    if len({id(model.lease) for model in models}) < len(models):
        raise ModelError("the same Model stands twice in this tree; with donate=True it would be updated twice.")
    if all(model.lease.apart for model in models):
        return
    moving = repeat(True) if plan.moving is None else plan.moving
    names = (name for names in plan.names for name in names)
    updated = [*compress(zip(names, params, strict=True), moving)]
    shared = overlap([param for _, param in updated])
    if shared is not None:
        raise ModelError(
            f"{updated[shared[0]][0]} and {updated[shared[1]][0]} share memory; with donate=True it would be updated"
            " twice. Copy first: models = ff.tree_map(torch.clone, models)."
        )


def _spend(
    plan: Plan,
    models: Sequence[Model],
    params: Sequence[Tensor],
    opt: Optimizer,
    grads: Sequence[Grads],
    where: Place,
) -> None:
    """Spend everything after a step that failed; no frame may go on with the values, nor records that share them."""
    for model, touched in zip(models, _touched(plan, params), strict=True):
        unbind(handed_on(model, None, where, touched).lease)
    _spend_rest(opt, grads, where)


def _give_away(opt: Optimizer, grads: Sequence[Grads], where: Place, after: Optimizer) -> None:
    """Spend opt and grads. Where other records may hold the state's tensors, let them find out by the versions."""
    _spend_rest(opt, grads, where)
    if opt.lease.values is not None:
        exposed_after(opt.lease.values, after, in_place=in_place(opt, after))


def _spend_rest(opt: Optimizer, grads: Sequence[Grads], where: Place) -> None:
    opt.lease.spend(where)
    for one in grads:
        one.lease.spend(where)
    if opt.lease.values is not None:
        bump([t for t in opt.lease.values.values() if isinstance(t, Tensor)])
