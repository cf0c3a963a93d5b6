"""Which ranks take part in a collective: all of them, or the sub-group that `axis` names."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.meshes import BESIDE, axes_of, subgroup, world_along
from fabricfn.runtimes import Runtime
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


def along(rt: Runtime, axis: Axis) -> tuple[Runtime, Members]:
    """The runtime as a collective along that axis sees it (its ranks are counted along the axis), and who takes part.

    Raises:
        ConfigurationError: as `members_of`.
        CapabilityError: the name of an axis that the mesh of this runtime does not have.
    """
    if isinstance(axis, str) and axis in axes_of(rt.world):
        rt, axis = dataclasses.replace(rt, world=world_along(rt.world, axis)), None
    return rt, members_of(rt.world, axis)


def members_of(world: World, axis: Axis) -> Members:
    """The ranks that take part.

    Args:
        world: this process' place.
        axis: None for all ranks; or world ranks in any order, this one among them.

    Raises:
        ConfigurationError: ranks that do not exist or come twice, or this rank is not among them.
        CapabilityError: the name of a mesh axis, which `along` knows.
    """
    if axis is None:
        return Members(ranks=tuple(range(world.world_size)), place=world.rank, group=world.group)
    if isinstance(axis, str):
        there_is = ", ".join(map(repr, axes_of(world)))
        found = f"has the axes {there_is}" if there_is else "has no mesh; meshes come with the model_parallel strategy"
        raise CapabilityError(
            f"axis={axis!r}: this runtime {found}. Name the ranks instead: axis={tuple(range(world.world_size))}."
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
    group = world.group if everyone else None if len(ranks) == 1 else subgroup(world, ranks)
    return Members(ranks=ranks, place=ranks.index(world.rank), group=group)


def beside(world: World) -> World:
    """The same ranks with a process group of their own on the CPU, for a thread that works beside the training.

    Collective when it is first called; later calls find the group by its name.
    """
    if world.group is None:
        return world
    return dataclasses.replace(world, group=subgroup(world, tuple(range(world.world_size)), BESIDE))


def device_for_words(world: World, group: dist.ProcessGroup) -> torch.device:
    """Where the small integers of the check travel: the CPU, where the group serves it, since nothing waits there."""
    kinds = [device.type for device in group._device_types]
    return CPU if not kinds or "cpu" in kinds else world.device


def device_for(origin: torch.device, world: World, group: dist.ProcessGroup | None) -> torch.device:
    """Where a tensor of that device travels: there, if the group serves it, else on this process' device."""
    if group is None or origin.type == world.wire.type:
        return origin
    kinds = [device.type for device in group._device_types]
    return origin if not kinds or origin.type in kinds else world.wire
