"""From whole parameters to shards: one sub-module at a time, so that no rank ever holds a second model.

[Note: meta] A module that was made on the meta device has no values. Each sub-module's own are made here, by its
`reset_parameters()`, on every rank; then rank 0's count, as for any module.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fabricfn import flat
from fabricfn.copying import copy_module
from fabricfn.deferring import Tape
from fabricfn.engine import named_modules
from fabricfn.errors import ModelError
from fabricfn.strategy import Shard
from fabricfn.world import World

Put = Callable[[torch.Tensor], torch.Tensor]


def take_first(world: World, tensors: Sequence[torch.Tensor]) -> None:
    """Give every rank the values of rank 0, in place. Every rank must call it."""
    flat.spread(tensors, 0, world.group)


def without_values(module: nn.Module, place: Put) -> nn.Module:
    """A copy whose parameters have no memory, in the dtypes that `place` gives; its buffers are placed copies."""

    def kind(slot: torch.Tensor) -> torch.Tensor:
        dtype = place(torch.empty(0, dtype=slot.dtype)).dtype
        return torch.empty_like(slot, dtype=dtype, device="meta", memory_format=torch.contiguous_format)

    def placed(buffer: torch.Tensor) -> torch.Tensor:
        return place(torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer)

    return copy_module(module, kind, placed)


def cut(
    world: World,
    module: nn.Module,
    template: nn.Module,
    slots: Mapping[str, nn.Parameter],
    shard: Shard,
    place: Put,
    tape: Tape | None = None,
    *,
    donate: bool,
) -> dict[str, torch.Tensor]:
    """The part of this rank of each parameter of `module`, with the values of rank 0. Every rank must call it.

    Buffers without values get them in `template`. The `tape` has the values of what a factory made without memory. With
    `donate`, `module` loses each whole parameter as soon as it is cut, so that two models never stand side by side.
    """
    values: dict[str, torch.Tensor] = {}
    for prefix, part in named_modules(module):
        start, source = f"{prefix}." if prefix else "", part
        own = {name: slot for name, slot in part._parameters.items() if slot is not None and start + name in slots}
        empty = [name for name, held in (*own.items(), *part._buffers.items()) if held is not None and held.is_meta]
        if empty:
            if set(own) - set(empty) and tape is None:
                raise ModelError(
                    f"{prefix or type(part).__name__} has values for {', '.join(set(own) - set(empty))}, but none for"
                    f" {', '.join(empty)} (on the meta device). Make all of its parameters there, or none."
                )
            source = initialised(part, prefix, empty, world.device) if tape is None else replayed(part, empty, tape)
            for name in set(empty) - set(own):
                template.get_submodule(prefix).get_buffer(name).copy_(source.get_buffer(name))
        wholes = {start + name: place(source.get_parameter(name).detach()).contiguous() for name in own}
        take_first(world, list(wholes.values()))
        for name, slot in own.items():
            values[start + name] = shard(wholes.pop(start + name), slots[start + name])
            if donate:
                slot.data = slot.data.new_empty(0)
    return {name: values[name] for name in slots}


def replayed(part: nn.Module, empty: Sequence[str], tape: Tape) -> nn.Module:
    """A module that holds the tensors of one sub-module, those without memory with the values of the tape."""
    made = nn.Module()
    made._parameters, made._buffers = dict(part._parameters), dict(part._buffers)
    held: list[Any] = [part._parameters.get(name, part._buffers.get(name)) for name in empty]
    for name, old, value in zip(empty, held, tape.values(held), strict=True):
        if name in made._parameters:
            made._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            made._buffers[name] = value
    return made


def initialised(part: nn.Module, prefix: str, empty: Sequence[str], device: torch.device) -> nn.Module:
    """A copy of one sub-module (its children are shared) whose empty tensors got values by `reset_parameters`."""
    reset: Any = getattr(type(part), "reset_parameters", getattr(type(part), "_reset_parameters", None))
    if reset is None:
        raise ModelError(
            f"{prefix or type(part).__name__} has no values for {', '.join(empty)} (they are on the meta device) and no"
            " reset_parameters() that would make them. Write that method, or make the module with its values:"
            " ff.setup_model(rt, factory)."
        )
    made = copy.copy(part)
    made.__dict__["_parameters"], made.__dict__["_buffers"] = dict(part._parameters), dict(part._buffers)
    for name in empty:
        held: Any = made._parameters.get(name, made._buffers.get(name))
        memory = torch.zeros_like(held, device=device)
        if name in made._parameters:
            made._parameters[name] = nn.Parameter(memory, requires_grad=held.requires_grad)
        else:
            made._buffers[name] = memory
    reset(made)
    return made
