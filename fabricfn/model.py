"""Models: from a module to values, computing with values, and back to a module."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fabricfn.binding import (
    acquire,
    bind_constants,
    call_with_values,
    check_devices,
    engine_of,
    needs_graph,
    release,
    transforming,
    unbound,
)
from fabricfn.building import Compile, buffers_of, build, plain_copy
from fabricfn.engine import named_modules
from fabricfn.precision import autocast_of
from fabricfn.random import Key, seeded
from fabricfn.records import Model, Ref
from fabricfn.runtimes import Runtime
from fabricfn.tree import tree_flatten, tree_unflatten

M = TypeVar("M")


def setup_model(
    rt: Runtime,
    module_or_factory: nn.Module | Callable[[], nn.Module],
    *,
    move_to_device: bool = True,
    donate: bool = False,
    compile: Compile = False,
) -> Model:
    """The values of a module as a `Model`, ready to be trained under the runtime's strategy and precision.

    Every rank must call it, with the same module; all ranks get the values of rank 0. The module itself is copied and
    never changed, unless it is donated.

    Args:
        module_or_factory: a module, or a function without arguments that makes one (then it is made by `init_module`,
            on the device and in the dtype of the runtime).
        move_to_device: False leaves parameters and buffers on the devices where they are.
        donate: take the module over instead of copying it; do not use it afterwards.
        compile: True, or a mapping of options for `torch.compile`. A module that was compiled already is compiled
            again, outside of everything else.

    Returns:
        A Model with the parameters in `rt.precision.param_dtype` (left as they are under a "-mixed" precision) and in
        the training mode in which the module was.

    Raises:
        ModelError: lazy parameters, or parameters on the meta device.
        MismatchError: the ranks hold different modules.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> {name: tuple(value.shape) for name, value in model.params.items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    if not isinstance(module_or_factory, nn.Module):
        module_or_factory, donate = init_module(rt, module_or_factory), True
    engine = build(rt, module_or_factory, move_to_device=move_to_device, donate=donate, compile=compile)
    frame = engine.frames[0]
    slots = dict(zip(frame.names, frame.slots, strict=True))
    signature = tuple((name, str(slot.dtype), tuple(slot.shape)) for name, slot in slots.items())
    model = Model(
        params={name: slot.data for name, slot in slots.items()},
        buffers=buffers_of(frame),
        training=engine.training,
        ref=Ref(engine, signature),
    )
    frame.owner, frame.training = model.lease, engine.training
    model.lease.frames = [frame]
    return model


def init_module(rt: Runtime, factory: Callable[[], nn.Module]) -> nn.Module:
    """The module that `factory()` makes, directly on the runtime's device and in its parameters' dtype.

    Not collective. The default dtype of torch is changed while the factory runs, and restored.

    Args:
        factory: a function without arguments; a module class will do.

    Example:
        >>> import functools, torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu", precision="64-true")
        >>> ff.init_module(rt, functools.partial(torch.nn.Linear, 2, 1)).weight.dtype
        torch.float64
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if rt.precision.autocast else rt.precision.param_dtype)
    try:
        with rt.device:
            return factory()
    finally:
        torch.set_default_dtype(before)


def apply(
    rt: Runtime,
    model: Model,
    *args: Any,
    method: str | Callable[..., Any] | None = None,
    rng: Key | None = None,
    **kwargs: Any,
) -> Any:
    """Compute with a model: `net(*args, **kwargs)`, under the strategy and the precision of the runtime.

    Parameters are constants: gradients flow to the inputs only. What the forward pass does to buffers is dropped. A
    `Model` among the arguments arrives as a net, too. Not collective.

    Args:
        model: the values to compute with.
        method: the name of another method of the net, or any function `fn(net, *args, **kwargs)`.
        rng: the key that dropout and other random layers start from; None leaves the global generator to them.

    Returns:
        What the net returns.

    Raises:
        DonatedError: the model was given away.
        CapabilityError: within a `torch.func` transform under a strategy that works in hooks (ddp).

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> ff.apply(rt, model, torch.ones(3, 2)).shape
        torch.Size([3, 1])
    """
    transform = transforming()
    if transform:
        rt.strategy.check_transform()
    frames = [unbound(model) if transform else acquire(model, frozen=True)]
    try:
        values, options = bind_constants((args, kwargs), frames)

        def call(net: nn.Module) -> Any:
            fn = net if method is None else getattr(net, method) if isinstance(method, str) else None
            return method(net, *values, **options) if callable(method) else fn(*values, **options)  # pyright: ignore[reportOptionalCall]

        with autocast_of(rt.precision, rt.device), contextlib.nullcontext() if rng is None else seeded(rng, rt.device):
            if transform or (torch.is_grad_enabled() and needs_graph((args, kwargs))):
                return call_with_values(frames[0], model, call)
            return call(frames[0].net)
    except RuntimeError as error:
        check_devices(error, rt.device, args, kwargs)
        raise
    finally:
        for frame in frames:
            release(frame)


def autocast(rt: Runtime) -> contextlib.AbstractContextManager[Any]:
    """The context in which a "-mixed" precision computes; nothing happens under the others.

    `value_and_grad`, `value` and `apply` enter it by themselves. Never hold it open across an optimizer step: its cache
    of cast weights would go stale.
    """
    return autocast_of(rt.precision, rt.device)


def map_models(f: Callable[[Model], Model], models: M) -> M:
    """`f` on every Model of a tree."""
    leaves, spec = tree_flatten(models, lambda node: type(node) is Model)
    return tree_unflatten(spec, [f(leaf) for leaf in leaves])


def eval_mode(models: M) -> M:
    """The same values in evaluation mode; `models` is one Model or any tree of them. Shares the tensors."""
    return map_models(lambda model: dataclasses.replace(model, training=frozenset()), models)


def train_mode(models: M) -> M:
    """The same values in training mode: the sub-modules that were in it when the module was set up (all, if none was).

    Takes `models`, one Model or any tree of them, and shares the tensors. A part that you froze with
    `module.part.eval()` before `setup_model` stays in evaluation mode.
    """

    def train(model: Model) -> Model:
        engine = engine_of(model)
        everything = frozenset(name for name, _ in named_modules(engine.frames[0].net))
        return dataclasses.replace(model, training=engine.training or everything)

    return map_models(train, models)


def map_params(f: Callable[..., torch.Tensor], model: Model, *others: Model) -> Model:
    """`f` on the floating parameters of one or several models of the same shapes: averages, EMA, interpolation.

    Other parameters come from the first model; buffers from the last, since an average of counters is nonsense and
    the statistics belong to the newest values.

    Args:
        f: takes one tensor per model and returns a new tensor of the same shape.
        model, others: models of the same names and shapes, of one engine or of several.

    Returns:
        A new Model on the first model's engine, in its training mode. It can be evaluated and trained.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> zero = ff.map_params(torch.zeros_like, model)
        >>> ema = ff.map_params(lambda a, b: 0.9 * a + 0.1 * b, model, zero)
        >>> torch.equal(ema.params["bias"], 0.9 * model.params["bias"])
        True
    """
    for one in (model, *others):
        one.lease.check("Model")
    with torch.no_grad():
        params = {
            name: f(value, *(other.params[name] for other in others)) if value.is_floating_point() else value.clone()
            for name, value in model.params.items()
        }
    return dataclasses.replace(model, params=params, buffers=(model, *others)[-1].buffers)


def gather_params(rt: Runtime, model: Model) -> dict[str, torch.Tensor]:
    """The full parameters of `model` by name, on every rank, in memory of their own.

    Every rank must call it: a strategy that shards parameters communicates here.
    """
    model.lease.check("Model")
    return {name: value.clone() for name, value in model.params.items()}


def to_module(rt: Runtime, model: Model) -> nn.Module:
    """A plain `nn.Module` with the model's values, buffers and training mode, in memory of its own.

    What the user's module was before `setup_model`, with the trained values: no hooks or casts of ours are left in it.
    """
    frame = acquire(model, frozen=True)
    try:
        return plain_copy(engine_of(model), frame)
    finally:
        release(frame)
