"""Replicated data parallel without torch's reducer: gradients travel in flat buckets while the backward pass runs.

The buckets are planned once, from the last parameter to the first, and are sent in that order on every rank, so the
same inputs give the same bits on any number of ranks. Where one bucket holds everything there are no hooks. What it
costs beside `ddp`: docs/benchmarks.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fabricfn.engine import Frame, require_all
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.flat import anywhere
from fabricfn.flat.buckets import join, split
from fabricfn.flat.wire import divide, sum_in_place
from fabricfn.precision import Precision
from fabricfn.strategies.single import backward, forward as run_forward, gradients as take, local_gradients
from fabricfn.strategy import Strategy
from fabricfn.world import World

FIRST = 1 << 20
"""Bytes of the first bucket at most, so that the first message leaves early; a net that is smaller has no other."""


@dataclasses.dataclass(slots=True, eq=False)
class Bucket:
    """Parameters whose gradients are one message: one dtype and device."""

    slots: list[nn.Parameter]
    places: list[int]
    """Their positions in the frame."""
    memory: torch.Tensor | None = None
    """What is sent lies here, in every pass: fresh pages would cost more than the copy."""
    arrived: set[int] = dataclasses.field(default_factory=set[int])
    buffer: torch.Tensor | None = None
    """What was sent; None before."""
    work: Any = None


@dataclasses.dataclass(slots=True, eq=False)
class Run:
    """The messages of one synchronised backward pass, over all frames, in the order in which every rank sends them."""

    buckets: list[Bucket]
    group: Any
    dtype: torch.dtype | None
    sent: int = 0
    late: bool = False
    """Whether a gradient came, or came again, after its bucket was sent: a backward pass inside the loss function."""


@dataclasses.dataclass(slots=True, eq=False)
class Sender:
    """The handle of a frame."""

    buckets: list[Bucket]
    group: Any
    dtype: torch.dtype | None
    """In which means are computed; None is the gradients' own."""
    run: Run | None = None
    """The synchronised pass under way; hooks let gradients of others pass."""


def flat(*, bucket_cap_mb: float = 25.0) -> Strategy:
    """Replicas on every rank, gradients averaged in flat buckets that are sent while the backward pass runs.

    It does what `ddp` does, any unused parameters included, with less around it; torch's options and communication
    hooks belong to `ddp`.

    Args:
        bucket_cap_mb: the size of a message, in MiB; the first one has 1 at most.

    Raises:
        ConfigurationError: the size is no positive number.

    Example:
        >>> flat(bucket_cap_mb=10).name
        'flat'
    """
    if not bucket_cap_mb > 0:
        raise ConfigurationError(f"flat(bucket_cap_mb={bucket_cap_mb!r}) must be a positive number of MiB.")
    return Strategy(
        name="flat",
        attach=functools.partial(attach, full=int(bucket_cap_mb * 2**20)),
        forward=forward,
        backward=backward,
        gradients=gradients,
        reset=reset,
        local_gradients=local_gradients,
    )


def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool, full: int) -> Sender | None:
    """The plan of the buckets; hooks where there are several, that send one as soon as it is full."""
    slots = list(net.parameters())
    if frozen or world.group is None or not any(slot.requires_grad for slot in slots):
        return None
    sender = Sender(buckets=plan(slots, full), group=world.group, dtype=precision.reduce_dtype)
    if len(sender.buckets) > 1:
        for bucket in sender.buckets:
            for index, slot in enumerate(bucket.slots):
                slot.register_post_accumulate_grad_hook(functools.partial(arrive, sender, bucket, index))
    return sender


def plan(slots: Sequence[nn.Parameter], full: int) -> list[Bucket]:
    """Buckets from the last parameter to the first: about the order in which a backward pass reaches them.

    Args:
        slots: the parameters of a net.
        full: bytes of a bucket; one parameter may be larger.
    """
    buckets: list[Bucket] = []
    open_ones: dict[tuple[torch.dtype, torch.device], tuple[Bucket, int]] = {}
    for place in reversed(range(len(slots))):
        slot = slots[place]
        if not slot.requires_grad:
            continue
        key = (slot.dtype, slot.device)
        bucket, filled = open_ones.get(key, (None, 0))
        cap = min(FIRST, full) if bucket is not None and bucket is buckets[0] else full
        if bucket is None or filled + slot.nbytes > cap:
            bucket, filled = Bucket([], []), 0
            buckets.append(bucket)
        bucket.slots.append(slot)
        bucket.places.append(place)
        open_ones[key] = (bucket, filled + slot.nbytes)
    return buckets


def arrive(sender: Sender, bucket: Bucket, index: int, slot: torch.Tensor) -> None:
    """A hook: the gradient of this slot is whole."""
    run = sender.run
    if run is None:
        return
    if bucket.buffer is not None:
        run.late = True
        return
    bucket.arrived.add(index)
    while run.sent < len(run.buckets) and len(run.buckets[run.sent].arrived) == len(run.buckets[run.sent].slots):
        send(run)


def send(run: Run) -> None:
    """Send the next bucket, with zeros where there is no gradient."""
    bucket = run.buckets[run.sent]
    grads = [torch.zeros_like(slot) if slot.grad is None else slot.grad for slot in bucket.slots]
    if any(grad.layout is not torch.strided for grad in grads):
        raise CapabilityError('strategy="flat" sends dense gradients alone, and one is sparse. Write strategy="ddp".')
    buffer = filled(bucket, grads)
    if run.dtype is not None and buffer.is_floating_point():
        buffer = buffer.to(run.dtype)
    divide(buffer, run.group, "mean", early=True)
    bucket.buffer, bucket.work = buffer, sum_in_place(buffer, run.group)
    run.sent += 1


def filled(bucket: Bucket, grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The gradients side by side, in the memory of the bucket; one alone in fresh memory, which will be handed out."""
    if len(grads) == 1:
        return join(grads)
    if bucket.memory is None:
        bucket.memory = join(grads)
    else:
        torch.cat([grad.reshape(-1) for grad in grads], out=bucket.memory)
    return bucket.memory


def send_rest(run: Run) -> None:
    """Send all that was not: the ranks may have come to different places, where one lacks a gradient."""
    while run.sent < len(run.buckets):
        send(run)


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, plainly; the hooks are told whether the backward pass that follows is synchronised."""
    senders = [frame.handle for frame in frames if frame.handle is not None]
    for sender in senders:
        clear(sender)
    if sync and senders:
        buckets = [bucket for sender in senders for bucket in sender.buckets]
        run = Run(buckets=buckets, group=senders[0].group, dtype=senders[0].dtype)
        for sender in senders:
            sender.run = run
    return run_forward(frames, fn, sync=sync, loss_fn=loss_fn)


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """Send what is left, wait for all, and cut the means out."""
    senders = [frame.handle for frame in frames if frame.handle is not None]
    if world.group is None or not senders:
        return take(frames, world, allow_unused=allow_unused)
    run: Run = senders[0].run
    if not allow_unused:
        require_all(frames, [[slot.grad for slot in frame.slots] for frame in frames])
    send_rest(run)
    if run.late:  # the sums are still in the slots, on every rank
        for bucket in run.buckets:
            finished(bucket)
        run.sent = 0
        send_rest(run)
    present = [slot.grad is not None for frame in frames for slot in frame.slots]
    used = anywhere(present, world.group, world.wire) if allow_unused else present
    flags = iter(used)
    found: list[list[torch.Tensor | None]] = []
    for frame in frames:
        means: list[torch.Tensor | None] = [None] * len(frame.slots)
        for slot in frame.slots:  # what was sent is a copy
            slot.grad = None
        for bucket in () if frame.handle is None else frame.handle.buckets:
            buffer = finished(bucket)
            divide(buffer, world.group, "mean", early=False)
            shapes = [slot.shape for slot in bucket.slots]
            split(buffer.to(bucket.slots[0].dtype), shapes, bucket.places, means)
        found.append([mean if next(flags) else None for mean in means])
        reset(frame)
    return found


def finished(bucket: Bucket) -> torch.Tensor:
    """The sum, once it is there; the bucket is empty again."""
    assert bucket.buffer is not None
    buffer = bucket.buffer
    if bucket.work is not None:
        bucket.work.wait()
    bucket.buffer = bucket.work = None
    return buffer


def reset(frame: Frame) -> None:
    """No pass under way."""
    if frame.handle is not None:
        clear(frame.handle)


def clear(sender: Sender) -> None:
    """Let go of a pass, also of one that was left in the middle."""
    sender.run = None
    for bucket in sender.buckets:
        bucket.arrived.clear()
        bucket.buffer = bucket.work = None
