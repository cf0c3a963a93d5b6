"""Ranks in sub-groups, and as an array with named axes (torch's DeviceMesh).

[Note: sub-groups] A sub-group is made when it is first used, by its members alone, and torch's own table of process
groups is the only memory of it: found there by its name, gone with `destroy_process_group`. torch's
`new_group(use_local_synchronization=True)` cannot be used: it takes the number of groups that a rank already has into
the name under which the members look for each other, so that ranks of overlapping sub-groups wait for ever.
"""

import dataclasses
import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fabricfn.world import World

BESIDE = "fabricfn_beside"
"""Begins the names of groups for threads that work beside the training."""


def arranged(world: World, axes: Mapping[str, int], data: str | None = None) -> World:
    """The same process in a world with a mesh. Every rank must call it.

    Args:
        world: all ranks.
        axes: name -> size, from the one that changes slowest; their product is the number of ranks. Neighbouring ranks
            lie along the last axis, so it stays within a node where its size allows.
        data: the axis along which ranks get data of their own, if it is not all of them; see [Note: data axis].
    """
    assert math.prod(axes.values()) == world.world_size
    assert world.group is not None
    places = torch.arange(world.world_size).reshape(tuple(axes.values()))
    mine = [int(at) for at in (places == world.rank).nonzero()[0]]
    lines: list[tuple[int, ...]] = []
    for dim in range(len(axes)):
        index: list[Any] = [*mine]
        index[dim] = slice(None)
        lines.append(tuple(int(rank) for rank in places[tuple(index)]))
    groups = [world.group if len(line) == world.world_size else subgroup(world, line) for line in lines]
    everyone = torch.tensor(dist.get_process_group_ranks(world.group))
    make: Any = import_module("torch.distributed.device_mesh").DeviceMesh  # not at the top: it takes long to import
    mesh = make.from_group(groups, world.device.type, mesh=everyone[places], mesh_dim_names=tuple(axes))
    if data is None:
        return dataclasses.replace(world, mesh=mesh)
    dim = list(axes).index(data)
    size = axes[data]
    return dataclasses.replace(
        world,
        rank=mine[dim],
        world_size=size,
        group=groups[dim] if size > 1 else None,
        mesh=mesh,
        everyone=world,
    )


def axes_of(world: World) -> tuple[str, ...]:
    """The names of the axes of the mesh; none without one."""
    return () if world.mesh is None else tuple(world.mesh.mesh_dim_names or ())


def world_along(world: World, axis: str) -> World:
    """The place of this process among the ranks along one axis of the mesh."""
    mesh: Any = world.mesh
    size = int(mesh.size(axes_of(world).index(axis)))
    group = mesh.get_group(axis) if size > 1 else None
    rank = int(mesh.get_local_rank(axis))
    return dataclasses.replace(world, rank=rank, world_size=size, group=group, mesh=None, everyone=None)


def subgroup(world: World, ranks: tuple[int, ...], prefix: str = "fabricfn") -> dist.ProcessGroup:
    """The process group of these ranks of the world, ascending; see [Note: sub-groups]. Its members call it."""
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
