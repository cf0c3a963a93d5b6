"""The hooks of `flat_sharded`: what is gathered when, and when gradients leave.

All of it happens at places of the graph that are the same on every rank, so messages need no other agreement.
"""

import dataclasses
import functools
import sys
from typing import Any

import torch
from torch import nn

from fabricfn.strategies.flat_units import Part, Unit, arrived, clear, end, let_go, need, send, start
from fabricfn.tree import tree_flatten, tree_leaves, tree_unflatten

AHEAD = 2
"""The gradients of so many units may be on the way: they take memory twice, as they leave and as they come."""


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Pass:
    """One call of a unit's forward."""

    run: "list[Flats]"
    """Which pass it belongs to: hooks of graphs that were kept from others do nothing."""
    begun: bool = False
    """Whether the backward pass is in it."""


@dataclasses.dataclass(slots=True, eq=False, repr=False)
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
    back: bool = False
    """Whether its backward pass has begun."""
    twice: bool = False
    """Whether the loss function ran a backward pass of its own."""
    outgoing: list[Unit] = dataclasses.field(default_factory=list[Unit])
    """The units whose gradients are on the way."""
    passes: list["Pass"] = dataclasses.field(default_factory=list["Pass"])
    """The calls of units that the forward pass is in."""
    together: list["Flats"] = dataclasses.field(default_factory=list["Flats"])
    """The handles of all frames of the pass under way, constants too: a list of its own for each pass."""


def surround(module: Any, flats: Flats, index: int) -> None:
    """Put the hooks around the forward of a unit. Where the compiler is in use, it is told to leave them alone."""
    before: Any = functools.partial(enter, flats, index)
    after: Any = functools.partial(leave, flats, index)
    if "torch._dynamo" in sys.modules:
        before, after = torch.compiler.disable(before), torch.compiler.disable(after)
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, always_call=True)


def enter(flats: Flats, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A hook before the forward of a unit: it is gathered, and the next one begun; its inputs tell when it is done."""
    unit, made = flats.groups[index], Pass(flats.together)
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
    if made.run is not flats.together:
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
    if made.run is not flats.together:
        return
    if made.begun:
        made.begun = False
        unit.active -= 1
    if not (unit.inside or unit.active):
        let_go(unit)
    if flats.back:
        unit.calls -= 1
        if flats.sync and unit.calls <= 0:
            dispatch(flats, unit)


def dispatch(flats: Flats, unit: Unit) -> None:
    """Let the gradients of a unit leave, once a pass; those before it have arrived, all but one unit's."""
    if unit.left:
        return
    send(unit, flats.reduce_dtype)
    flats.outgoing.append(unit)
    while len(flats.outgoing) > AHEAD:
        arrived(flats.outgoing.pop(0))


def begin(flats: Flats, together: list[Flats], *, sync: bool) -> None:
    """A pass begins: the rest of the net and the first unit are on their way."""
    for unit in flats.groups:
        clear(unit)
    flats.together, flats.sync, flats.back, flats.twice = together, sync and not flats.frozen, False, False
    start(flats.groups[-1])
    start(flats.groups[0])


def finish(flats: Flats) -> None:
    """The end of a pass: nothing stays gathered, and the backward pass of its graph fails from now on."""
    flats.together = []
    flats.passes.clear()
    for unit in flats.groups:
        end(unit)
