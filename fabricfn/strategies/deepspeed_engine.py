"""The DeepSpeed package as the strategy needs it: everything that a new version of it may move.

[Note: zero] An engine of ours has no optimizer of its own: the place is taken by one that does nothing, so that ZeRO
cuts parameters and gradients and moves them, and never steps. Values come in by `write`, gradients go out by `read`.
`tests/test_deepspeed.py` pins the names that are used here.
"""

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fabricfn.engine import Box
from fabricfn.errors import CapabilityError
from fabricfn.strategies.stretch import bounds_of
from fabricfn.world import World

_kernels: Any = torch
"""The functions on lists of tensors have no types."""


def package(device_type: str) -> Any:
    """The module `deepspeed`, told to compile nothing.

    Raises:
        CapabilityError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package's own imports
            import deepspeed
    except ImportError as error:
        raise CapabilityError(
            'strategy="deepspeed" needs the package deepspeed, which cannot be imported here'
            f' ({error}). Install it: DS_BUILD_OPS=0 pip install "fabricfn[deepspeed]"; or write strategy="fsdp".'
        ) from error
    loaded: Any = deepspeed
    if device_type == "cpu":  # else the first engine compiles an operation for a minute, or fails without a compiler
        loaded.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # which it calls by names that torch renamed
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    if logger.level in (logging.NOTSET, logging.INFO):
        logger.setLevel(logging.WARNING)
    return loaded


def joined(world: World) -> Any:
    """The package, whose collectives go through the process group of this world.

    Raises:
        CapabilityError: the group is not the one that torch knows as the default, which DeepSpeed takes.
    """
    if not dist.is_initialized() or world.group is not dist.group.WORLD:
        raise CapabilityError(
            "DeepSpeed talks through torch's default process group and its settings are one a process, so its ranks are"
            ' processes: fabricfn.testing.processes(n), or init_runtime(strategy="deepspeed", devices=n).'
        )
    loaded = package(world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # stage 3 reads it in every pass
    if getattr(loaded, "_fabricfn_group", None) is not world.group:
        loaded.comm.comm.cdb = None  # of a group that is no more
        loaded.utils.groups._release_process_group_references(None)
        with settled(world):
            loaded.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        loaded._fabricfn_group = world.group
    return loaded


@contextlib.contextmanager
def settled(world: World) -> Generator[None]:
    """The environment variables that DeepSpeed reads, while it does."""
    wanted = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.world_size}
    before = {name: os.environ.get(name) for name in wanted}
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.setLevel(logging.ERROR)  # it warns of an optimizer that it does not know
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def without_broadcast(engine: Any) -> Generator[None]:
    """Values come in by `write`; the broadcast of an engine that is made fails on scalar parameters, besides."""
    before = engine._broadcast_model
    engine._broadcast_model = lambda _: None
    try:
        yield
    finally:
        engine._broadcast_model = before


class Idle(torch.optim.Optimizer):
    """Stands where ZeRO wants an optimizer: see [Note: zero]."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Where a parameter lies among the ranks."""

    slot: nn.Parameter
    bounds: tuple[int, ...]
    """See `Stretches`."""
    start: int
    """Where this rank's stretch begins in its flat partition; only of stages 1 and 2."""

    def count(self, rank: int) -> int:
        """How many numbers the rank holds."""
        return self.bounds[rank + 1] - self.bounds[rank]


@dataclasses.dataclass(slots=True, eq=False)
class Zero:
    """An engine, and where it keeps what."""

    engine: Any
    stage: int
    rank: int
    offload: bool
    """Gradients are kept in host memory."""
    pieces: dict[int, Piece]
    """By id of the slot; what is not in it is whole on every rank."""
    run: Any
    """Called with a function of the net; of a frozen net not the engine itself, which waits for a backward pass."""


def started(net: nn.Module, world: World, stage: int, config: dict[str, Any], *, frozen: bool) -> Zero:
    """The engine of a net, whose parameters have memory. Every rank must call it."""
    loaded = joined(world)
    slots = list(net.parameters())
    shapes = {id(slot): slot.numel() for slot in slots}
    trainable = [slot for slot in slots if slot.requires_grad]
    scalars: list[Any] = [slot for slot in slots if slot.dim() == 0 and stage == 3]
    for slot in scalars:  # stage 3 fails on them as it cuts; what it gathers into is free
        slot.data = slot.data.view(1)
    with settled(world), without_broadcast(loaded.DeepSpeedEngine):
        engine, *_ = loaded.initialize(
            model=Box(net),
            optimizer=None if frozen else Idle(trainable),
            config=config,
            dist_init_required=False,
        )
    for slot in scalars:
        slot.ds_shape = torch.Size(())
    pieces: dict[int, Piece] = {}
    zero = engine.optimizer
    count = world.world_size
    if stage in (1, 2):
        (chunk,), (order,), (offsets,) = (
            zero.partition_size,
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
        )
        for slot, offset in zip(order, offsets, strict=True):
            bounds = bounds_of(shapes[id(slot)], offset, int(chunk), count)
            start = min(max(offset - world.rank * int(chunk), 0), int(chunk))  # beyond it, the stretch is empty
            pieces[id(slot)] = Piece(slot, bounds, start)
            slot._hp_mapping = None
        if not zero.cpu_offload:  # the copy that its optimizer would step on
            for flat in zero.single_partition_of_fp32_groups:
                flat.data = flat.data.new_empty(0)
    elif stage == 3:
        for slot in slots:
            bounds = bounds_of(shapes[id(slot)], 0, slot.partition_numel(), count)  # pyright: ignore[reportCallIssue]
            pieces[id(slot)] = Piece(slot, bounds, 0)
    offload = config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"
    return Zero(engine, stage, world.rank, offload, pieces, engine.module if frozen else engine)


def run_back(zeros: Sequence[Zero], loss: torch.Tensor) -> None:
    """The backward pass of a loss that went through these engines."""
    first, *others = zeros
    plain = [other.engine for other in others if other.stage == 0]  # the others reduce in hooks
    try:
        for engine in plain:
            engine._running_engine_backward = True
        first.engine.backward(loss)
        for engine in plain:
            engine._backward_epilogue()
    finally:
        for engine in plain:
            engine._running_engine_backward = False


def write(zero: Zero, values: Sequence[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """Give the slots their values, each rank from its own stretches. Every rank must call it."""
    optimizer = zero.engine.optimizer
    with torch.no_grad():
        if zero.stage == 3:
            whole_again(zero)
            for slot, part in values:
                held: Any = slot
                held.ds_tensor.data[: part.numel()].copy_(part)
            persistent: Any = optimizer.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
            return
        (flat,) = optimizer.parallel_partitioned_bit16_groups
        for slot, part in values:
            piece = zero.pieces.get(id(slot))
            if piece is None:
                slot.data.copy_(part)
            else:
                flat[zero.rank].narrow(0, piece.start, part.numel()).copy_(part)
        gather(zero)


def gather(zero: Zero) -> None:
    """The parameters of stages 1 and 2 from all ranks' partitions."""
    from deepspeed.runtime.utils import all_gather_dp_groups

    optimizer = zero.engine.optimizer
    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )


def whole_again(zero: Zero) -> None:
    """Let go of whatever is gathered under stage 3."""
    optimizer = zero.engine.optimizer
    getattr(optimizer, "parameter_offload", optimizer).partition_all_parameters()


def read(zero: Zero, share: float) -> list[torch.Tensor]:
    """This rank's stretches of the mean gradients, in the order of `pieces` and in memory of their own.

    The gradients are gone afterwards.
    """
    optimizer, found = zero.engine.optimizer, list[torch.Tensor]()
    if zero.stage == 3:
        for piece in zero.pieces.values():
            if piece.slot.requires_grad:
                part = optimizer._get_fp32_grad_state_partition(piece.slot, release_swap_buffers=False)[0]
                found.append(part.reshape(-1)[: piece.count(zero.rank)])
    else:
        if zero.offload:
            flat = optimizer.single_partition_of_fp32_groups[0].grad
        else:
            flat = torch.cat([part.reshape(-1) for part in optimizer.averaged_gradients[0]])
        found += [flat.narrow(0, piece.start, piece.count(zero.rank)) for piece in zero.pieces.values()]
    found = [*_kernels._foreach_mul(found, share)] if share != 1 else [part.clone() for part in found]
    clear(zero)
    return found


def clear(zero: Zero) -> None:
    """Drop all gradients, and the counts of a run that was left in the middle."""
    optimizer = zero.engine.optimizer
    zero.engine.zero_grad()
    if not isinstance(optimizer, _with_gradients()):
        return
    optimizer.zero_grad(set_to_none=True)
    for key in [*optimizer.averaged_gradients]:
        optimizer.averaged_gradients[key] = None
    if zero.stage != 3:
        optimizer.micro_step_id = -1
        for key in [*optimizer.all_grad_tensors]:
            optimizer.all_grad_tensors[key] = None
        if zero.offload:
            optimizer.single_partition_of_fp32_groups[0].grad.zero_()
    optimizer._backward_hook_state.reset_for_new_step()


def _with_gradients() -> type:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    return ZeROOptimizer
