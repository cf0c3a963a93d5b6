"""The signals by which a cluster announces the end of a job, as a flag that the training loop asks for.

[Note: stop signals] The handlers are installed at start, but until the loop has asked for the flag once, a signal does
what it did before: a program that never asks still ends by SIGTERM. Handlers of the user's own that were there are
called, too.
"""

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from fabricfn.errors import ConfigurationError

STOP_SIGNALS = ("SIGTERM", "SIGUSR1")


class StopFlag:
    """Whether this process was told to stop. Changed by signal handlers: no place for locks."""

    __slots__ = ("agreed", "asked", "before", "calls", "pid", "users", "wanted")

    def __init__(self) -> None:
        self.wanted = False
        """A signal has come."""
        self.asked = False
        """The loop has asked: from now on signals only set the flag."""
        self.agreed = False
        """All ranks know."""
        self.calls, self.users, self.pid = 0, 0, os.getpid()
        self.before: dict[signal.Signals, Any] = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        before = self.before.get(signal.Signals(number), signal.SIG_DFL)
        mine = self.asked and os.getpid() == self.pid  # not in a process that was forked, as a loader's workers are
        self.wanted = self.wanted or mine
        if callable(before):
            before(number, frame)
        elif not mine and before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def numbers_of(names: Sequence[str | int]) -> list[signal.Signals]:
    """The signals of these names or numbers.

    Raises:
        ConfigurationError: there is no such signal here, or no process can handle it.
    """
    found: list[signal.Signals] = []
    for name in names:
        try:
            number = signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
        except (KeyError, ValueError):
            raise ConfigurationError(
                f'stop_signals={names!r}: this system has no signal {name!r}. Write names such as "SIGTERM".'
            ) from None
        if number in (signal.SIGKILL, signal.SIGSTOP):
            raise ConfigurationError(f"stop_signals={names!r}: no process can handle {number.name}.")
        found.append(number)
    return found


def install(names: Sequence[str | int]) -> StopFlag | None:
    """The flag that these signals set; that of an earlier call, if there is one. None outside the main thread."""
    numbers = numbers_of(names)
    if threading.current_thread() is not threading.main_thread() or not numbers:
        return None
    there = (getattr(signal.getsignal(number), "__self__", None) for number in numbers)
    flag = next((one for one in there if isinstance(one, StopFlag) and one.pid == os.getpid()), None) or StopFlag()
    flag.users += 1
    for number in numbers:
        before = signal.getsignal(number)
        # None is a handler that C code installed, which could not be put back
        if before is not None and getattr(before, "__self__", None) is not flag:
            flag.before[number] = before
            signal.signal(number, flag.handle)
    return flag


def uninstall(flag: StopFlag | None) -> None:
    """Put back what was there, after the last of those that installed it; a handler that came later stays."""
    if flag is None or os.getpid() != flag.pid or threading.current_thread() is not threading.main_thread():
        return
    flag.users -= 1
    if flag.users:
        return
    for number, before in flag.before.items():
        if getattr(signal.getsignal(number), "__self__", None) is flag:
            signal.signal(number, before)
    flag.before.clear()
