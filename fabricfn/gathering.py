"""Whole parameters of models whose strategy shards them: as tensors, as a module, inside a loss function."""

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import nn

from fabricfn import flat
from fabricfn.binding import engine_of
from fabricfn.building import plain_net, without_casts
from fabricfn.engine import named_modules
from fabricfn.records import Model
from fabricfn.runtimes import Runtime
from fabricfn.sharding import REACHED, is_sharded, whole
from fabricfn.watching import collective


@collective("gather_params", sharded=True)
def gather_params(rt: Runtime, model: Model, *, dst: int | None = None) -> dict[str, torch.Tensor]:
    """The full parameters of `model` by name, on every rank or on one, in memory of their own.

    Every rank must call it: a strategy that shards parameters communicates here.

    Args:
        model: the values.
        dst: the only rank that gets them; None is all.

    Returns:
        On every rank (on the others than `dst`: an empty dict) a dict name -> tensor of the full shape, in the
        parameter's dtype and on its device.

    Raises:
        DonatedError: the model was given away.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> {name: tuple(value.shape) for name, value in ff.gather_params(rt, model).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    model.lease.check("Model")
    wanted = dst is None or dst == rt.global_rank
    found: dict[str, torch.Tensor] = {}
    for name, value in model.params.items():
        tensor = whole(value) if wanted or is_sharded(value) else value
        if wanted:
            found[name] = tensor
    return found


@collective("to_module", sharded=True)
def to_module(rt: Runtime, model: Model) -> nn.Module:
    """A plain `nn.Module` with the model's values, buffers and training mode, in memory of its own.

    What the user's module was before `setup_model`, with the trained values: no hooks or casts of ours are left in it.
    Every rank must call it: a strategy that shards parameters communicates here.

    Args:
        model: the values.

    Returns:
        A new module of the user's own class, on the model's device.

    Raises:
        DonatedError: the model was given away.
        ModelError: a Model that was unpickled has no module behind it.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> ff.to_module(rt, model)
        Linear(in_features=2, out_features=1, bias=True)
    """
    model.lease.check("Model")
    engine = engine_of(model)
    values = {name: whole(value) for name, value in model.params.items()}
    return without_casts(engine, plain_net(engine, model, values))


@contextlib.contextmanager
def unsharded(rt: Runtime, net: nn.Module) -> Generator[None]:
    """Inside a loss function: use the weights of a unit outside of its forward, under a strategy that shards.

    Under fsdp a unit's weights are there while its own forward runs. Within this block those of `net` (the unit, or any
    module around it or in it) are whole tensors, and gradients flow through them. Under every other strategy nothing
    happens. Not for whole models in every step: that is what units are for.

    Args:
        net: a part of the net that the loss function received.

    Returns:
        A context manager that gives None. Every rank must enter it, in the same order. Tensors taken from it stay
        valid afterwards.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Sequential(torch.nn.Linear(2, 1)))
        >>> def loss_fn(net, x):
        ...     with ff.unsharded(rt, net[0]):
        ...         penalty = net[0].weight.square().sum()
        ...     return net(x).mean() + penalty
        >>> loss, grads = ff.value_and_grad(rt, loss_fn)(model, torch.ones(3, 2))
    """
    places: list[tuple[dict[str, Any], str, Any]] = []
    for _, part in named_modules(net):
        parameters: dict[str, Any] = part._parameters
        places += [(parameters, name, slot) for name, slot in parameters.items() if is_sharded(slot)]
    whole_of: dict[int, torch.Tensor] = {}
    for parameters, name, slot in places:
        if id(slot) not in whole_of:
            whole_of[id(slot)] = gathered(rt, slot)
        parameters[name] = whole_of[id(slot)]
    try:
        yield
    finally:
        for parameters, name, slot in places:
            parameters[name] = slot


def gathered(rt: Runtime, slot: Any) -> torch.Tensor:
    """The whole parameter, through which gradients flow: their mean over ranks arrives in the shards."""
    group = rt.world.group
    tensor: torch.Tensor = slot.full_tensor()
    if group is not None and tensor.requires_grad:

        def mean(grad: torch.Tensor) -> torch.Tensor:
            getattr(slot, REACHED, bool)()
            return flat.all_reduce_mean([grad], group)[0]

        tensor.register_hook(mean)
    return tensor
