"""Averages of models: `ema` and `swa`."""

import dataclasses
from typing import Any, TypeVar

import torch

from fabricfn.errors import ConfigurationError, ModelError
from fabricfn.leases import NOWHERE, Place, caller
from fabricfn.records import Model, handed_on
from fabricfn.sharding import any_sharded, is_sharded, local_of, same_placement, with_locals
from fabricfn.states import overlap
from fabricfn.tree import tree_flatten, tree_unflatten

M = TypeVar("M")

_kernels: Any = torch
"""The functions on lists of tensors have no types."""


def ema(average: M, model: M, decay: float, *, donate: bool = False) -> M:
    """The exponential moving average: `decay * average + (1 - decay) * model`. Not collective.

    Laws: the floating parameters are averaged; buffers and what is frozen in integers are the newest. The same numbers
    on every strategy; a sharded average stays sharded. Neither argument is changed, without `donate`.

    Args:
        average: one Model or any tree of them; at first a copy of the model, `ff.tree_map(torch.clone, model)`.
        model: the newest values, a tree of the same shape. A donated step may take them afterwards.
        decay: from 0 to 1, as 0.999; a warm-up is `min(0.999, (1 + step) / (10 + step))`.
        donate: update the average in place, and give it away; using it again raises `DonatedError`. Same bits.

    Returns:
        A new tree on the engines of `average`, in its training mode. It can be evaluated, saved, trained.

    Raises:
        ConfigurationError: another decay.
        ModelError: the trees, the names or the places of the parameters differ; with `donate`, two parameters of the
            average share memory.
        DonatedError: one of the models was given away.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> average = ff.map_params(torch.zeros_like, model)
        >>> average = ff.ema(average, ff.map_params(torch.ones_like, model), 0.75)
        >>> average.params["weight"]
        tensor([[0.2500, 0.2500]])
    """
    if not 0 <= decay <= 1:
        raise ConfigurationError(f"decay={decay!r} must be from 0 to 1: ff.ema(average, model, 0.999).")
    return _between(average, model, 1 - decay, caller() if donate else NOWHERE)


def swa(average: M, model: M, count: int, *, donate: bool = False) -> M:
    """The mean of one more model: `average + (model - average) / (count + 1)`, stochastic weight averaging.

    Laws: those of `ema`. Called with count 0, 1, ... n - 1 it gives the mean of n models. Not collective.

    Args:
        average: the mean of the `count` models before, one Model or any tree of them; with 0 any model will do.
        model: the newest values, a tree of the same shape.
        count: of how many models `average` is the mean.
        donate: as in `ema`.

    Returns:
        As `ema`.

    Raises:
        ConfigurationError: a negative count.
        ModelError, DonatedError: as `ema`.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> mean = model = ff.map_params(torch.zeros_like, ff.setup_model(rt, torch.nn.Linear(2, 1)))
        >>> for count in range(3):
        ...     mean = ff.swa(mean, model, count)
        ...     model = ff.map_params(lambda value: value + 1, model)
        >>> mean.params["weight"]
        tensor([[1., 1.]])
    """
    if count < 0:
        raise ConfigurationError(f"count={count!r} is how many models the average has already: 0, 1, 2, ...")
    return _between(average, model, 1 / (count + 1), caller() if donate else NOWHERE)


def _between(average: M, model: M, weight: float, where: Place) -> M:
    """The part `weight` of the way from `average` to `model`; in place, unless `where` is nowhere."""
    ours, spec = tree_flatten(average, _is_model)
    theirs, other = tree_flatten(model, _is_model)
    pairs = list(zip(ours, theirs, strict=False))
    alike = all(_is_model(a) and _is_model(b) and a.params.keys() == b.params.keys() for a, b in pairs)
    if spec != other or not alike:
        raise ModelError(
            "an average is a tree of Models with the same parameters as the model's. Begin with"
            f" average = ff.tree_map(torch.clone, model); found {average!r:.200} and {model!r:.200}."
        )
    with torch.no_grad():
        return tree_unflatten(spec, [_towards(a, b, weight, where) for a, b in pairs])


def _is_model(node: object) -> bool:
    return type(node) is Model


def _towards(mean: Model, newest: Model, weight: float, where: Place) -> Model:
    """One model on its way to another; of equal numbers each is that number, exactly."""
    for one in (mean, newest):
        one.lease.check("Model")
    names = [name for name, value in mean.params.items() if value.is_floating_point() or value.is_complex()]
    old, new = ([one.params[name] for name in names] for one in (mean, newest))
    parts, targets, sharded = old, new, any_sharded(old) or any_sharded(new)
    if sharded:
        _check_places(names, old, new)
        parts, targets = ([*map(local_of, values)] for values in (old, new))
    targets = [new if new.dtype is old.dtype else new.to(old.dtype) for new, old in zip(targets, parts, strict=True)]
    rest = mean.params.keys() - names
    if where is NOWHERE:
        made = _kernels._foreach_lerp(parts, targets, weight)
        moved = dict(zip(names, with_locals(old, made) if sharded else made, strict=True))
        params = {**mean.params, **moved, **{name: newest.params[name].clone() for name in rest}}
        return dataclasses.replace(mean, params=params, buffers=newest.buffers, loss_scale=newest.loss_scale)
    if not mean.lease.apart and overlap(parts) is not None:
        raise ModelError("two parameters of the average share memory. Copy first: ff.tree_map(torch.clone, average).")
    _kernels._foreach_lerp_(parts, targets, weight)
    for name in rest:
        mean.params[name].copy_(newest.params[name])
    after = handed_on(mean, None, where)
    after.lease.apart = True
    return dataclasses.replace(after, buffers=newest.buffers, loss_scale=newest.loss_scale)


def _check_places(names: list[str], old: list[torch.Tensor], new: list[torch.Tensor]) -> None:
    for name, one, other in zip(names, old, new, strict=True):
        if is_sharded(one) is not is_sharded(other) or (is_sharded(one) and not same_placement(one, other)):
            raise ModelError(
                f"{name} lies otherwise on the ranks in the average than in the model. Begin with average ="
                " ff.tree_map(torch.clone, model)."
            )
