"""Replicated data parallel on torch's own C++ reducer (`DistributedDataParallel`), without wrapping the user's module.

The reducer is tied to the slots of a frame; the module that it drives is a `Box` whose forward calls the user's loss
function, so any method and any number of forwards is synchronised. Laws and traps were measured on torch 2.13 with
gloo: see docs/decisions/0003-ddp.md.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fabricfn.engine import Box, Frame
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.precision import Precision
from fabricfn.strategies.single import backward as run_backward, gradients as take, local_gradients
from fabricfn.strategy import Strategy, allowed
from fabricfn.world import World

OURS = frozenset(
    [
        *("module", "process_group", "device_mesh", "init_sync", "broadcast_buffers", "forward_sync_buffers"),
        *("device_ids", "output_device", "dim"),
    ]
)
"""Arguments of DistributedDataParallel that fabricfn decides: values and buffers are explicit in records."""

PARAMETERS = frozenset(inspect.signature(DistributedDataParallel).parameters)
KEEP_BUFFERS = {("forward_sync_buffers" if "forward_sync_buffers" in PARAMETERS else "broadcast_buffers"): False}
"""torch 2.13 renamed the option and warns at the old name."""

_all_reduce: Any = dist.all_reduce  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


@dataclasses.dataclass(slots=True)
class Reducer:
    """The handle of a frame: the engine, and for a static graph the one loss function that it serves."""

    ddp: DistributedDataParallel
    loss_fn: Any = None
    backwards: int = 0


def ddp(*, comm_hook: Callable[..., Any] | None = None, comm_state: object = None, **options: Any) -> Strategy:
    """Replicas on every rank, gradients averaged in buckets while the backward pass runs.

    Args:
        comm_hook: a DDP communication hook `(comm_state, bucket) -> Future`, for instance from
            `torch.distributed.algorithms.ddp_comm_hooks`.
        comm_state: its first argument.
        **options: any further option of torch's `DistributedDataParallel`: `bucket_cap_mb`,
            `find_unused_parameters` (needed for `allow_unused=True`), `static_graph` (one loss function per model),
            `gradient_as_bucket_view` (gradients are copied out, so they stay yours), ...

    Raises:
        ConfigurationError: an option that torch does not have, or that fabricfn decides itself.

    Example:
        >>> ddp(find_unused_parameters=True).name
        'ddp'
    """
    known = PARAMETERS - OURS
    if unknown := sorted(set(options) - known):
        raise ConfigurationError(f"ddp() has no option {', '.join(unknown)}; there are {', '.join(sorted(known))}.")

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Reducer | None:
        hook, state = hook_for(precision.reduce_dtype, world, comm_hook, comm_state)
        if frozen or world.group is None or not any(slot.requires_grad for slot in net.parameters()):
            return None
        module = DistributedDataParallel(
            Box(net), process_group=world.group, init_sync=False, **KEEP_BUFFERS, **options
        )
        if hook is not None:
            module.register_comm_hook(state, hook)
        if not options.get("find_unused_parameters"):
            # Left alone, the reducer re-orders its buckets after the first backward, and with three or more ranks the
            # sums then differ in their last bits from call to call, and with what ran first.
            module.reducer._push_all_rebuilt_params()
            module.reducer._rebuild_buckets()
        return Reducer(module)

    copies = bool(options.get("gradient_as_bucket_view"))

    def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
        taken = take(frames, world, allow_unused=allow_unused)
        if copies:
            taken = [[grad if grad is None else grad.clone() for grad in grads] for grads in taken]
        return taken

    return Strategy(
        name="ddp",
        attach=attach,
        forward=forward,
        backward=backward,
        gradients=gradients,
        # without a forward pass of its own the reducer lets gradients pass; a static graph insists on one
        local_gradients=refuse_local if comm_hook is not None or options.get("static_graph") else local_gradients,
        check_unused=allowed if options.get("find_unused_parameters") else refuse_unused,
        check_transform=refuse_transform,
    )


def hook_for(
    dtype: torch.dtype | None, world: World, comm_hook: Callable[..., Any] | None, comm_state: object
) -> tuple[Callable[..., Any] | None, object]:
    """(the hook that reduces buckets, its first argument)."""
    if dtype is None:
        return comm_hook, comm_state
    if comm_hook is not None:
        raise ConfigurationError(
            f"ddp(comm_hook=...) decides by itself in which dtype gradients travel, and Precision(reduce_dtype={dtype})"
            " says another. Leave one of them out."
        )
    return mean_in, (dtype, world)


def mean_in(
    state: tuple[torch.dtype, World],
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]  # torch demands the annotation
) -> torch.futures.Future[torch.Tensor]:
    """A communication hook: the mean over ranks, computed in another dtype."""
    dtype, world = state
    buffer = bucket.buffer()
    # divided first, as DDP does it: a sum of 16-bit floats may overflow
    sent = buffer.to(dtype if buffer.is_floating_point() else buffer.dtype) / world.world_size
    work: Any = _all_reduce(sent, group=world.group, async_op=True)

    def cast_back(future: Any) -> torch.Tensor:
        return buffer.copy_(future.value()[0])

    return work.get_future().then(cast_back)


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, inside the boxes of all frames."""
    if not frames:
        return fn()
    frame, *others = frames
    reducer: Reducer | None = frame.handle
    if reducer is None or not (sync or reducer.ddp.static_graph):
        # Only a forward pass of its own makes the reducer expect gradients: without one, its hooks let them pass. This
        # is `no_sync`, without the price of DDP's forward (50 us).
        if reducer is not None:
            reducer.ddp.require_backward_grad_sync = False
        return forward(others, functools.partial(fn, frame.net), sync=sync, loss_fn=loss_fn)
    module = reducer.ddp
    if module.static_graph:
        serve_one_loss(reducer, loss_fn)
    # torch fails on a static graph whose first backward is not synchronised
    module.require_backward_grad_sync = sync or (module.static_graph and reducer.backwards == 0)

    def inside(net: nn.Module) -> Any:
        return forward(others, functools.partial(fn, net), sync=sync, loss_fn=loss_fn)

    return module(inside)


def serve_one_loss(reducer: Reducer, loss_fn: Any) -> None:
    """Raise when a static graph meets a second loss function: torch would return unsynchronised gradients."""
    if reducer.loss_fn is None:
        reducer.loss_fn = loss_fn
    if reducer.loss_fn is not loss_fn:
        raise CapabilityError(
            f"ddp(static_graph=True) serves one loss function per model: this one was set up with {reducer.loss_fn!r}"
            f" and is now used with {loss_fn!r}. Use ddp() without static_graph, or set the model up once per loss."
        )


def backward(frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
    """Accumulate into the slots' `.grad`; the reducer averages them meanwhile."""
    run_backward(frames, loss, share=share)
    for frame in frames:
        if frame.handle is not None and frame.handle.ddp.require_backward_grad_sync:
            frame.handle.backwards += 1


def refuse_unused() -> None:
    """`allow_unused=True` needs a reducer that looks for unused parameters."""
    raise CapabilityError(
        "allow_unused=True needs a reducer that looks for unused parameters. Write"
        " strategy=ff.strategies.ddp(find_unused_parameters=True)."
    )


def refuse_local(frames: Sequence[Frame]) -> list[list[torch.Tensor | None]]:
    """A communication hook would never be called, and a static graph synchronises its first backward by itself."""
    raise CapabilityError(
        'reduce="canonical" goes past torch\'s reducer, which comm_hook and static_graph=True belong to. Write'
        ' strategy="ddp" without them, or accumulate(..., reduce="mean").'
    )


def refuse_transform() -> None:
    """Functions of torch.func bypass the reducer's hooks."""
    raise CapabilityError(
        "a torch.func transform over a ddp model would return this rank's own gradients without any error: the"
        ' reducer works in hooks of loss.backward(). Write strategy="functional", or ff.value_and_grad.'
    )
