"""What a strategy is: a record of functions, like optax's `GradientTransformation`. There is no base class.

Laws, which `tests/test_laws.py` holds for every row of its table:

* `forward(frames, fn, ...)` returns `fn(*nets)`, whatever `fn` computes: any method, any number of forwards.
* after `backward` of the last micro-batch, `gradients` returns, for each frame and each slot, the mean over all ranks
  of the ranks' summed gradients, in memory of its own, and leaves no gradient behind.
* the same inputs give the same bits, whatever ran before.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fabricfn.engine import Frame
from fabricfn.errors import CapabilityError
from fabricfn.precision import Precision
from fabricfn.world import World


class Attach(Protocol):
    """Ties an engine to a net."""

    def __call__(self, net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Any:
        """Tie the machinery of synchronisation to the parameters of `net`; the handle, or None. Called by every rank.

        A frozen net is a constant of a loss, or is there for `apply`: it needs machinery only where values are sharded.
        `gradients` then averages over ranks in `precision.reduce_dtype`, if that is set.
        """
        ...


class Forward(Protocol):
    """Runs a function of the nets."""

    def __call__(self, frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
        """`fn(*nets)`, such that the backward pass synchronises when `sync`.

        `loss_fn` is what the user passed: some engines serve one loss function only.
        """
        ...


class Backward(Protocol):
    """Runs the backward pass."""

    def __call__(self, frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
        """Add the gradients of `loss` to those that the frames already hold, and multiply the sum by `share`.

        Before anything is synchronised: the last of k micro-batches comes with a share of 1/k, so that every rank
        brings the mean of its own.
        """
        ...


class Gradients(Protocol):
    """Hands the synchronised gradients over."""

    def __call__(self, frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
        """Take the gradients away: one list a frame, one entry a slot, the mean over ranks.

        None for a frozen slot; with `allow_unused` also where no rank had a gradient, otherwise that is an error.
        """
        ...


class Point(Protocol):
    """Binds a frame to values."""

    def __call__(self, frame: Frame, values: Sequence[torch.Tensor]) -> None:
        """Let the slots of the frame look at the values, which fit them. Not collective."""
        ...


class Shard(Protocol):
    """Cuts a parameter."""

    def __call__(self, whole: torch.Tensor, slot: nn.Parameter) -> torch.Tensor:
        """The part of `whole` that this rank holds, as the value of `slot`, in memory of its own. Not collective."""
        ...


def point(frame: Frame, values: Sequence[torch.Tensor]) -> None:
    """The slots are the values, without a copy."""
    for slot, value in zip(frame.slots, values, strict=True):
        slot.data = value


class LocalGradients(Protocol):
    """Hands over what this rank alone has computed."""

    def __call__(self, frames: Sequence[Frame]) -> list[list[torch.Tensor | None]]:
        """Take away the gradients that `forward(sync=False)` and `backward(share=1)` left, not synchronised.

        One list a frame, one entry a slot; None for a frozen slot and where the loss does not depend on one. Without
        frames it does nothing but raise `CapabilityError` where the strategy cannot do it.
        """
        ...


def allowed() -> None:
    """The check of a strategy that has nothing to refuse."""


def at_once() -> None:
    """Operations have been computed, or are on their way, when they return."""


def refuse_local(frames: Sequence[Frame]) -> list[list[torch.Tensor | None]]:
    """For strategies whose ranks never hold whole gradients of their own."""
    raise CapabilityError(
        'reduce="canonical" adds up the whole gradients of every micro-batch, and under this strategy no rank holds'
        ' them. Write init_runtime(strategy="ddp"), or "functional", or accumulate(..., reduce="mean").'
    )


def as_they_are(world: World) -> World:
    """The layout of a strategy whose ranks all have data of their own."""
    return world


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How a model is trained on many devices. Write one with a factory, change one with `dataclasses.replace`."""

    name: str
    """As `init_runtime(strategy=...)` and messages call it."""
    max_ranks: int | None = None
    """The largest world that it serves; None is any."""
    attach: Attach
    forward: Forward
    backward: Backward
    gradients: Gradients
    point: Point = point
    reset: Callable[[Frame], None] | None = None
    """Makes a frame fit for use again after an exception in the middle of a run; None: a new handle is attached."""
    shard: Shard | None = None
    """This rank's part of a parameter; None where every rank holds the whole. Then all ranks must make the same passes
    through the net, since they gather it on the way."""
    shard_optimizer: bool = False
    """Where parameters are whole: cut the optimizer's state over the ranks (ZeRO stage 1)."""
    local_gradients: LocalGradients = refuse_local
    """What `reduce="canonical"` adds up by itself."""
    settle: Callable[[], None] = at_once
    """Has everything computed that was only written down; called at the end of `optimizer_step`."""
    check_unused: Callable[[], None] = allowed
    """Raises `CapabilityError` when this strategy cannot serve `allow_unused=True`."""
    check_transform: Callable[[], None] = allowed
    """Raises `CapabilityError` when a `torch.func` transform over its models would miss the synchronisation."""
    arrange: Callable[[World], World] = as_they_are
    """Lays the ranks out as a mesh, when the runtime is made: the world in terms of its data axis, see
    [Note: data axis]. Every rank calls it. Raises `ConfigurationError` when so many ranks cannot be laid out."""
