"""The signals of the process that started the ranks: those that end the job, and those that are for the ranks alone."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

from fabricfn.interrupts import numbers_of

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""torch's agent hands them on to the workers, and waits for these to end."""


@contextlib.contextmanager
def own_signals(names: Sequence[str | int], pids: Callable[[], list[int]]) -> Generator[None]:
    """Inside the block the stop signals that end nothing go to the workers; afterwards every handler is as it was.

    Args:
        names: `init_runtime(stop_signals=...)`.
        pids: the processes of the workers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hand_on(number: int, frame: Any) -> None:
        signal_all(pids(), number)

    forwarded = [number for number in numbers_of(names) if number not in ENDS]
    before = {number: signal.getsignal(number) for number in (*ENDS, *forwarded)}
    for number in forwarded:
        signal.signal(number, hand_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_all(pids: Iterable[int], number: int = signal.SIGTERM) -> None:
    """A signal to each of these processes; some may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_sessions(pids: Iterable[int]) -> None:
    """Kill what the workers have started: each of them leads a session of its own."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
