"""One process, one device: the oracle that every other strategy is compared with."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.autograd import Variable

from fabricfn.engine import Frame, require_all
from fabricfn.precision import Precision
from fabricfn.sharding import local_of
from fabricfn.strategy import Strategy
from fabricfn.world import World

_run_backward = cast("Callable[..., Any]", Variable._execution_engine.run_backward)  # pyright: ignore[reportUnknownMemberType]


def single() -> Strategy:
    """The strategy of a world of one."""
    return Strategy(
        name="single",
        max_ranks=1,
        attach=attach,
        forward=forward,
        backward=backward,
        gradients=gradients,
        local_gradients=local_gradients,
    )


def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> None:
    """Nothing to tie."""


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, plainly."""
    if len(frames) == 1:
        return fn(frames[0].net)
    return fn(*[frame.net for frame in frames])


def backward(frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
    """Accumulate into the slots' `.grad`.

    On the CPU this is the core of `loss.backward()`: what stands around it there (tensor sub-classes, many roots,
    handing the compiler's settings to the threads of accelerators) costs 25 us of a 160 us pass (4 layers of 32).
    """
    if share != 1:
        held = [local_of(slot.grad) for frame in frames for slot in frame.slots if slot.grad is not None]
        torch._foreach_mul_(held, share)  # pyright: ignore[reportPrivateImportUsage]
    if loss.is_cpu:
        one = frames[0].one
        if one is None or one._version or one.dtype is not loss.dtype:  # a hook of the user's may write into it
            frames[0].one = one = torch.ones_like(loss)
        root = one if share == 1 else one * share
        _run_backward((loss,), (root,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:
        loss.backward(torch.full_like(loss, share))


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """Take `.grad` away from the slots, without a copy."""
    taken: list[list[torch.Tensor | None]] = []
    complete = True
    for frame in frames:
        grads: list[torch.Tensor | None] = []
        for slot in frame.slots:
            grad = slot.grad
            if grad is None:
                complete = False
            else:
                slot.grad = None
            grads.append(grad)
        taken.append(grads)
    if not (complete or allow_unused):
        require_all(frames, taken)
    return taken


def local_gradients(frames: Sequence[Frame]) -> list[list[torch.Tensor | None]]:
    """The same, whichever are missing."""
    return gradients(frames, World(), allow_unused=True)
