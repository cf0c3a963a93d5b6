"""Sharded data parallel without torch's `fully_shard`: a unit is one message, and the next one is always on its way.

Units are gathered before their forward and before their part of the backward pass, let go after both, and their
gradients leave while the backward pass goes on. What it gains: docs/decisions/0024-flat-sharded.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fabricfn.engine import Frame, separate
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.meshes import axes_of
from fabricfn.precision import Precision
from fabricfn.sharding import is_sharded, with_local
from fabricfn.strategies.flat_hooks import Flats, begin, dispatch, finish, surround
from fabricfn.strategies.flat_units import Part, Unit, arrived, clear, let_go, look, make_unit, need, rows_of
from fabricfn.strategies.sharded import mixed_dtypes, refuse_transform
from fabricfn.strategies.shards import agreed, outliving, outside, times
from fabricfn.strategies.single import backward as run_backward, forward as run_forward, gradients as take
from fabricfn.strategies.tensor_modules import give_memory
from fabricfn.strategies.tensor_slots import look_at
from fabricfn.strategies.torch_fsdp import part_of
from fabricfn.strategies.units import Units, plan
from fabricfn.strategy import Strategy, point as point_whole
from fabricfn.tree import tree_leaves
from fabricfn.world import World


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


def tied(net: nn.Module, world: World, names: tuple[str, ...], low: Any, reduce_dtype: Any, *, frozen: bool) -> Flats:
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
            surround(net.get_submodule(name), flats, len(flats.groups))
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
    frame.copied = sum(map(look, flats.groups)) > 0


def shard(whole: torch.Tensor, slot: Any) -> torch.Tensor:
    """A DTensor with the rows of this rank; what every rank holds whole is a copy."""
    if not is_sharded(slot):
        return whole.clone()
    return with_local(slot, rows_of(whole, slot.device_mesh).clone(memory_format=torch.contiguous_format))


def reset(frame: Frame) -> None:
    """After an exception: nothing gathered, no gradient, ready for the next run."""
    flats: Flats | None = frame.handle
    if flats is not None:
        finish(flats)
        for unit in flats.groups:
            clear(unit)
            for part in unit.parts:
                part.whole.grad, part.reached = None, False
        flats.outgoing.clear()


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, whose units come and go meanwhile."""
    handles: list[Flats] = [frame.handle for frame in frames if frame.handle is not None]
    for flats in handles:
        begin(flats, handles, sync=sync)
    for flats in handles:
        need(flats.groups[-1])
    try:
        result = run_forward(frames, fn, sync=sync, loss_fn=loss_fn)
    except RuntimeError as error:
        if handles and "mixed dtype (CPU)" in str(error):
            raise mixed_dtypes("flat_sharded") from error
        if handles and any(word in str(error) for word in ("DTensor", "differentiated", "not allocated")):
            raise outside(handles[0].units, "flat_sharded") from error
        raise
    result = kept(result, handles)
    if not any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(result)):
        for flats in handles:
            finish(flats)
    return result


def kept(result: Any, handles: Sequence[Flats]) -> Any:
    """The result with copies of what looks at gathered parameters."""
    if not handles or (type(result) is torch.Tensor and not result._is_view() and not result.is_leaf):
        return result
    homes = {line.memory.untyped_storage()._cdata for flats in handles for u in flats.groups for line in u.lines}
    return outliving(result, homes, handles[0].units, "flat_sharded")


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
            if flats.sync:
                dispatch(flats, unit)
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
        while flats.outgoing:
            arrived(flats.outgoing.pop())
        grads = [slot.grad for slot in frame.slots]
        for slot in frame.slots:
            slot.grad = None
        if any(part is not None and part.whole.grad is not None for part in flats.params):
            raise late()
        pairs = zip(grads, flats.params, strict=True)
        reached.append([grad is not None if part is None else part.reached for grad, part in pairs])
        for part in flats.params:
            if part is not None:
                part.reached = False
        taken.append(times(grads, flats.share))
    return agreed(frames, taken, reached, world, allow_unused)


def second_order() -> CapabilityError:
    """The error for a graph of gradients, whose weights are let go with their units."""
    return CapabilityError(
        "the loss function differentiated with create_graph=True, and flat_sharded has let the weights of that graph"
        " go. Second derivatives need strategy=ff.strategies.flat_sharded(units=None), which gathers the whole model at"
        ' once, or "functional", or "ddp".'
    )


def late() -> CapabilityError:
    """The error for a gradient that came when its unit had sent the others."""
    return CapabilityError(
        "a gradient came when those of its unit were on their way: a re-entrant checkpoint runs a backward pass each"
        " time, and this unit is called twice. Write checkpoint(..., use_reentrant=False), or"
        ' strategy=ff.strategies.flat_sharded(units=None), or "fsdp".'
    )
