"""Slots that are cut over tensor-parallel peers: as DTensors on their axis alone, as torch's modules want them.

Records hold DTensors on the whole mesh, so that clipping, optimizers and checkpoints see where each number lies: the
same memory under two descriptions. What is cut over the data axis, too, belongs to FSDP; see `sharded.py`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from fabricfn import flat
from fabricfn.engine import Frame, require_all
from fabricfn.errors import GradientError, ModelError
from fabricfn.sharding import is_sharded, local_of, same_placement, with_local
from fabricfn.strategies.functional import mean_in
from fabricfn.world import World

_functions: Any = torch
"""Its norms have no types."""

LIKE = "_fabricfn_like"
"""The attribute of a slot with its value's description: a DTensor on the whole mesh, without memory."""


@dataclasses.dataclass(slots=True)
class Peers:
    """What tensor parallelism keeps of a frame: its handle, or a part of FSDP's."""

    group: dist.ProcessGroup | None
    """The tensor-parallel peers; None for one alone."""
    reduce_dtype: torch.dtype | None
    unchecked: bool = True
    """Whether peers have yet to be compared."""
    loss: torch.Tensor | None = None
    """The first loss, for that comparison."""


def describe(slots: Iterable[Any], mesh: DeviceMesh) -> None:
    """Note how the values of slots are placed on the whole mesh, whose last axis is the tensor-parallel one."""
    for slot in slots:
        if is_sharded(slot):
            placements = (*(Replicate() for _ in range(mesh.ndim - 1)), *slot.placements)
            local = slot._local_tensor.to("meta")
            like = DTensor.from_local(local, mesh, placements, run_check=False, shape=slot.shape, stride=slot.stride())
            setattr(slot, LIKE, like)


def like_of(slot: Any) -> Any:
    """The description; None for a plain slot and for one of FSDP's."""
    return getattr(slot, LIKE, None)


def cut(whole: torch.Tensor, slot: Any) -> torch.Tensor:
    """The part of this rank of a whole tensor, as the value of such a slot."""
    part = local_of(distribute_tensor(whole, slot.device_mesh, slot.placements, src_data_rank=None))
    return with_local(like_of(slot), part.clone(memory_format=torch.contiguous_format))


def look_at(slot: Any, value: Any, name: str) -> None:
    """Let a slot look at a value, without a copy."""
    like = like_of(slot)
    if like is None and not is_sharded(value):
        slot.data = value
    elif like is not None and is_sharded(value) and same_placement(like, value):
        slot._local_tensor = value._local_tensor
    else:
        wanted = "whole" if like is None else f"cut as {list(like.placements)} on {like.device_mesh}"
        found = f"cut as {list(value.placements)} on {value.device_mesh}" if is_sharded(value) else "a whole tensor"
        raise ModelError(
            f"{name} of this Model is {found}, but this module wants it {wanted}. Load it with"
            " ff.load(rt, path, like=model), or cut it as model.params is."
        )


def gradient_of(slot: Any) -> torch.Tensor | None:
    """The part of this rank of a slot's gradient, summed over tensor-parallel peers where these hold terms; taken away.

    Every peer must call it for the same slots in the same order.
    """
    grad: Any = slot.grad
    slot.grad = None
    if grad is None or not is_sharded(grad):
        return grad
    placements = slot.placements if is_sharded(slot) else (Replicate(),)  # a plain number may meet parts
    if grad.placements != placements:
        grad = grad.redistribute(placements=placements)
    local = grad._local_tensor
    return local.wait() if hasattr(local, "wait") else local


def as_values(frame: Frame, parts: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Parts of gradients, described as the values are."""
    return [
        None if part is None else with_local(like_of(slot), part) for slot, part in zip(frame.slots, parts, strict=True)
    ]


def means(frames: Sequence[Frame], world: World, peers: Peers, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """The means of the slots' gradients: of parts over the data axis, of what is whole over all ranks."""
    slots = [slot for frame in frames for slot in frame.slots]
    parts = [gradient_of(slot) for slot in slots]
    if allow_unused:
        somewhere = flat.anywhere([part is not None for part in parts], world.group, world.device)
        parts = [
            torch.zeros_like(local_of(slot)) if there and part is None else part
            for part, slot, there in zip(parts, slots, somewhere, strict=True)
        ]

    def taken() -> list[list[torch.Tensor | None]]:
        rest = iter(parts)
        return [as_values(frame, [next(rest) for _ in frame.slots]) for frame in frames]

    if not allow_unused:
        require_all(frames, taken())
    if peers.unchecked:
        compare(frames, taken(), peers)
    for wholes, group in ((False, world.group), (True, world.whole.group)):
        found = [
            (place, part)
            for place, (part, slot) in enumerate(zip(parts, slots, strict=True))
            if part is not None and is_whole(like_of(slot)) is wholes
        ]
        if group is not None:
            averaged = mean_in(peers.reduce_dtype, [part for _, part in found], group)
            for (place, _), mean in zip(found, averaged, strict=True):
                parts[place] = mean
    return taken()


def is_whole(value: Any) -> bool:
    """Whether peers hold the same of a value that lies on the whole mesh."""
    return not is_sharded(value) or not value.placements[-1].is_shard()


def alike(taken: list[list[torch.Tensor | None]], peers: Peers) -> list[list[torch.Tensor | None]]:
    """The gradients, those of which peers hold the same averaged over them. Collective."""
    if peers.group is None:
        return taken
    found = [grad for grads in taken for grad in grads if grad is not None and is_whole(grad)]
    means = iter(mean_in(peers.reduce_dtype, [local_of(grad) for grad in found], peers.group))
    return [
        [with_local(grad, next(means)) if grad is not None and is_whole(grad) else grad for grad in grads]
        for grads in taken
    ]


def compare(frames: Sequence[Frame], taken: Sequence[Sequence[torch.Tensor | None]], peers: Peers) -> None:
    """Raise `GradientError` where peers found different losses, or gradients of what all of them hold. Collective.

    Once a frame: it finds batches that differ, and functions that use parts as if they were whole.
    """
    peers.unchecked = False
    loss, peers.loss = peers.loss, None
    if peers.group is None or loss is None:
        return
    names: list[str] = ["the loss"]
    numbers: list[torch.Tensor] = [loss.double()]
    for frame, grads in zip(frames, taken, strict=True):
        for name, grad in zip(frame.names, grads, strict=True):
            if grad is not None and is_whole(grad):
                names.append(f"the gradient of {name}")
                norm: torch.Tensor = _functions.linalg.vector_norm(local_of(grad))
                numbers.append(norm.double())
    (rows,) = flat.all_gather([torch.stack([number.to(loss.device) for number in numbers])], peers.group)
    low, high = rows.amin(0), rows.amax(0)
    apart = (high - low) > 1e-2 * rows.abs().amax(0) + 1e-6 * rows[:, 1:].abs().sum()
    if bool(apart.any()):
        wrong = [names[int(place)] for place in apart.nonzero()]
        raise GradientError(
            f"tensor-parallel peers work on one batch and must find the same, but they differ in"
            f" {', '.join(wrong[:6])}{', ...' if wrong[6:] else ''}. Give peers the same data (cut it by rt.rank of"
            " rt.world_size, or use ff.setup_dataloader) and the same random numbers (rng=ff.key(...)); and where the"
            " plan holds torch's own styles, keep weights that are not in the plan away from parts of tensors."
        )
