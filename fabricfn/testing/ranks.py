"""What a world of ranks is for its users, whether its ranks are threads or processes."""

import dataclasses
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch.distributed as dist

from fabricfn.accelerators import device_of
from fabricfn.errors import ConfigurationError
from fabricfn.precision import Precision
from fabricfn.runtimes import Runtime
from fabricfn.strategies import ACCELERATORS, resolve
from fabricfn.strategies.xla_package import begin
from fabricfn.strategy import Strategy
from fabricfn.world import World

TIMEOUT = 60.0
"""Seconds after which a rank that has not returned counts as hung."""


class Ranks(Protocol):
    """A world of ranks that are there already and run one function after the other."""

    world_size: int
    """The number of ranks that there are."""
    kind: str
    """"threads" or "processes"."""

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        world_size: int | None = None,
        strategy: str | Strategy | None = None,
        precision: str | int | Precision = "32-true",
        seed: int = 0,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """`fn(rt, *args)` on every rank.

        Args:
            fn: gets this rank's `Runtime` first; keywords by `functools.partial`. All ranks of a world of threads get
                the very same `args`: do not change them.
            world_size: run on the first so many ranks only; None is all of them.
            strategy: a name, or a record; None is "single" for one rank and "ddp" for more.
            precision: as in `init_runtime`.
            seed: `rt.seed`.
            timeout: seconds for the whole call.

        Returns:
            What `fn` returned, one entry a rank.

        Raises:
            Exception: the exception of the first rank that failed, with a note that names the rank. Its peers are
                released from the collectives they wait in, and the world serves the next call.
            LaunchError: a rank died, or did not return in time; the message says where it is.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `run` was asked for, apart from the function. A strategy's name is resolved on the rank."""

    world_size: int
    strategy: str | Strategy
    precision: Precision
    seed: int


def options_of(
    available: int,
    world_size: int | None,
    strategy: str | Strategy | None,
    precision: str | int | Precision,
    seed: int,
) -> Options:
    """The checked options of a run.

    Raises:
        ConfigurationError: more ranks than there are, or a strategy that cannot serve so many.
    """
    count = available if world_size is None else world_size
    if not 1 <= count <= available:
        raise ConfigurationError(f"world_size={count}, but this world has 1 to {available} ranks.")
    chosen = "auto" if strategy is None else strategy
    resolve(chosen, count)
    return Options(world_size=count, strategy=chosen, precision=Precision.parse(precision), seed=seed)


def runtime_of(options: Options, rank: int, group: dist.ProcessGroup | None) -> Runtime:
    """The runtime of one rank of a testing world: one node, on the CPU or XLA's device."""
    strategy = resolve(options.strategy, options.world_size)
    accelerator = ACCELERATORS.get(strategy.name, "cpu")
    if accelerator == "xla":
        begin(rank, options.world_size, spmd=strategy.max_ranks == 1)
    world = World(
        rank=rank,
        world_size=options.world_size,
        local_rank=rank,
        local_world_size=options.world_size,
        group=group,
        device=device_of(accelerator, 0),
    )
    return Runtime(
        world=strategy.arrange(world),
        precision=options.precision,
        strategy=strategy,
        accelerator=accelerator,
        environment="testing",
        seed=options.seed,
    )


def named(error: BaseException, rank: int, world_size: int, text: str = "") -> BaseException:
    """The exception with a note that names the rank, and the traceback there when it came from another process."""
    error.add_note(f"(raised on rank {rank} of {world_size}){text and chr(10) + text}")
    return error


def stack_text(frame: FrameType | None) -> str:
    """Where a rank is now: the innermost calls."""
    return "" if frame is None else "".join(traceback.format_stack(frame)[-6:])
