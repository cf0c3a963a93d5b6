"""Who am I: the place of one process among all processes of the job."""

import dataclasses
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from fabricfn.watching import Watch

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The place of this process in the job. Plain facts, fixed at start; nothing is asked of the environment later.

    [Note: data axis] Where several processes hold one copy of a model (tensor parallel), `rank`, `world_size` and
    `group` are those of the data axis: such peers have one rank, and get the same batch. What concerns processes and
    not data (files, printing, first values) asks `whole`.
    """

    rank: int = 0
    """0 .. world_size - 1, over all nodes."""
    world_size: int = 1
    """The number of processes of the job, one device each; of parts of a batch, where peers share one."""
    local_rank: int = 0
    """0 .. local_world_size - 1, on this node."""
    local_world_size: int = 1
    """The number of processes on this node."""
    node_rank: int = 0
    """0 .. num_nodes - 1."""
    num_nodes: int = 1
    """The number of machines of the job."""
    device: torch.device = CPU
    """The device of this process."""
    group: dist.ProcessGroup | None = None
    """The process group of these ranks; None when there is one rank, and then no collective is ever called."""
    watch: "Watch | None" = None
    """What this rank tells the others about where it is; None for one rank, and in a group that the user made."""
    mesh: "DeviceMesh | None" = None
    """All ranks as an array with named axes, where the strategy lays them out so."""
    everyone: "World | None" = None
    """The place among all processes, where the fields above are those of the data axis; see [Note: data axis]."""

    @property
    def whole(self) -> "World":
        """The place among all processes of the job."""
        return self if self.everyone is None else self.everyone

    @property
    def wire(self) -> torch.device:
        """Where a tensor is while it travels: on the device; one of XLA, which no group carries, on the CPU."""
        return CPU if self.device.type == "xla" else self.device


def threads_each(count: int) -> int:
    """The CPU threads of each of `count` processes that share this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // count)
