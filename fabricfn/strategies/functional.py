"""The readable definition: fresh leaves, `torch.autograd.grad`, one flat all-reduce. Pure by construction.

No hook, no hidden state: the gradients of values, then their mean over ranks. Every other strategy must agree with it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from fabricfn.engine import Frame, require_all
from fabricfn.errors import CapabilityError
from fabricfn.flat import all_reduce_mean, anywhere
from fabricfn.precision import Precision
from fabricfn.strategy import Strategy
from fabricfn.world import World

_kernels: Any = torch
"""The functions on lists of tensors have no types."""


@dataclasses.dataclass(slots=True)
class Values:
    """The handle of a frame: the leaves of the run under way and the sums of their gradients."""

    places: list[tuple[dict[str, Any], str, int]]
    """Where each parameter hangs, and its index; several places for a tied one."""
    reduce_dtype: torch.dtype | None
    leaves: list[torch.Tensor] | None = None
    sums: list[torch.Tensor | None] = dataclasses.field(default_factory=list[torch.Tensor | None])


def functional() -> Strategy:
    """Replicas on every rank, gradients of pure functions, averaged by one explicit collective after the backward."""
    return Strategy(
        name="functional",
        attach=attach,
        forward=forward,
        backward=backward,
        gradients=gradients,
        local_gradients=local_gradients,
    )


def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Values | None:
    """Where the parameters hang."""
    if frozen:
        return None
    index = {slot: index for index, slot in enumerate(net.parameters())}
    held = [cast("dict[str, Any]", module._parameters) for module in net.modules()]
    places = [(slots, name, index[slot]) for slots in held for name, slot in slots.items() if slot is not None]
    return Values(places, precision.reduce_dtype)


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, with fresh leaves in place of their parameters.

    That is `torch.func.functional_call`, which looks for every parameter by its name again, twice in each call: 80 us
    for 4 layers, of 340 us in all.
    """
    swapped: list[tuple[Values, list[nn.Parameter]]] = [(f.handle, f.slots) for f in frames if f.handle is not None]
    try:
        for values, slots in swapped:
            if values.leaves is None:
                values.leaves = [slot.detach().requires_grad_(slot.requires_grad) for slot in slots]
                values.sums = [None] * len(slots)
            hang(values, values.leaves)
        return fn(*[frame.net for frame in frames])
    finally:
        for values, slots in swapped:
            hang(values, slots)


def hang(values: Values, tensors: Sequence[torch.Tensor]) -> None:
    """Put these in the places of the parameters."""
    for slots, name, index in values.places:
        slots[name] = tensors[index]


def backward(frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
    """Add the gradients with respect to the leaves; and to the slots, which a module may keep in a list of its own."""
    refuse_inner_backward(loss)
    inputs: list[torch.Tensor] = []
    sums: list[tuple[Values, int]] = []
    for frame in frames:
        values: Values = frame.handle
        for index, (leaf, slot) in enumerate(zip(values.leaves or (), frame.slots, strict=True)):
            if leaf.requires_grad:
                inputs += (leaf, slot)
                sums += ((values, index),) * 2
    found = cast("list[torch.Tensor | None]", [*torch.autograd.grad(loss, inputs, allow_unused=True)])
    for at, (values, index) in enumerate(sums):
        old, new, found[at] = values.sums[index], found[at], None  # let go of, once it is copied
        if new is not None:  # a copy of its own: autograd hands the same tensor to both terms of a sum
            values.sums[index] = new.clone() if old is None else old.add_(new)
    if share != 1:
        held = [grad for frame in frames for grad in frame.handle.sums if grad is not None]
        _kernels._foreach_mul_(held, share)


def refuse_inner_backward(loss: torch.Tensor) -> None:
    """Raise `CapabilityError` when the graph holds a backward pass of its own, which pure gradients cannot see."""
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise CapabilityError(
                "reentrant checkpointing runs a backward pass of its own, which pure gradients cannot see. Write"
                ' checkpoint(..., use_reentrant=False), or strategy="ddp".'
            )
        todo += [node for node, _ in node.next_functions]


def mean_in(dtype: torch.dtype | None, grads: Sequence[torch.Tensor], group: Any) -> Sequence[torch.Tensor]:
    """The means over ranks, computed in `dtype`, in the gradients' own dtypes."""
    if dtype is None:
        return all_reduce_mean(grads, group)
    cast_down = [grad.to(dtype) if grad.is_floating_point() else grad for grad in grads]
    return [mean.to(grad.dtype) for mean, grad in zip(all_reduce_mean(cast_down, group), grads, strict=True)]


def gradients(
    frames: Sequence[Frame], world: World, *, allow_unused: bool, mean: Callable[..., Sequence[torch.Tensor]] = mean_in
) -> list[list[torch.Tensor | None]]:
    """The sums, averaged over ranks by `mean`."""
    handles: list[Values] = [frame.handle for frame in frames]
    taken = [values.sums for values in handles]
    for values in handles:
        values.leaves, values.sums = None, []
    if not allow_unused:
        require_all(frames, taken)
    if world.group is None:
        return taken
    flat = [grad for grads in taken for grad in grads]
    slots = [slot for frame in frames for slot in frame.slots]
    if allow_unused:
        used = anywhere([grad is not None for grad in flat], world.group, world.wire)
        flat = [
            torch.zeros_like(slot) if somewhere and grad is None else grad
            for grad, slot, somewhere in zip(flat, slots, used, strict=True)
        ]
    means = iter(mean(handles[0].reduce_dtype, [grad for grad in flat if grad is not None], world.group))
    reduced = iter([None if grad is None else next(means) for grad in flat])
    return [[next(reduced) for _ in grads] for grads in taken]


def local_gradients(frames: Sequence[Frame]) -> list[list[torch.Tensor | None]]:
    """The sums of this rank, whichever are missing."""
    return gradients(frames, World(), allow_unused=True)
