"""The Runtime record: what the functions of this package need to know, and nothing that changes."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from fabricfn.interrupts import StopFlag
from fabricfn.loggers.journal import Journal
from fabricfn.loggers.logger import Logger
from fabricfn.precision import Precision
from fabricfn.strategy import Strategy
from fabricfn.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Where and how this process computes. Immutable; made by `init_runtime` or handed over by `launch`.

    It never caches and never asks the environment again. Two may live in one process.
    """

    world: World
    """The place of this process in the job; its fields can be read from the runtime too: `rt.rank`, `rt.device`."""
    precision: Precision
    """Which dtypes parameters, arithmetic and results have."""
    strategy: Strategy
    """How models are trained over the ranks."""
    accelerator: str = "cpu"
    """The kind of device: "cpu", "cuda", "mps", ..."""
    environment: str = "single"
    """What started the processes: "single", "launch", "torchrun", ..."""
    seed: int = 0
    """Decides the order of data (see `batches`); keys are made from it by `ff.key(rt.seed)`."""
    owns_group: bool = False
    """Whether this runtime made the process group, which `shutdown` then destroys."""
    attempt: int = 0
    """How often all ranks were started again before this time (`max_restarts`)."""
    callbacks: tuple[Any, ...] = ()
    """Whose hooks `call` calls."""
    journal: Journal = dataclasses.field(default_factory=lambda: Journal(loggers=()), repr=False, compare=False)
    """The loggers, and the rows that wait to be written."""
    stop: StopFlag | None = dataclasses.field(default=None, repr=False, compare=False)
    """What the stop signals set; `should_stop` asks it. None outside the main thread."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.world.device

    @property
    def loggers(self) -> tuple[Logger, ...]:
        """Where `log` writes."""
        return self.journal.loggers

    @property
    def rank(self) -> int:
        """0 .. world_size - 1, over all nodes; ranks that share a batch (tensor parallel) have the same one."""
        return self.world.rank

    @property
    def global_rank(self) -> int:
        """The number of this process among all: `rank`, unless several processes share a batch."""
        return self.world.whole.rank

    @property
    def mesh(self) -> "DeviceMesh | None":
        """All ranks as an array with named axes, under a strategy that lays them out so; collectives take its axes."""
        return self.world.mesh

    @property
    def whole(self) -> "Runtime":
        """The same with ranks counted over all processes, for what concerns files and not data."""
        return self if self.world.everyone is None else dataclasses.replace(self, world=self.world.everyone)

    @property
    def local_rank(self) -> int:
        """0 .. local_world_size - 1, on this node."""
        return self.world.local_rank

    @property
    def node_rank(self) -> int:
        """0 .. num_nodes - 1."""
        return self.world.node_rank

    @property
    def world_size(self) -> int:
        """The number of processes of the job; of parts of a batch, where several processes share one."""
        return self.world.world_size

    @property
    def local_world_size(self) -> int:
        """The number of processes on this node."""
        return self.world.local_world_size

    @property
    def num_nodes(self) -> int:
        """The number of machines of the job."""
        return self.world.num_nodes

    def __repr__(self) -> str:
        place = f"rank {self.rank} of {self.world_size} on {self.device}"
        if self.world.everyone is not None:
            place += f" (process {self.global_rank} of {self.world.whole.world_size})"
        compute, autocast = str(self.precision.compute_dtype).removeprefix("torch."), self.precision.autocast
        return f"Runtime({place}, {self.strategy.name}, {compute}{'-mixed' if autocast else ''}, seed {self.seed})"
