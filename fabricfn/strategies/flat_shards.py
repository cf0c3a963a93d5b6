"""Sharded data parallel without torch's `fully_shard`: a unit is one message, and the next one is always on its way.

Hooks gather a unit before its forward and before its part of the backward pass, let it go after both, and send its
gradients while the backward pass goes on. All of it happens at places of the graph that are the same on every rank.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fabricfn.engine import Frame, separate
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.flat import anywhere
from fabricfn.meshes import axes_of
from fabricfn.precision import Precision
from fabricfn.sharding import is_sharded
from fabricfn.strategies.flat_units import Part, Unit, arrived, clear, end, let_go, look, make_unit, need, send, start
from fabricfn.strategies.sharded import mixed_dtypes, refuse_transform, shard
from fabricfn.strategies.shards import agreed, outside, times
from fabricfn.strategies.single import backward as run_backward, forward as run_forward, gradients as take
from fabricfn.strategies.tensor_modules import give_memory
from fabricfn.strategies.tensor_slots import look_at
from fabricfn.strategies.torch_fsdp import part_of
from fabricfn.strategies.units import Units, plan
from fabricfn.strategy import Strategy, point as point_whole
from fabricfn.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from fabricfn.world import World


@dataclasses.dataclass(slots=True, eq=False)
class Pass:
    """One call of a unit's forward."""

    run: object
    begun: bool = False
    """Whether the backward pass is in it."""


@dataclasses.dataclass(slots=True, eq=False)
class Flats:
    """The handle of a frame."""

    units: tuple[str, ...]
    """The names of the sub-modules that are gathered one by one, in the order of the net."""
    groups: list[Unit]
    """They, and at the end the rest of the net, which is gathered for the whole loss function."""
    params: list[Part | None]
    """What became of each slot; None for a scalar, which every rank holds whole."""
    reduce_dtype: torch.dtype | None
    """In which gradients are added up; None is the parameters' own."""
    frozen: bool
    sync: bool = True
    """Whether the backward pass sends gradients."""
    share: float = 1.0
    """What the gradients are still to be multiplied by."""
    run: object = None
    """The pass under way; hooks of graphs that were kept from others do nothing."""
    back: bool = False
    """Whether its backward pass has begun."""
    twice: bool = False
    """Whether the loss function ran a backward pass of its own."""
    passes: list["Pass"] = dataclasses.field(default_factory=list["Pass"])
    """The calls of units that the forward pass is in."""
    together: list["Flats"] = dataclasses.field(default_factory=list["Flats"])
    """The handles of all frames of the run, constants too."""


def flat_sharded(*, units: Units = "auto", gather_dtype: torch.dtype | None = None) -> Strategy:
    """Parameters, gradients and optimizer state cut over the ranks as `fsdp` cuts them, by an engine of our own.

    One message gathers a unit, the next one is on its way meanwhile, and gradients travel while the backward pass runs.
    The values are those of `fsdp`, and so are its rules: every rank runs the same units in the same order, and a unit's
    weights exist only inside its forward (`ff.unsharded`). Groups of ranks, offloading and parameters that stay whole
    belong to `fsdp`.

    Args:
        units: what to gather together, as for `fsdp`: "auto", a module class or several, a predicate, or None.
        gather_dtype: the dtype in which units are gathered. None is the dtype of the arithmetic under a "-mixed"
            precision, else the parameters' own.

    Example:
        >>> flat_sharded(units=torch.nn.TransformerEncoderLayer).name
        'flat_sharded'
    """

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Flats | None:
        if world.group is None:
            return None
        if world.everyone is not None:
            raise ConfigurationError(
                "flat_sharded cuts parameters over all ranks, and this runtime was made for a strategy whose ranks are"
                f' a mesh of {", ".join(axes_of(world))}. Write ff.init_runtime(strategy="flat_sharded").'
            )
        low = gather_dtype or (precision.compute_dtype if precision.autocast else None)
        return tied(net, world, plan(net, units), low, precision.reduce_dtype, frozen=frozen)

    return Strategy(
        name="flat_sharded",
        attach=attach,
        forward=forward,
        backward=backward,
        gradients=gradients,
        point=point,
        reset=reset,
        shard=shard,
        check_transform=refuse_transform,
    )


def tied(
    net: nn.Module, world: World, names: tuple[str, ...], low: Any, reduce_dtype: Any, *, frozen: bool
) -> Flats:
    """The handle of a net, which may have no values yet: its parameters cut, hooks around its units."""
    assert world.group is not None
    mesh = DeviceMesh.from_group(world.group, world.device.type, mesh_dim_names=("dp",))
    give_memory(net, world.device, but={id(slot) for slot in net.parameters() if slot.dim()})
    slots = list(net.parameters())
    left = {id(slot): slot for slot in slots if slot.dim()}
    members: dict[str, list[nn.Parameter]] = {}
    for name in (*reversed(names), ""):  # of units in units the inner one has the parameter
        members[name] = [slot for slot in net.get_submodule(name).parameters() if left.pop(id(slot), None) is not None]
    whole: dict[int, Part] = {}
    flats = Flats(names, [], [], reduce_dtype, frozen)
    for name in (*names, ""):
        unit = make_unit(members[name], net, mesh, world.device, low)
        whole |= {id(slot): part for slot, part in zip(members[name], in_order(unit, members[name]), strict=True)}
        if name:
            module: Any = net.get_submodule(name)
            module.register_forward_pre_hook(functools.partial(enter, flats, len(flats.groups)), with_kwargs=True)
            module.register_forward_hook(functools.partial(leave, flats, len(flats.groups)), always_call=True)
        flats.groups.append(unit)
    flats.params = [whole.get(id(slot)) for slot in slots]
    return flats


def in_order(unit: Unit, slots: Sequence[nn.Parameter]) -> list[Part]:
    """The parts of these slots: a unit has them by dtype."""
    by_dtype = {line.parts[0].slot.dtype: iter(line.parts) for line in unit.lines}
    return [next(by_dtype[slot.dtype]) for slot in slots]


def point(frame: Frame, values: Sequence[torch.Tensor]) -> None:
    """Let the slots of the frame be DTensors over the values' parts."""
    flats: Flats | None = frame.handle
    if flats is None:
        point_whole(frame, values)
        return
    for part, slot, value, name in zip(flats.params, frame.slots, values, frame.names, strict=True):
        if part is None:
            look_at(slot, value, name)
        else:
            part.slot._local_tensor = part_of(value, name, part.slot.placements, part.local.shape)
    for unit in flats.groups:
        let_go(unit)  # whatever is gathered still is of the old values
    frame.copied = any([look(unit) for unit in flats.groups])


def reset(frame: Frame) -> None:
    """After an exception: nothing gathered, no gradient, ready for the next run."""
    flats: Flats | None = frame.handle
    if flats is not None:
        finish(flats)
        for unit in flats.groups:
            clear(unit)
            for part in unit.parts:
                part.whole.grad = None


def finish(flats: Flats) -> None:
    """The end of a pass: nothing stays gathered, and the backward pass of its graph fails from now on."""
    flats.run = None
    flats.passes.clear()
    for unit in flats.groups:
        end(unit)


def enter(flats: Flats, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A hook before the forward of a unit: it is gathered, and the next one begun; its inputs tell when it is done."""
    unit, made = flats.groups[index], Pass(flats.run)
    flats.passes.append(made)
    unit.inside += 1
    need(unit)
    if not flats.back and index + 1 < len(flats.units):
        start(flats.groups[index + 1])
    if not torch.is_grad_enabled():
        return None
    leaves, spec = tree_flatten((args, kwargs))
    watched: list[torch.Tensor] = []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            leaves[place] = leaf.view_as(leaf)  # whose node comes after all that this call computes
            watched.append(leaves[place])
    if not watched:
        return None
    unit.calls += not flats.back
    done = functools.partial(depart, flats, unit, made)
    if len(watched) == 1:
        watched[0].register_hook(done)
    else:
        torch.autograd.graph.register_multi_grad_hook(watched, done)
    return tree_unflatten(spec, leaves)


def leave(flats: Flats, index: int, module: nn.Module, args: Any, result: Any) -> None:
    """A hook after the forward of a unit, failed ones too: it is let go, and gathered again when a gradient comes."""
    unit, made = flats.groups[index], flats.passes.pop()
    unit.inside -= 1
    again = False
    if torch.is_grad_enabled():
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and not leaf.is_leaf:
                leaf.register_hook(functools.partial(come_back, flats, index, made))
                again = True
    last = index + 1 == len(flats.units) and not (flats.back or flats.frozen)
    if not (unit.inside or unit.active or (again and last)):
        let_go(unit)


def come_back(flats: Flats, index: int, made: Pass, grad: torch.Tensor) -> None:
    """A hook: the backward pass begins with this call of a unit."""
    if made.run is not flats.run:
        return
    unit = flats.groups[index]
    if not made.begun:
        made.begun = True
        unit.active += 1
    need(unit)
    if not flats.back:
        flats.twice = True
    elif index:
        start(flats.groups[index - 1])


def depart(flats: Flats, unit: Unit, made: Pass, grad: Any) -> None:
    """A hook: the backward pass is done with this call of a unit."""
    if made.run is not flats.run:
        return
    if made.begun:
        made.begun = False
        unit.active -= 1
    if not (unit.inside or unit.active):
        let_go(unit)
    if flats.back:
        unit.calls -= 1
        if flats.sync and unit.calls <= 0 and unit.leaving is None:
            send(unit, flats.reduce_dtype)


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, whose units come and go meanwhile."""
    handles: list[Flats] = [frame.handle for frame in frames if frame.handle is not None]
    run = object()
    for flats in handles:
        for unit in flats.groups:
            clear(unit)
        flats.run, flats.sync, flats.back, flats.twice, flats.together = run, sync, False, False, handles
        flats.passes.clear()
        start(flats.groups[-1])
        start(flats.groups[0])
    for flats in handles:
        need(flats.groups[-1])
    try:
        result = run_forward(frames, fn, sync=sync, loss_fn=loss_fn)
    except RuntimeError as error:
        if handles and "mixed dtype (CPU)" in str(error):
            raise mixed_dtypes("flat_sharded") from error
        if handles and any(word in str(error) for word in ("DTensor", "differentiated")):
            raise outside(handles[0].units, "flat_sharded") from error
        raise
    result = outliving(result, handles)
    if not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
        for flats in handles:
            finish(flats)
    return result


def outliving(result: Any, handles: Sequence[Flats]) -> Any:
    """The result with copies of what looks at gathered parameters, whose memory is about to be let go."""
    if not handles or (type(result) is torch.Tensor and not result._is_view() and not result.is_leaf):
        return result
    homes = {line.memory.untyped_storage()._cdata for flats in handles for u in flats.groups for line in u.lines}

    def kept(leaf: Any) -> Any:
        if is_sharded(leaf) and (leaf.dim() == 0 or any(one.is_partial() for one in leaf.placements)):
            raise outside(handles[0].units, "flat_sharded")  # a number made of weights that are not gathered
        plain = isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not is_sharded(leaf)
        return leaf.clone() if plain and leaf.untyped_storage()._cdata in homes else leaf

    return tree_map(kept, result)


def backward(frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
    """Accumulate into the whole parameters' `.grad`; of the last micro-batch they leave meanwhile."""
    handles: list[Flats] = [frame.handle for frame in frames if frame.handle is not None]
    together = handles[0].together if handles else []
    if handles and is_sharded(loss):
        raise outside(handles[0].units, "flat_sharded")
    for flats in together:
        flats.back, flats.share = True, share
    try:
        run_backward(frames, loss, share=1.0 if handles else share)
    except RuntimeError as error:
        if any(flats.twice for flats in together) and "modified by an inplace operation" in str(error):
            raise second_order() from error
        if handles and "device meta" in str(error):
            raise outside(handles[0].units, "flat_sharded") from error
        raise
    for flats in handles:
        for unit in reversed(flats.groups):
            if flats.sync and unit.leaving is None:
                send(unit, flats.reduce_dtype)
        if not flats.sync:
            separate(part.whole for part in flats.params if part is not None)
    for flats in together:
        finish(flats)


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """Take this rank's parts of the means away; those of parameters that are whole on every rank are averaged here."""
    if world.group is None:
        return take(frames, world, allow_unused=allow_unused)
    taken: list[list[torch.Tensor | None]] = []
    reached: list[list[bool]] = []
    for frame in frames:
        flats: Flats = frame.handle
        for unit in flats.groups:
            arrived(unit)
        grads = [slot.grad for slot in frame.slots]
        for slot in frame.slots:
            slot.grad = None
        if any(part is not None and part.whole.grad is not None for part in flats.params):
            raise outside(flats.units, "flat_sharded")  # it came when its unit had sent the others
        pairs = zip(grads, flats.params, strict=True)
        reached.append([grad is not None if part is None else part.reached for grad, part in pairs])
        taken.append(times(grads, flats.share))
    return agreed(frames, taken, reached, world, allow_unused)


def second_order() -> CapabilityError:
    """The error for a graph of gradients, whose weights are let go with their units."""
    return CapabilityError(
        "the loss function differentiated with create_graph=True, and flat_sharded has let the weights of that graph"
        " go. Second derivatives need strategy=ff.strategies.flat_sharded(units=None), which gathers the whole model at"
        ' once, or "functional", or "ddp".'
    )
