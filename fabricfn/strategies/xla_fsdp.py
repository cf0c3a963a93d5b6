"""Sharded data parallel on XLA: one process with all devices, over which the compiler spreads one program (SPMD).

It has the annotations of torch_xla's FSDPv2: parameters, gradients and the rows of a batch are cut along their first
dimension, and so is what comes out of a unit. Every tensor is a whole one to whoever looks at it, so nothing else
changes: an annotation says where numbers are, never what they are. docs/decisions/0014-xla.md.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import torch
from torch import nn

from fabricfn.engine import Call, Frame
from fabricfn.precision import Precision
from fabricfn.strategies.functional import (
    Values,
    attach as plainly,
    forward as run_forward,
    functional,
    gradients as take,
)
from fabricfn.strategies.units import Units, plan
from fabricfn.strategies.xla_package import Spread, settle
from fabricfn.strategy import Strategy, point as point_whole
from fabricfn.tree import tree_leaves, tree_map
from fabricfn.world import World


@dataclasses.dataclass(slots=True)
class Cut(Values):
    """The handle of a frame."""

    units: tuple[str, ...] = ()
    """The names of the sub-modules whose outputs are cut."""


def xla_fsdp(*, units: Units = "auto") -> Strategy:
    """Parameters, gradients and optimizer state cut over all devices of XLA, which one process drives (FSDPv2, SPMD).

    The package is torch_xla (`pip install "fabricfn[xla]"`), with its torch 2.9. `init_runtime(strategy="xla_fsdp")`
    means `accelerator="xla"`, and the world is one rank, whatever the number of devices. The leaves of `Model`, `Grads`
    and of the optimizer's state are plain tensors of their whole shape, whose memory is spread over the devices. So
    losses, optimizers and checkpoints are those of one device, and so is the result, up to rounding.

    Args:
        units: after which sub-modules the rows stay on their devices: "auto" for the repeated blocks of lists, a module
            class or a tuple of them, a predicate `(name, module) -> bool`, or None, which leaves it to the compiler.

    Raises:
        CapabilityError: (from init_runtime) torch_xla is missing, or does not fit this torch.

    Example:
        >>> xla_fsdp().name, xla_fsdp().max_ranks
        ('xla_fsdp', 1)
    """

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Cut | None:
        plain = plainly(net, world, precision, frozen=frozen)
        return plain and Cut(plain.places, plain.reduce_dtype, units=plan(net, units))

    return dataclasses.replace(
        functional(),
        name="xla_fsdp",
        max_ranks=1,
        attach=attach,
        forward=forward,
        gradients=gradients,
        point=point,
        settle=settle,
    )


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, with the rows of the batch and of what comes out of units on their devices."""
    settle()
    spread = Spread()
    if type(fn) is Call:
        for leaf in tree_leaves(cast("Call", fn).values):
            spread.cut(leaf)
    with rows_stay(frames, spread):
        return run_forward(frames, fn, sync=sync, loss_fn=loss_fn)


@contextlib.contextmanager
def rows_stay(frames: Sequence[Frame], spread: Spread) -> Generator[None]:
    """Cut the outputs of units. The hooks go with the block: a net that is copied later must not know of devices."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(spread.cut_in_graph, output)

    names = [(frame.net, name) for frame in frames if frame.handle is not None for name in frame.handle.units]
    hooks = [net.get_submodule(name).register_forward_hook(hook) for net, name in names]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """The gradients, cut as the parameters are."""
    taken = take(frames, world, allow_unused=allow_unused)
    spread = Spread()
    for grad in (grad for grads in taken for grad in grads):
        spread.cut(grad)
    settle()
    return taken


def point(frame: Frame, values: Sequence[torch.Tensor]) -> None:
    """The slots are the values, each cut if it was not."""
    spread = Spread()
    for value in values:
        spread.cut(value)
    point_whole(frame, values)
