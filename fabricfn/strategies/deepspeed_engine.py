"""An engine of DeepSpeed as the strategy needs it: values in, gradients out. A new version may move what is used here.

[Note: zero] An engine of ours has no optimizer of its own: the place is taken by one that does nothing, so that ZeRO
cuts parameters and gradients and moves them, and never steps. Values come in by `write`, gradients go out by `read`.
`tests/test_deepspeed.py` pins the names that are used here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import torch
from torch import nn

from fabricfn.engine import Box
from fabricfn.strategies.deepspeed_package import Idle, joined, settled, without_broadcast
from fabricfn.strategies.stretch import bounds_of
from fabricfn.world import World

_kernels: Any = torch
"""The functions on lists of tensors have no types."""


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
    sizes = {id(slot): slot.numel() for slot in slots}
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
    return Zero(
        engine=engine,
        stage=stage,
        rank=world.rank,
        offload="offload_optimizer" in config["zero_optimization"],
        pieces=laid_out(engine.optimizer, slots, sizes, world, stage),
        run=engine.module if frozen else engine,
    )


def laid_out(zero: Any, slots: Sequence[Any], sizes: Mapping[int, int], world: World, stage: int) -> dict[int, Piece]:
    """How ZeRO has cut the slots, whose sizes are given by id."""
    pieces: dict[int, Piece] = {}
    count = world.world_size
    if stage in (1, 2):
        chunk: int = int(zero.partition_size[0])
        order, offsets = zero.round_robin_bit16_groups[0], zero.round_robin_bit16_offsets[0]
        for slot, offset in zip(order, offsets, strict=True):
            bounds = bounds_of(sizes[id(slot)], offset, chunk, count)
            start = min(max(offset - world.rank * chunk, 0), chunk)  # beyond it, the stretch is empty
            pieces[id(slot)] = Piece(slot, bounds, start)
            slot._hp_mapping = None
        if not zero.cpu_offload:  # the copy that its optimizer would step on
            for flat in zero.single_partition_of_fp32_groups:
                flat.data = flat.data.new_empty(0)
    elif stage == 3:
        for slot in slots:
            bounds = bounds_of(sizes[id(slot)], 0, slot.partition_numel(), count)
            pieces[id(slot)] = Piece(slot, bounds, 0)
    return pieces


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
    optimizer, utils = zero.engine.optimizer, cast("Any", import_module("deepspeed.runtime.utils"))
    utils.all_gather_dp_groups(
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
    """The rank's stretches of the mean gradients, in the order of `pieces` and in memory of their own.

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


def forget(zero: Zero) -> None:
    """Also drop the gradients that wait to be reduced, after a backward pass that failed."""
    clear(zero)
    optimizer = zero.engine.optimizer
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        getattr(bucket, "clear_params", bucket.clear)()  # stage 3 has a buffer to keep
    reduced: Any = getattr(optimizer, "params_already_reduced", {})
    keys: Any = [*reduced] if hasattr(reduced, "keys") else range(len(reduced))
    for key in keys:
        reduced[key] = False
    if zero.stage == 3:
        whole_again(zero)


def clear(zero: Zero) -> None:
    """Drop all gradients, and the counts of a run that was left in the middle."""
    optimizer = zero.engine.optimizer
    zero.engine.zero_grad()
    if not hasattr(optimizer, "averaged_gradients"):  # stage 0, and a frozen net
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
    optimizer._backward_hook_state.backward_active_depth = 0
