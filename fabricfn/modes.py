"""Models from models: other modes, other values."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch

from fabricfn.binding import engine_of
from fabricfn.engine import named_modules
from fabricfn.records import Grads, Model
from fabricfn.tree import tree_flatten, tree_unflatten

M = TypeVar("M")


def map_models(f: Callable[[Model], Model], models: M) -> M:
    """`f` on every Model of a tree."""
    leaves, spec = tree_flatten(models, lambda node: type(node) is Model)
    for leaf in leaves:
        leaf.lease.check("Model")
    return tree_unflatten(spec, [f(leaf) for leaf in leaves])


def eval_mode(models: M) -> M:
    """The same values in evaluation mode: no dropout, and BatchNorm uses its statistics. Not collective.

    Args:
        models: one Model or any tree of them.

    Returns:
        New records in the same tree, which share the tensors; `models` stays in its mode.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Dropout())
        >>> ff.apply(rt, ff.eval_mode(model), torch.ones(3))
        tensor([1., 1., 1.])
    """
    return map_models(lambda model: dataclasses.replace(model, training=frozenset()), models)


def train_mode(models: M) -> M:
    """The same values in training mode: the sub-modules that were in it when the module was set up (all, if none was).

    A part that you froze with `module.part.eval()` before `setup_model` stays in evaluation mode. Not collective.

    Args:
        models: one Model or any tree of them.

    Returns:
        New records in the same tree, which share the tensors; `models` stays in its mode.

    Raises:
        ModelError: a Model that was unpickled has no module behind it.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> ff.train_mode(ff.eval_mode(model)).training == model.training
        True
    """

    def train(model: Model) -> Model:
        engine = engine_of(model)
        everything = frozenset(name for name, _ in named_modules(engine.template))
        return dataclasses.replace(model, training=engine.training or everything)

    return map_models(train, models)


def map_params(f: Callable[..., torch.Tensor], model: Model, *others: Model | Grads) -> Model:
    """`f` on the floating parameters of one or several models of the same shapes: averages, EMA, steps along gradients.

    Other parameters come from the first model, and so do those whose gradient is None; buffers and the loss scale come
    from the last one, since an average of counters is nonsense and the statistics belong to the newest values. Not
    collective, unless `f` is: of sharded models it gets DTensors, whose arithmetic number by number stays on the rank.

    Args:
        f: takes one tensor per model and returns a new tensor of the same shape.
        model, others: models, and gradients, of the same names and shapes, of one engine or of several.

    Returns:
        A new Model on the first model's engine, in its training mode. It can be evaluated and trained.

    Raises:
        DonatedError: one of them was given away.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> zero = ff.map_params(torch.zeros_like, model)
        >>> ema = ff.map_params(lambda a, b: 0.9 * a + 0.1 * b, model, zero)
        >>> torch.equal(ema.params["bias"], 0.9 * model.params["bias"])
        True
    """
    given = (model, *others)
    for one in given:
        one.lease.check(type(one).__name__)

    def mapped(name: str, value: torch.Tensor) -> torch.Tensor:
        rest = [other.params[name] for other in others]
        moves = value.is_floating_point() and all(one is not None for one in rest)
        return f(value, *rest) if moves else value.clone()

    with torch.no_grad():
        params = {name: mapped(name, value) for name, value in model.params.items()}
    last = [one for one in given if isinstance(one, Model)][-1]
    return dataclasses.replace(model, params=params, buffers=last.buffers, loss_scale=last.loss_scale)
