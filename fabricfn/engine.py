"""Engines and frames: the mutable machinery that values are bound to. Internal; users hold `Model` records.

[Note: slots] An engine that synchronises gradients (DDP's reducer, FSDP's shards) is tied to particular Parameter
objects, its *slots*. A `Model`'s tensors own their memory; binding makes the slots point there before a run. Slots look
at records; records never are slots.
"""

import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fabricfn.errors import GradientError
from fabricfn.sharding import local_of
from fabricfn.tracing import tracing
from fabricfn.tree import tree_unflatten

if TYPE_CHECKING:
    from fabricfn.leases import Lease


Place = tuple[dict[str, torch.Tensor | None], str]
"""A module's dict of buffers, and a name in it."""


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Frame:
    """One copy of the network, to which the values of one record at a time are bound."""

    net: nn.Module
    """What the user's loss function receives."""
    names: tuple[str, ...]
    """The parameters' names."""
    slots: list[nn.Parameter]
    """The parameters of `net` in the order of `names`, a tied one once."""
    handle: Any
    """What the strategy's `attach` returned."""
    kinds: tuple[tuple[torch.dtype, torch.Size, torch.device], ...]
    """What fits each slot."""
    trainable: tuple[bool, ...]
    """Which slots require grad; what a loss function does to the flags is undone."""
    places: dict[str, list[Place]]
    """For each persistent buffer, where it hangs in `net`; several places for a shared one."""
    absent: dict[str, list[Place]]
    """The same for the persistent buffers that are None."""
    loaded: Mapping[str, torch.Tensor] | None = None
    """The record's buffers of which copies hang in `net` now."""
    copies: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict[str, torch.Tensor])
    """These copies, as they were hung there."""
    one: torch.Tensor | None = None
    """The gradient of a loss with respect to itself, at hand for every backward pass."""
    owner: "Lease | None" = None
    """The lease of the values that the slots point to."""
    training: frozenset[str] | None = None
    """The names of the sub-modules now in training mode."""
    copied: bool = False
    """The slots hold copies of some values: after an update in place they are bound again."""
    open: bool = False
    """A run is under way: no other values may be bound."""
    broken: bool = False
    """A run failed in the middle: the handle is made again before the next one."""


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Engine:
    """Everything that stands behind the models of one `setup_model` call."""

    training: frozenset[str]
    """The sub-modules that were in training mode when the user handed the module over."""
    sources: tuple["weakref.ref[nn.Parameter]", ...]
    """The user's own parameters, in the order of the names: an optimizer that was built over them is recognised."""
    frames: list[Frame]
    """Frames for differentiation; a second one is made when two records of one engine meet in a loss."""
    frozen: list[Frame]
    """Frames for constants and for `apply`: no gradient, no synchronisation."""
    grow: Callable[[bool], Frame]
    """Makes one more frame; True makes a frozen one. Under ddp every rank must do so."""
    hooks: tuple[int, ...]
    """The ids of the forward hooks that are ours: the casts of a "-true" precision."""
    template: nn.Module
    """The net that frames are copies of; where values are sharded, without memory for its parameters."""
    point: Callable[[Frame, Sequence[torch.Tensor]], None]
    """Lets the slots of a frame look at values."""
    mend: Callable[[Frame], None]
    """Makes a broken frame fit for use again."""
    traced: bool = False
    """It stands in for another one while a step is traced: see [Note: traced]."""


def named_modules(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The sub-modules of a net by name, the net itself under ""; a shared one once."""
    return list(cast("Iterator[tuple[str, nn.Module]]", net.named_modules()))


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """A loss function with its batch, as `Strategy.forward` gets it; called with nets, constants at the end."""

    loss_fn: Callable[..., Any]
    spec: Any
    """The structure of the tree of models; None for one."""
    count: int
    """How many of the nets are the models'."""
    values: tuple[tuple[Any, ...], dict[str, Any]]
    """The other arguments."""
    weighted: bool
    has_aux: bool

    def __call__(self, *nets: nn.Module) -> Any:
        """What the loss function returns."""
        own = nets[0] if self.spec is None else tree_unflatten(self.spec, nets[: self.count])
        return self.loss_fn(own, *self.values[0], **self.values[1])


class Box(nn.Module):
    """What an engine drives in place of the user's module: its forward calls any function of the module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, fn: Callable[..., Any]) -> Any:
        """`fn(net)`."""
        return fn(self.net)


def require_all(frames: Sequence[Frame], grads: Sequence[Sequence[torch.Tensor | None]]) -> None:
    """Raise `GradientError` naming the trainable parameters that got no gradient."""
    missing = [
        name
        for frame, found in zip(frames, grads, strict=True)
        for name, trainable, grad in zip(frame.names, frame.trainable, found, strict=True)
        if grad is None and trainable
    ]
    if missing:
        raise GradientError(
            f"{len(missing)} parameters got no gradient: {', '.join(missing[:8])}{', ...' if missing[8:] else ''}."
            " Every trainable parameter must take part in the loss, or a synchronised gradient would silently be wrong."
            " Freeze them (requires_grad_(False) before setup_model), or write"
            " value_and_grad(rt, loss_fn, allow_unused=True)."
        )


def separate(slots: Iterable[torch.Tensor]) -> int:
    """Give gradients that share memory memory of their own, before the next micro-batch is added to them.

    Autograd hands out views of one tensor where a sum broadcasts two parameters (`a.unsqueeze(0) + b.unsqueeze(0)`).

    Returns:
        How many of the slots have a gradient: what is added to these later is added in place.
    """
    if tracing():  # there is no memory yet
        held = [slot for slot in slots if slot.grad is not None]
        for slot in held:
            slot.grad = cast(torch.Tensor, slot.grad).clone()
        return len(held)
    grads = [(local_of(slot.grad), slot) for slot in slots if slot.grad is not None]
    found = [(part.data_ptr(), part, slot) for part, slot in grads]
    end = 0
    for start, part, slot in sorted(found, key=operator.itemgetter(0)):
        if start < end and slot.grad is not None:
            slot.grad = slot.grad.clone()
        end = max(end, start + part.numel() * part.element_size())
    return len(found)
