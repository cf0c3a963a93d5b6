"""From the user's module to an engine: checked, copied, placed, cast, tied to the strategy."""

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fabricfn import flat
from fabricfn.engine import Engine, Frame, Place, named_modules
from fabricfn.errors import MismatchError, ModelError
from fabricfn.precision import cast_floating
from fabricfn.runtimes import Runtime
from fabricfn.tree import tree_leaves
from fabricfn.world import World

Compile = bool | Mapping[str, Any]


def check_module(module: nn.Module) -> None:
    """Refuse parameters that have no values yet, and what a copy would lose."""
    if torch.is_inference_mode_enabled():
        raise ModelError("setup_model was called inside torch.inference_mode, where nothing can be trained. Leave it.")
    hooked = [n for n, slot in module.named_parameters() if slot._backward_hooks or slot._post_accumulate_grad_hooks]
    if hooked:
        raise ModelError(
            f"parameters have hooks of their own, which values cannot carry: {', '.join(hooked[:8])}. Change the"
            " gradients that value_and_grad returns instead: ff.tree_map(f, grads)."
        )
    lazy = [name for name, slot in module.named_parameters() if nn.parameter.is_lazy(slot)]
    if lazy:
        raise ModelError(
            f"the module has uninitialised (lazy) parameters: {', '.join(lazy[:8])}. Run one batch through it before"
            " ff.setup_model, so that their shapes are known."
        )
    meta = [name for name, slot in module.named_parameters() if slot.is_meta]
    if meta:
        raise ModelError(
            f"the module has parameters without memory, on the meta device: {', '.join(meta[:8])}. Pass the factory"
            " itself, ff.setup_model(rt, factory), or make it with ff.init_module(rt, factory)."
        )


def uncompiled(module: nn.Module) -> tuple[nn.Module, bool]:
    """(the module itself, whether it was compiled): compiling comes last, after the copy."""
    if type(module).__name__ == "OptimizedModule":  # naming the class would import torch._dynamo: 0.9 s
        return module.get_submodule("_orig_mod"), True
    return module, module._compiled_call_impl is not None


def copy_module(
    module: nn.Module,
    place: Callable[[torch.Tensor], torch.Tensor],
    place_buffer: Callable[[torch.Tensor], torch.Tensor],
    *,
    frozen: bool = False,
) -> nn.Module:
    """A deep copy whose parameters are `place(original)`, and whose buffers are `place_buffer(original)`.

    Ties, hooks and parametrisations are kept; activations that a module keeps in attributes come without their graph.
    """
    memo: dict[int, Any] = {}
    for _, part in named_modules(module):
        for kept in vars(part).values():
            values: list[Any] = tree_leaves(kept) if isinstance(kept, (dict, list, tuple)) else [kept]
            for value in values:
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    memo[id(value)] = value.detach().clone()
    for slot in module.parameters():
        memo[id(slot)] = nn.Parameter(place(slot.detach()), requires_grad=slot.requires_grad and not frozen)
    for buffer in module.buffers():
        memo[id(buffer)] = place_buffer(buffer.detach())
    return copy.deepcopy(module, memo)


def placing(rt: Runtime, *, move: bool, fresh: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a tensor of the user's module becomes ours: the device, the dtype; `fresh` memory when it must not alias."""
    dtype = None if rt.precision.autocast else rt.precision.param_dtype

    def place(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        placed = tensor.to(rt.device if move else tensor.device, wanted)
        return placed.clone() if fresh and placed.data_ptr() == tensor.data_ptr() else placed

    return place


def add_casts(rt: Runtime, net: nn.Module) -> tuple[int, ...]:
    """Cast floating inputs where the net's own forward is entered, and outputs where it is left; the hooks' ids."""
    precision = rt.precision
    if precision.autocast:
        return ()
    ids = [net.register_forward_pre_hook(functools.partial(cast_inputs, precision.compute_dtype), with_kwargs=True).id]
    if precision.output_dtype is not None:
        ids.append(net.register_forward_hook(functools.partial(cast_outputs, precision.output_dtype)).id)
    return tuple(ids)


def cast_inputs(dtype: torch.dtype, net: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """A forward pre-hook; None leaves the arguments alone."""
    for value in (*args, *kwargs.values()):
        if type(value) is not torch.Tensor or value.dtype is not dtype:
            return cast_floating(args, dtype), cast_floating(kwargs, dtype)
    return None


def cast_outputs(dtype: torch.dtype, net: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook."""
    return cast_floating(output, dtype)


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
        kinds=tuple((slot.dtype, slot.shape, slot.device) for slot in slots.values()),
        trainable=tuple(slot.requires_grad for slot in slots.values()),
        places=persistent_buffers(net, absent=False),
        absent=persistent_buffers(net, absent=True),
    )


def agree(world: World, frame: Frame) -> None:
    """Give every rank the parameters and buffers of rank 0, once all are known to have the same names and shapes."""
    if world.group is None:
        return
    held = {**{name: slot.data for name, slot in zip(frame.names, frame.slots, strict=True)}, **buffers_of(frame)}
    tensors = list(held.values())
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
    for tensor, value in zip(tensors, flat.broadcast(tensors, 0, world.group), strict=True):
        tensor.copy_(value)


def build(rt: Runtime, module: nn.Module, *, move_to_device: bool, donate: bool, compile: Compile) -> Engine:
    """The engine of a module, with its first frame tied to the strategy. Every rank must call it."""
    check_module(module)
    module, compiled = uncompiled(module)
    options = dict(compile) if isinstance(compile, Mapping) else {} if compile or compiled else None
    sources = tuple(weakref.ref(slot) for slot in module.parameters())
    if donate:
        place = placing(rt, move=move_to_device, fresh=False)
        net = module._apply(place)
    else:
        place = placing(rt, move=move_to_device, fresh=True)
        net = copy_module(module, place, place)
    if rt.precision.convert is not None:
        net = rt.precision.convert(net)
    hooks = add_casts(rt, net)
    attach = functools.partial(rt.strategy.attach, world=rt.world)

    def grow(frozen: bool) -> Frame:
        return finish(copy_module(first.net, lambda slot: slot, torch.clone, frozen=frozen), frozen)

    def finish(net: nn.Module, frozen: bool) -> Frame:
        if options is not None:
            net.compile(**options)
        return make_frame(net, None if frozen else attach(net))

    first = make_frame(net, None)
    agree(rt.world, first)
    first = finish(net, False)
    return Engine(
        training=frozenset(name for name, sub in named_modules(net) if sub.training),
        sources=sources,
        frames=[first],
        frozen=[],
        grow=grow,
        hooks=hooks,
        attach=attach,
    )


def plain_copy(engine: Engine, frame: Frame) -> nn.Module:
    """A deep copy of a frame's net with memory of its own and without our hooks."""
    trainable = [slot.requires_grad for slot in engine.frames[0].slots]
    net = copy_module(frame.net, torch.clone, torch.clone)
    for slot, wanted in zip(net.parameters(), trainable, strict=True):
        slot.requires_grad_(wanted)
    for hook in engine.hooks:
        net._forward_pre_hooks.pop(hook, None)
        net._forward_pre_hooks_with_kwargs.pop(hook, None)
        net._forward_hooks.pop(hook, None)
    return net
