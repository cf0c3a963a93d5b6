"""Exceptions that travel between processes, and which of several was the first cause."""

import dataclasses
import pickle
import signal
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping

from fabricfn.errors import FabricfnError, HangError, LaunchError, MismatchError, PeerError

# What the other ranks see when one has died or hangs. Such an error is a consequence, whenever it was raised.
_CONSEQUENCES = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "connectfullmesh failed",
    "socket closed",
    "timed out waiting",
    "ncclremoteerror",
    "application timeout caused pair closure",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One rank's exception as plain data."""

    rank: int
    """The rank that raised it."""
    time: float
    """When, in seconds since the epoch."""
    summary: str
    """What happened, in one line: "raised ValueError: no such file", "left by sys.exit(3)"."""
    text: str
    """Its traceback, with causes, as Python prints it."""
    consequence: bool
    """Whether another rank is behind it: one that is gone, or that the error tells of."""
    pickled: bytes | None
    """The exception object; None where it is no `Exception`, or cannot be pickled."""


def record(error: BaseException, rank: int) -> Failure:
    """The failure of `rank`, to be called where `error` was just caught."""
    if isinstance(error, SystemExit):
        summary = f"left by sys.exit({error.code!r})"
    elif isinstance(error, KeyboardInterrupt):
        summary = "was interrupted (SIGINT)"
    else:
        summary = f"raised {type(error).__name__}: {error}"
    return Failure(
        rank=rank,
        time=time.time(),
        summary=summary,
        text="".join(traceback.format_exception(error)).rstrip(),
        consequence=is_consequence(error) or _elsewhere(error),
        pickled=_pickled(error),
    )


def is_consequence(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is that of a lost connection."""
    if isinstance(error, MismatchError | PeerError):  # what such errors came from is explained in them
        return isinstance(error, PeerError) and not isinstance(error, HangError)
    return any(
        isinstance(one, OSError | RuntimeError) and any(sign in str(one).lower() for sign in _CONSEQUENCES)
        for one in _story(error)
    )


def _elsewhere(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, tells of another rank."""
    return any(isinstance(one, FabricfnError) and one.elsewhere for one in _story(error))


def _story(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from; they may go round in a circle."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _pickled(error: BaseException) -> bytes | None:
    """The error as bytes that give an equal one back; many classes with an `__init__` of their own do not."""
    if not isinstance(error, Exception):
        return None
    try:
        data = pickle.dumps(error)
        same = pickle.loads(data)
    except Exception:  # whatever a __reduce__ or an __init__ raises
        return None
    return data if type(same) is type(error) and str(same) == str(error) else None


def exception_of(failure: Failure) -> Exception:
    """The rank's own exception; a `LaunchError` where it could not travel. Its cause has the rank's own traceback.

    Python prints a cause first, so that is what the user reads first.
    """
    try:
        error = None if failure.pickled is None else pickle.loads(failure.pickled)
    except Exception:  # its module may do something else in this process
        error = None
    if error is None:
        error = LaunchError(f"rank {failure.rank} {failure.summary}")
    cause = LaunchError(f"rank {failure.rank} failed first: {failure.summary}\n{failure.text}")
    cause.elsewhere, error.__cause__ = True, cause
    error.add_note(f"This was raised on rank {failure.rank}; its own traceback stands above, in the cause.")
    return error


def first_cause(failures: Iterable[Failure], deaths: Mapping[int, int]) -> tuple[int | None, Failure | None]:
    """Which rank failed first, and its exception if it left one.

    An exception of its own outranks a death without one, and both outrank the errors of the others, who only lost the
    connection: the order in which processes are seen to end says nothing, since all end within milliseconds.

    Args:
        failures: what the ranks recorded.
        deaths: rank -> exit status of those that ended by themselves and recorded nothing, in the order in which that
            was seen.

    Example:
        >>> first_cause([], {1: -9})
        (1, None)
    """
    ordered = sorted(failures, key=lambda failure: (failure.consequence, failure.time))
    if ordered and (not ordered[0].consequence or not deaths):
        return ordered[0].rank, ordered[0]
    return next(iter(deaths), None), None


def ending(status: int) -> str:
    """How a process ended, in words.

    Example:
        >>> ending(3), ending(-9)
        ('exited with status 3', 'was killed by signal 9 (SIGKILL)')
    """
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-status} ({name})"
