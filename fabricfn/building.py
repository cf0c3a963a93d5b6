"""From the user's module to an engine: placed, tied to the strategy, with the values of rank 0."""

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fabricfn.copying import add_casts, check_module, copy_module, placing, uncompiled
from fabricfn.cutting import cut, take_first, without_values
from fabricfn.deferring import Tape
from fabricfn.engine import Engine, Frame, Place, named_modules
from fabricfn.errors import MismatchError
from fabricfn.records import Model
from fabricfn.runtimes import Runtime
from fabricfn.strategies.recomputing import Checkpointing, planned, recompute
from fabricfn.world import World

Compile = bool | Mapping[str, Any]


def persistent_buffers(net: nn.Module, *, absent: bool) -> dict[str, list[Place]]:
    """Where each buffer (or each that is None) hangs; a shared one has several places, under its first name."""
    found: dict[str, list[Place]] = {}
    first: dict[int, str] = {}
    for prefix, module in named_modules(net):
        for name, buffer in module._buffers.items():
            if (buffer is None) is not absent or name in module._non_persistent_buffers_set:
                continue
            full = f"{prefix}.{name}" if prefix else name
            full = full if buffer is None else first.setdefault(id(buffer), full)
            found.setdefault(full, []).append((module._buffers, name))
    return found


def buffers_of(frame: Frame) -> dict[str, torch.Tensor]:
    """The persistent buffers that hang in a frame's net now."""
    held = {name: places[0][0][places[0][1]] for name, places in frame.places.items()}
    return {name: buffer for name, buffer in held.items() if buffer is not None}


def make_frame(net: nn.Module, handle: Any) -> Frame:
    """The frame of a net that is placed already."""
    slots = dict(net.named_parameters())
    return Frame(
        net=net,
        names=tuple(slots),
        slots=list(slots.values()),
        handle=handle,
        # an engine's slots may be in another dtype, or empty until they are gathered: then the handle says what fits
        kinds=getattr(handle, "kinds", None) or tuple((slot.dtype, slot.shape, slot.device) for slot in slots.values()),
        trainable=tuple(slot.requires_grad for slot in slots.values()),
        places=persistent_buffers(net, absent=False),
        absent=persistent_buffers(net, absent=True),
    )


def agree(world: World, held: Mapping[str, torch.Tensor]) -> None:
    """Raise `MismatchError` unless all ranks hold the same names, shapes and dtypes. Every rank must call it."""
    if world.group is None:
        return
    ours = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in held.items()]
    everyone: list[Any] = [None] * world.world_size
    dist.all_gather_object(everyone, ours, group=world.group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            differing = [str(pair) for pair in zip(everyone[0], theirs, strict=False) if pair[0] != pair[1]]
            raise MismatchError(
                f"rank {rank} set up another module than rank 0 (seen on rank {world.rank}): {len(theirs)} tensors"
                f" against {len(everyone[0])}; {'; '.join(differing[:4])}. Build the same module on every rank."
            )


def build(
    rt: Runtime,
    module: nn.Module,
    *,
    move_to_device: bool,
    donate: bool,
    compile: Compile,
    activation_checkpointing: Checkpointing = None,
    tape: Tape | None = None,
) -> tuple[Engine, dict[str, torch.Tensor]]:
    """The engine of a module, with its first frame tied to the strategy, and the values. Every rank must call it."""
    strategy, world = rt.strategy, rt.world.whole
    shard = None if world.group is None else strategy.shard
    check_module(module, may_be_meta=shard is not None)
    module, compiled = uncompiled(module)
    options = dict(compile) if isinstance(compile, Mapping) else {} if compile or compiled else None
    sources = tuple(weakref.ref(slot) for slot in module.parameters())
    agree(world, {**dict(module.named_parameters()), **dict(module.named_buffers())})
    place = placing(rt, move=move_to_device or shard is not None, fresh=not donate)
    net = module
    if shard is None or rt.precision.convert is not None:
        net = module._apply(place) if donate else copy_module(module, place, place)
        net = net if rt.precision.convert is None else rt.precision.convert(net)
    template = net if shard is None else without_values(net, place)
    hooks = add_casts(rt, template)
    again = planned(template, activation_checkpointing, rt.device)

    def finish(net: nn.Module, frozen: bool) -> Frame:
        # a graph through constants may outlive the call, and would compute again with other values
        recompute(net, {} if frozen else again)
        if options is not None:
            net.compile(**options)
        return make_frame(net, strategy.attach(net, rt.world, rt.precision, frozen=frozen))

    def grow(frozen: bool) -> Frame:
        # `.data`: what is detached shares its version counter, and binding this frame would spoil graphs of others
        return finish(copy_module(template, lambda slot: slot.data, torch.clone, frozen=frozen), frozen)

    def mend(frame: Frame) -> None:
        if strategy.reset is not None:
            strategy.reset(frame)
        else:
            frame.handle = None
            gc.collect()  # its hooks must be gone before the slots get new ones
            frame.handle = strategy.attach(frame.net, rt.world, rt.precision, frozen=False)
        frame.broken = False

    if shard is None:
        take_first(world, [slot.data for slot in template.parameters()])
        first = finish(template, False)
        values = {name: slot.data for name, slot in zip(first.names, first.slots, strict=True)}
    else:
        first = grow(False)
        slots = dict(zip(first.names, first.slots, strict=True))
        values = cut(world, net, template, slots, shard, place, tape, donate=donate and tape is None)
        for buffer, value in zip(first.net.buffers(), template.buffers(), strict=True):
            buffer.copy_(value)
    take_first(world, list(buffers_of(first).values()))
    engine = Engine(
        training=frozenset(name for name, sub in named_modules(template) if sub.training),
        sources=sources,
        frames=[first],
        frozen=[],
        grow=grow,
        hooks=hooks,
        template=template,
        point=strategy.point,
        mend=mend,
    )
    return engine, values


def plain_net(engine: Engine, model: Model, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """A net that is tied to nothing, with these parameters (as they are) and the model's buffers and mode."""
    rest = iter(values.values())
    net = copy_module(engine.template, lambda slot: next(rest), torch.clone)
    recompute(net, {})
    for name, places in persistent_buffers(net, absent=False).items():
        for hanging, key in places:
            hanging[key] = model.buffers[name].clone()
    for name, module in named_modules(net):
        module.training = name in model.training
    return net


def without_casts(engine: Engine, net: nn.Module) -> nn.Module:
    """The net without the hooks of ours."""
    for hook in engine.hooks:
        net._forward_pre_hooks.pop(hook, None)
        net._forward_pre_hooks_with_kwargs.pop(hook, None)
        net._forward_hooks.pop(hook, None)
    return net
