"""Run a function on n ranks: the door to worlds of threads and worlds of processes."""

import contextlib
from collections.abc import Callable
from typing import Any

from fabricfn.errors import ConfigurationError
from fabricfn.precision import Precision
from fabricfn.strategy import Strategy
from fabricfn.testing.process_worlds import processes
from fabricfn.testing.ranks import TIMEOUT, Ranks
from fabricfn.testing.thread_worlds import threads

KINDS: dict[str, Callable[[int], contextlib.AbstractContextManager[Ranks]]] = {
    "threads": threads,
    "processes": processes,
}


def world(kind: str, world_size: int) -> contextlib.AbstractContextManager[Ranks]:
    """A world of this kind: `threads(world_size)` or `processes(world_size)`.

    Raises:
        ConfigurationError: there is no such kind.
    """
    if kind not in KINDS:
        raise ConfigurationError(f"kind={kind!r} is unknown; there are {', '.join(KINDS)}.")
    return KINDS[kind](world_size)


def run(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    kind: str = "threads",
    strategy: str | Strategy | None = None,
    precision: str | int | Precision = "32-true",
    seed: int = 0,
    timeout: float = TIMEOUT,
) -> list[Any]:
    """`fn(rt, *args)` on every rank of a world that is opened for this call alone.

    For many calls, open the world once: `with threads(4) as ranks: ranks.run(fn)`.

    Args:
        world_size: the number of ranks.
        kind: "threads" (fast) or "processes" (real gloo, own random numbers).

    Returns:
        What `fn` returned, one entry a rank. See `Ranks.run` for the other arguments and for what it raises.

    Example:
        >>> run(lambda rt: rt.rank, world_size=3)
        [0, 1, 2]
    """
    with world(kind, world_size) as ranks:
        return ranks.run(fn, *args, strategy=strategy, precision=precision, seed=seed, timeout=timeout)
