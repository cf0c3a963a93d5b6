"""Averages of models: `ema` and `swa`."""

from typing import TypeVar

import torch

from fabricfn.errors import ConfigurationError, ModelError
from fabricfn.modes import map_params
from fabricfn.records import Model
from fabricfn.tree import tree_flatten, tree_unflatten

M = TypeVar("M")


def ema(average: M, model: M, decay: float) -> M:
    """The exponential moving average: `decay * average + (1 - decay) * model`. Not collective.

    Laws: the floating parameters are averaged; buffers and what is frozen in integers are the newest. The same numbers
    on every strategy; a sharded average stays sharded. Neither argument is changed.

    Args:
        average: one Model or any tree of them; at first a copy of the model, `ff.tree_map(torch.clone, model)`.
        model: the newest values, a tree of the same shape. A donated step may take them afterwards.
        decay: from 0 to 1, as 0.999; a warm-up is `min(0.999, (1 + step) / (10 + step))`.

    Returns:
        A new tree on the engines of `average`, in its training mode. It can be evaluated, saved, trained.

    Raises:
        ConfigurationError: another decay.
        ModelError: the trees or the names of the parameters differ.
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
    return _between(average, model, 1 - decay)


def swa(average: M, model: M, count: int) -> M:
    """The mean of one more model: `average + (model - average) / (count + 1)`, stochastic weight averaging.

    Laws: those of `ema`. Called with count 0, 1, ... n - 1 it gives the mean of n models. Not collective.

    Args:
        average: the mean of the `count` models before, one Model or any tree of them; with 0 any model will do.
        model: the newest values, a tree of the same shape.
        count: of how many models `average` is the mean.

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
    return _between(average, model, 1 / (count + 1))


def _between(average: M, model: M, weight: float) -> M:
    """The part `weight` of the way from `average` to `model`."""
    ours, spec = tree_flatten(average, _is_model)
    theirs, other = tree_flatten(model, _is_model)
    pairs = list(zip(ours, theirs, strict=False))
    alike = all(_is_model(a) and _is_model(b) and a.params.keys() == b.params.keys() for a, b in pairs)
    if spec != other or not alike:
        raise ModelError(
            "an average is a tree of Models with the same parameters as the model's. Begin with"
            f" average = ff.tree_map(torch.clone, model); found {average!r:.200} and {model!r:.200}."
        )

    def towards(mean: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
        return torch.lerp(mean, newest.to(mean.dtype), weight)  # one kernel; of equal values it is that value, exactly

    return tree_unflatten(spec, [map_params(towards, a, b) for a, b in pairs])


def _is_model(node: object) -> bool:
    return type(node) is Model
