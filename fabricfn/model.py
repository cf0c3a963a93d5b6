"""Models: from a module to values, computing with values, and back to a module."""

import contextlib
from collections.abc import Callable, Sequence
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
from fabricfn.building import Compile, buffers_of, build, plain_net
from fabricfn.default_dtypes import default_dtype
from fabricfn.deferring import made
from fabricfn.engine import Frame
from fabricfn.errors import CapabilityError
from fabricfn.precision import autocast_of
from fabricfn.random import Key, seeded
from fabricfn.records import Model, Ref
from fabricfn.runtimes import Runtime
from fabricfn.scaling import first_scale
from fabricfn.sharding import is_sharded, whole
from fabricfn.strategies.recomputing import Checkpointing
from fabricfn.tree import tree_map
from fabricfn.watching import collective

M = TypeVar("M")


@collective("setup_model")
def setup_model(
    rt: Runtime,
    module_or_factory: nn.Module | Callable[[], nn.Module],
    *,
    move_to_device: bool = True,
    donate: bool = False,
    compile: Compile = False,
    activation_checkpointing: Checkpointing = None,
) -> Model:
    """The values of a module as a `Model`, ready to be trained under the runtime's strategy and precision.

    Every rank must call it, with the same module; all ranks get the values of rank 0. The module itself is copied and
    never changed, unless it is donated.

    Args:
        module_or_factory: a module, or a function without arguments that makes one (then it is made by `init_module`,
            on the device and in the dtype of the runtime). Under a strategy that shards (fsdp) the factory runs without
            memory, and the same values are made part by part: no rank ever holds the whole model.
        move_to_device: False leaves parameters and buffers on the devices where they are.
        donate: take the module over instead of copying it; do not use it afterwards.
        compile: True, or a mapping of options for `torch.compile`. A module that was compiled already is compiled
            again, outside of everything else.
        activation_checkpointing: the sub-modules whose forward pass is computed again in the backward pass, instead of
            keeping its activations: "auto" for the repeated blocks of lists, a module class or a tuple of them, or a
            predicate `(name, module) -> bool`. Or a mapping policy -> sub-modules: "recompute" as just said;
            "keep_matmuls" keeps the results of products and computes the rest again; "offload" keeps activations in
            the memory of the CPU; a function is a policy of torch's `create_selective_checkpoint_contexts`. Loss,
            gradients and buffers have the same bits.

    Returns:
        A Model with the parameters in `rt.precision.param_dtype` (left as they are under a "-mixed" precision) and in
        the training mode in which the module was.

    Raises:
        ModelError: lazy parameters, or parameters on the meta device.
        MismatchError: the ranks hold different modules.
        ConfigurationError: activation_checkpointing chooses nothing that has a forward, or one module twice.
        CapabilityError: activation_checkpointing on an XLA device.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> {name: tuple(value.shape) for name, value in model.params.items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    tape = None
    if not isinstance(module_or_factory, nn.Module):
        factory, donate = module_or_factory, True
        if rt.strategy.shard is None or rt.world.whole.group is None or rt.precision.convert is not None:
            module_or_factory = init_module(rt, factory)
        else:
            with default_dtype(_made_in(rt)):
                module_or_factory, tape = made(factory, rt.device)
    engine, values = build(
        rt,
        module_or_factory,
        move_to_device=move_to_device,
        donate=donate,
        compile=compile,
        activation_checkpointing=activation_checkpointing,
        tape=tape,
    )
    frame = engine.frames[0]
    signature = tuple((name, str(value.dtype), tuple(value.shape)) for name, value in values.items())
    model = Model(
        params=values,
        buffers=buffers_of(frame),
        training=engine.training,
        loss_scale=first_scale(rt.precision.loss_scale),
        ref=Ref(engine, signature),
    )
    release(acquire(model, frozen=False))
    return model


def init_module(rt: Runtime, factory: Callable[[], nn.Module]) -> nn.Module:
    """The module that `factory()` makes, directly on the runtime's device and in its parameters' dtype.

    Not collective. The default dtype of torch is changed while the factory runs, and restored.

    Args:
        factory: a function without arguments; a module class will do.

    Returns:
        The module, with random numbers of this rank's own; `setup_model` gives all ranks those of rank 0.

    Example:
        >>> import functools, torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu", precision="64-true")
        >>> ff.init_module(rt, functools.partial(torch.nn.Linear, 2, 1)).weight.dtype
        torch.float64
    """
    with default_dtype(_made_in(rt)), rt.device:
        return factory()


def _made_in(rt: Runtime) -> torch.dtype | None:
    """The dtype in which a factory makes parameters; None leaves it to torch's default."""
    return None if rt.precision.autocast else rt.precision.param_dtype


@collective("apply", sharded=True)
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
    `Model` among the arguments arrives as a net, too. Not collective, except under a strategy that shards (fsdp): there
    every rank must call it, equally often, since parameters are gathered on the way.

    Args:
        model: the values to compute with.
        args, kwargs: what the net takes, with tensors on the runtime's device.
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

        def call(net: nn.Module, *others: nn.Module) -> Any:
            fn = net if method is None else getattr(net, method) if isinstance(method, str) else None
            return method(net, *values, **options) if callable(method) else fn(*values, **options)  # pyright: ignore[reportOptionalCall]

        with (
            autocast_of(rt.precision, rt.device),
            contextlib.nullcontext() if rng is None else seeded(rng, rt.device),
        ):
            if transform or (torch.is_grad_enabled() and needs_graph((args, kwargs))):
                if any(map(is_sharded, model.params.values())):
                    return call(gathered_net(model, frames))
                return call_with_values(frames[0], model, call)
            result = rt.strategy.forward(frames, call, sync=False, loss_fn=None)
            return result if type(result) is torch.Tensor else tree_map(kept, result)
    except RuntimeError as error:
        check_devices(error, rt.device, args, kwargs)
        raise
    finally:
        for frame in frames:
            release(frame)


def gathered_net(model: Model, frames: Sequence[Frame]) -> nn.Module:
    """A net with the whole parameters: the caller may go back through it when frames look at other values again."""
    if len(frames) > 1:
        raise CapabilityError(
            "ff.apply takes no further Model when gradients flow to its inputs and parameters are sharded. Compute"
            " with one Model a call, or inside a loss function: ff.value_and_grad(rt, loss_fn)(model, other, x)."
        )
    engine = engine_of(model)
    net = plain_net(engine, model, {name: whole(value) for name, value in model.params.items()})
    return net.requires_grad_(False)


def autocast(rt: Runtime) -> contextlib.AbstractContextManager[Any]:
    """The context in which a "-mixed" precision computes; nothing happens under the others.

    `value_and_grad`, `value` and `apply` enter it by themselves. Never hold it open across an optimizer step: its cache
    of cast weights would go stale. Not collective.

    Returns:
        A context manager that gives None.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu", precision="bf16-mixed")
        >>> with ff.autocast(rt):
        ...     torch.nn.Linear(2, 1)(torch.ones(3, 2)).dtype
        torch.bfloat16
    """
    return autocast_of(rt.precision, rt.device)


def kept(leaf: Any) -> Any:
    """A slot is bound to other values later; its present values stay."""
    return leaf.detach() if isinstance(leaf, nn.Parameter) else leaf
