"""Which ranks take part in a collective: all of them, or the sub-group that `axis` names.

[Note: sub-groups] A sub-group is made when it is first used, by its members alone, and torch's own table of process
groups is the only memory of it: found there by its name, gone with `destroy_process_group`. torch's
`new_group(use_local_synchronization=True)` cannot be used: it takes the number of groups that a rank already has into
the name under which the members look for each other, so that ranks of overlapping sub-groups wait for ever.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.world import CPU, World

Axis = str | Sequence[int] | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The ranks of one collective call."""

    ranks: tuple[int, ...]
    """Their ranks in the world, ascending."""
    place: int
    """Where this rank stands among them."""
    group: dist.ProcessGroup | None
    """Their process group; None for one member."""

    def place_of(self, rank: int, argument: str) -> int:
        """Where a world rank stands among the members.

        Raises:
            ConfigurationError: it is not one of them.
        """
        if rank not in self.ranks:
            raise ConfigurationError(f"{argument}={rank}, but the ranks of this call are {list(self.ranks)}.")
        return self.ranks.index(rank)


def members_of(world: World, axis: Axis) -> Members:
    """The ranks that take part.

    Args:
        world: this process' place.
        axis: None for all ranks; or world ranks in any order, this one among them.

    Raises:
        ConfigurationError: ranks that do not exist or come twice, or this rank is not among them.
        CapabilityError: the name of a mesh axis.
    """
    if axis is None:
        return Members(ranks=tuple(range(world.world_size)), place=world.rank, group=world.group)
    if isinstance(axis, str):
        raise CapabilityError(
            f"axis={axis!r}: this runtime has no mesh; meshes come with the model_parallel strategy. Name the ranks"
            f" instead: axis={tuple(range(world.world_size))}."
        )
    ranks = tuple(sorted(axis))
    if len(set(ranks)) != len(ranks) or not ranks or not 0 <= ranks[0] <= ranks[-1] < world.world_size:
        raise ConfigurationError(
            f"axis={tuple(axis)} must hold different ranks from 0 to {world.world_size - 1} (rank {world.rank})."
        )
    if world.rank not in ranks:
        raise ConfigurationError(
            f"rank {world.rank} made a collective call for axis={tuple(axis)}, to which it does not belong. Write"
            f" `if rt.rank in {ranks}:` before it."
        )
    everyone = len(ranks) == world.world_size
    group = world.group if everyone else None if len(ranks) == 1 else _subgroup(world, ranks)
    return Members(ranks=ranks, place=ranks.index(world.rank), group=group)


BESIDE = "fabricfn_beside"
"""Begins the names of groups for threads that work beside the training."""


def beside(world: World) -> World:
    """The same ranks with a process group of their own on the CPU, for a thread that works beside the training.

    Collective when it is first called; later calls find the group by its name.
    """
    if world.group is None:
        return world
    return dataclasses.replace(world, group=_subgroup(world, tuple(range(world.world_size)), BESIDE))


def device_for_words(world: World, group: dist.ProcessGroup) -> torch.device:
    """Where the small integers of the check travel: the CPU, where the group serves it, since nothing waits there."""
    kinds = [device.type for device in group._device_types]
    return CPU if not kinds or "cpu" in kinds else world.device


def device_for(origin: torch.device, world: World, group: dist.ProcessGroup | None) -> torch.device:
    """Where a tensor of that device travels: there, if the group serves it, else on this process' device."""
    if group is None or origin.type == world.device.type:
        return origin
    kinds = [device.type for device in group._device_types]
    return origin if not kinds or origin.type in kinds else world.device


def _subgroup(world: World, ranks: tuple[int, ...], prefix: str = "fabricfn") -> dist.ProcessGroup:
    assert world.group is not None
    table: Any = distributed_c10d._world
    everyone = dist.get_process_group_ranks(world.group)
    global_ranks = [everyone[rank] for rank in ranks]
    name = f"{prefix}_{'_'.join(map(str, global_ranks))}"
    for group, known in table.pg_names.items():
        if known == name:
            return group
    backend, store = table.pg_map[world.group]
    make = cast(Any, distributed_c10d._new_process_group_helper)  # pyright: ignore[reportUnknownMemberType]
    timeout = _timeout(world.group, world.device) or distributed_c10d._get_default_timeout(backend)
    if prefix == BESIDE and world.device.type != "cpu":
        backend = "gloo"
    place = ranks.index(world.rank)
    group, _ = make(len(ranks), place, global_ranks, backend, store, name, timeout=timeout, group_desc="fabricfn")
    table.pg_group_ranks[group] = {rank: place for place, rank in enumerate(global_ranks)}
    return group


def _timeout(group: dist.ProcessGroup, device: torch.device) -> Any:
    try:
        options: Any = group._get_backend(device).options
        return options._timeout
    except (RuntimeError, AttributeError):  # a group written in Python has no backend
        return None
