"""The gradients of sharded parameters: which ones the backward passes reached, and their means over ranks.

FSDP reduces zeros for a parameter that a rank's loss does not depend on, so that ranks never wait for one another; what
was reached is therefore noted here.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch

from fabricfn.engine import Frame, require_all
from fabricfn.errors import CapabilityError
from fabricfn.flat import all_reduce_mean, anywhere
from fabricfn.sharding import is_sharded, local_of
from fabricfn.strategies.single import gradients as take
from fabricfn.strategies.tensor_slots import Peers, as_values, gradient_of
from fabricfn.strategies.torch_fsdp import close, gathered
from fabricfn.tree import tree_map
from fabricfn.world import World

_kernels: Any = torch
"""The functions on lists of tensors have no types."""


@dataclasses.dataclass(slots=True)
class Shards:
    """The handle of a frame."""

    box: Any
    """The root, a `Box` that `fully_shard` has turned into an FSDPModule."""
    units: tuple[str, ...]
    """The names of the sub-modules that are gathered one by one."""
    params: list[Any]
    """FSDP's own record of each slot; None for a parameter that every rank holds whole (a scalar)."""
    sync: bool = True
    """Whether the next backward pass reduces gradients."""
    share: float = 1.0
    """What the gradients of this run are still to be multiplied by."""
    used: set[int] = dataclasses.field(default_factory=set[int])
    """Which slots this run's backward passes have reached."""
    watched: set[int] = dataclasses.field(default_factory=set[int])
    """Which slots report to `used`."""
    peers: Peers | None = None
    """What tensor parallelism adds."""


def watch(shards: Shards) -> None:
    """Take note of the parameters that backward passes reach: FSDP itself reduces zeros for all others."""
    if len(shards.watched) == len(shards.params):
        return
    for index, param in enumerate(shards.params):
        slot = None if param is None else gathered(param)
        if index in shards.watched or (param is not None and slot is None):
            continue
        shards.watched.add(index)
        if slot is not None and slot.requires_grad:
            slot.register_post_accumulate_grad_hook(functools.partial(mark, shards.used, index))


def mark(used: set[int], index: int, slot: torch.Tensor) -> None:
    """A hook: the gradient of this slot has arrived."""
    used.add(index)


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """Take the shards of the gradients away; those of parameters that are whole on every rank are averaged here."""
    if world.group is None:
        return take(frames, world, allow_unused=allow_unused)
    handles: list[Shards] = [frame.handle for frame in frames]
    taken: list[list[torch.Tensor | None]] = []
    reached: list[list[bool]] = []
    for frame, shards in zip(frames, handles, strict=True):
        pairs = zip(frame.slots, shards.params, strict=True)
        grads = [gradient_of(slot) if param is None else slot.grad for slot, param in pairs]
        for slot in frame.slots:
            slot.grad = None
        if close(shards.params):
            raise outside(shards.units)
        whole = [param is None for param in shards.params]
        reached.append([grad is not None and (whole[i] or i in shards.used) for i, grad in enumerate(grads)])
        shards.used.clear()
        taken.append(times(grads, shards.share))
    return agreed(frames, taken, reached, world, allow_unused)


def agreed(
    frames: Sequence[Frame],
    taken: list[list[torch.Tensor | None]],
    reached: list[list[bool]],
    world: World,
    allow_unused: bool,
) -> list[list[torch.Tensor | None]]:
    """What was taken, without the zeros of what no rank reached, or checked; and averaged where nobody did so."""
    if allow_unused:
        found = iter(anywhere([there for mask in reached for there in mask], world.group, world.device))
        reached = [[next(found) for _ in mask] for mask in reached]
    for grads, there in zip(taken, reached, strict=True):
        grads[:] = [grad if some else None for grad, some in zip(grads, there, strict=True)]
    if not allow_unused:
        require_all(frames, taken)
    average_whole(frames, taken, reached, world)
    return [as_values(frame, grads) for frame, grads in zip(frames, taken, strict=True)]


def average_whole(
    frames: Sequence[Frame], taken: list[list[torch.Tensor | None]], reached: list[list[bool]], world: World
) -> None:
    """Put the means over ranks in place of the gradients of those parameters that every rank holds whole."""
    places = [
        (i, j)
        for i, frame in enumerate(frames)
        for j, param in enumerate(frame.handle.params)
        if param is None and reached[i][j]
    ]
    if places:
        assert world.group is not None
        mine = [(taken[i][j], frames[i].slots[j]) for i, j in places]
        means = all_reduce_mean(
            [torch.zeros_like(local_of(slot)) if grad is None else grad for grad, slot in mine], world.group
        )
        for (i, j), mean in zip(places, means, strict=True):
            taken[i][j] = mean


def times(grads: list[torch.Tensor | None], share: float) -> list[torch.Tensor | None]:
    """The gradients times `share`; FSDP has reduced them into fresh memory, so in place."""
    present = [local_of(grad) for grad in grads if grad is not None]
    if share != 1 and present:
        _kernels._foreach_mul_(present, share)
    return grads


def outside(units: Sequence[str], strategy: str = "fsdp") -> CapabilityError:
    """The error for a weight that is used where it is not gathered."""
    named = ", ".join(units[:8]) + (", ..." if units[8:] else "") or "the whole net"
    return CapabilityError(
        f"under {strategy} the weights of a unit ({named}) exist only inside the unit's own forward and only as"
        " attributes of their modules, but the loss function uses one elsewhere, or one that is kept in a list. Write"
        " `with ff.unsharded(rt, net.block): ...` around it, choose other units, or gather the whole model at once:"
        f" strategy=ff.strategies.{strategy}(units=None)."
    )


def outliving(result: Any, homes: Collection[int], units: Sequence[str], strategy: str = "fsdp") -> Any:
    """The result with copies of what lies in these storages, whose memory is about to be let go."""

    def kept(leaf: Any) -> Any:
        if is_sharded(leaf) and (leaf.dim() == 0 or any(one.is_partial() for one in leaf.placements)):
            raise outside(units, strategy)  # a number made of weights that are not gathered
        plain = isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not is_sharded(leaf)
        return leaf.clone() if plain and leaf.untyped_storage()._cdata in homes else leaf

    return tree_map(kept, result)
