"""Replicated data parallel on torch's own C++ reducer (`DistributedDataParallel`), without wrapping the user's module.

The reducer is tied to the slots of a frame; the module that it drives is a `Box` whose forward calls the user's loss
function, so any method and any number of forwards is synchronised. Laws and traps were measured on torch 2.13 with
gloo: see docs/decisions/0003-ddp.md.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fabricfn.engine import Box, Frame
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.precision import Precision
from fabricfn.strategies.single import backward as run_backward, gradients as take, local_gradients
from fabricfn.strategy import Strategy, allowed
from fabricfn.world import World

OURS = {
    **dict.fromkeys(("module", "process_group", "device_mesh", "device_ids", "output_device"), "the runtime says it"),
    **dict.fromkeys(("init_sync", "dim", "check_reduction"), "values are explicit here, and so is their start"),
    **dict.fromkeys(
        ("broadcast_buffers", "forward_sync_buffers"), 'write value_and_grad(..., buffers="rank0", "mean" or "local")'
    ),
    "mixed_precision": 'write init_runtime(precision="bf16-mixed"), or Precision(reduce_dtype=...)',
    **dict.fromkeys(
        ("delay_all_reduce_named_params", "param_to_hook_all_reduce"), "the reducer is tied to parameters of our own"
    ),
}
"""Arguments of DistributedDataParallel that fabricfn decides, and where."""

PARAMETERS = frozenset(inspect.signature(DistributedDataParallel).parameters)
KEEP_BUFFERS = {("forward_sync_buffers" if "forward_sync_buffers" in PARAMETERS else "broadcast_buffers"): False}
"""torch 2.13 renamed the option and warns at the old name."""

HOOKS: dict[str, torch.dtype | None] = {"bf16": torch.bfloat16, "fp16": torch.float16, "powersgd": None}
"""The hooks that have names, and the dtype in which their gradients travel. torch's own bf16 hook refuses gloo."""

_power_hook: Any = powerSGD_hook
_all_reduce: Any = dist.all_reduce  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


@dataclasses.dataclass(slots=True)
class Reducer:
    """The handle of a frame: the engine, and for a static graph the one loss function that it serves."""

    ddp: DistributedDataParallel
    loss_fn: Any = None
    backwards: int = 0


def ddp(
    *,
    comm_hook: str | Callable[..., Any] | None = None,
    comm_state: Any = None,
    shard_optimizer: bool = False,
    **options: Any,
) -> Strategy:
    """Replicas on every rank, gradients averaged in buckets while the backward pass runs.

    Args:
        comm_hook: how gradients travel: "bf16" or "fp16" (rounded to 16 bits on the way, on every back end), "powersgd"
            (matrices of low rank; see below), or a DDP communication hook `(comm_state, bucket) -> Future`. "powersgd"
            keeps state from call to call, so the law of purity does not hold with it.
        comm_state: the hook's first argument; for "powersgd" a dict of options of torch's `PowerSGDState`, for instance
            `{"matrix_approximation_rank": 4, "start_powerSGD_iter": 100}`.
        shard_optimizer: each rank keeps the optimizer's state for a part of every parameter, steps that part, and sends
            it to the others (ZeRO stage 1): the same bits, and the state's memory divided by the number of ranks. For
            optimizers that work number by number, as under fsdp. `opt.state` shows sharded tensors.
        **options: any further option of torch's `DistributedDataParallel`: `bucket_cap_mb`,
            `find_unused_parameters` (needed for `allow_unused=True`), `static_graph` (one loss function per model),
            `gradient_as_bucket_view` (gradients are copied out, so they stay yours), ...

    Raises:
        ConfigurationError: an option that torch does not have, that fabricfn decides itself, or without a meaning.

    Example:
        >>> ddp(find_unused_parameters=True, comm_hook="bf16").name
        'ddp'
    """
    check_options(options)
    check_hook(comm_hook, comm_state)
    if type(shard_optimizer) is not bool:
        raise ConfigurationError(f"ddp(shard_optimizer={shard_optimizer!r}) must be True or False.")

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Reducer | None:
        hook, state = hook_for(precision.reduce_dtype, world, comm_hook, comm_state)
        if frozen or world.group is None or not any(slot.requires_grad for slot in net.parameters()):
            return None
        if comm_hook == "powersgd":
            refuse_scalars(net)
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
        shard_optimizer=shard_optimizer,
        # without a forward pass of its own the reducer lets gradients pass; a static graph insists on one
        local_gradients=refuse_local if comm_hook is not None or options.get("static_graph") else local_gradients,
        check_unused=allowed if options.get("find_unused_parameters") else refuse_unused,
        check_transform=refuse_transform,
    )


def check_options(options: dict[str, Any]) -> None:
    """Raise `ConfigurationError` unless torch takes these options and fabricfn leaves them to the user."""
    for name in options:
        if name in OURS:
            raise ConfigurationError(f"ddp({name}=...) is decided by fabricfn: {OURS[name]}.")
    known = sorted(PARAMETERS - OURS.keys())
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"ddp() has no option {name}; there are {', '.join(known)}.{hint}")
        default = inspect.signature(DistributedDataParallel).parameters[name].default
        if type(default) is bool and type(value) is not bool:
            raise ConfigurationError(f"ddp({name}={value!r}) must be True or False.")
    size = options.get("bucket_cap_mb")
    if size is not None and not (isinstance(size, int | float) and size > 0):
        raise ConfigurationError(f"ddp(bucket_cap_mb={size!r}) must be a positive number of MiB; torch's own is 25.")


def check_hook(comm_hook: Any, comm_state: Any) -> None:
    """Raise `ConfigurationError` unless it is a hook, or the name of one."""
    if isinstance(comm_hook, str):
        if comm_hook not in HOOKS:
            raise ConfigurationError(
                f"comm_hook={comm_hook!r} is unknown; there are {', '.join(map(repr, HOOKS))}, or a function"
                " (comm_state, bucket) -> Future."
            )
        if comm_state is not None and not (comm_hook == "powersgd" and type(comm_state) is dict):
            raise ConfigurationError(
                f'comm_hook={comm_hook!r} has no comm_state; a dict of options belongs to "powersgd" alone.'
            )
        if comm_hook == "powersgd":
            power_state(None, cast("dict[str, Any] | None", comm_state))
    elif comm_hook is not None and not callable(comm_hook):
        raise ConfigurationError(f"comm_hook={comm_hook!r} is neither a function nor one of {', '.join(HOOKS)}.")


def power_state(group: Any, options: dict[str, Any] | None) -> PowerSGDState:
    """The state of one reducer.

    Raises:
        ConfigurationError: an option that torch does not have or refuses.
    """
    try:
        return PowerSGDState(group, **(options or {}))
    except (TypeError, ValueError) as error:
        known = [*inspect.signature(PowerSGDState).parameters][1:]
        raise ConfigurationError(f"comm_state={options!r}: {error}. There are {', '.join(known)}.") from error


def refuse_scalars(net: nn.Module) -> None:
    """Raise `CapabilityError` where torch's low-rank hook would fail with an IndexError in the middle of training."""
    scalars = [name for name, slot in net.named_parameters() if slot.requires_grad and slot.dim() == 0]
    if scalars:
        raise CapabilityError(
            f'ddp(comm_hook="powersgd") cannot serve parameters without dimensions: {", ".join(scalars[:8])}. Give'
            ' them the shape (1,), or write comm_hook="bf16".'
        )


def hook_for(
    dtype: torch.dtype | None, world: World, comm_hook: str | Callable[..., Any] | None, comm_state: Any
) -> tuple[Callable[..., Any] | None, Any]:
    """(the hook that reduces buckets, its first argument)."""
    if dtype is not None and comm_hook is not None:
        raise ConfigurationError(
            f"ddp(comm_hook=...) decides by itself in which dtype gradients travel, and Precision(reduce_dtype={dtype})"
            " says another. Leave one of them out."
        )
    if comm_hook == "powersgd":
        return _power_hook, power_state(world.group, comm_state)
    if isinstance(comm_hook, str):
        return mean_in, (HOOKS[comm_hook], world)
    return (comm_hook, comm_state) if dtype is None else (mean_in, (dtype, world))


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
