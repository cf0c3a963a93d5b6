"""Where another process of this machine stands: it writes its Python stack into a file when it gets a signal.

The handler is C code of Python's own `faulthandler`: it needs no thread and no lock, so that a rank answers from inside
any call, one that holds the interpreter's lock included.
"""

import contextlib
import faulthandler
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import torch

from fabricfn.watching.board import Place

ASK = getattr(signal, "SIGRTMIN", 0) + 7 if hasattr(signal, "SIGRTMIN") else 0
"""The signal; one of those that have no meaning elsewhere. 0 where the system has none."""
ANSWER = 0.5
"""Seconds to wait for the stack."""
SHOWN = 6
"""So many lines of it are shown."""
OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
"""The folders whose lines say nothing to a user."""
STARTS = tuple(str(Path("fabricfn", "starting", name)) for name in ("launching.py", "working.py"))
"""What is further out than these files is how the rank was started."""
LINE = re.compile(r'File "(.*)", line (\d+) in (.*)')


def listen() -> int:
    """Answer from now on. Returns the descriptor of the file; -1 where this is not possible."""
    if not ASK or signal.getsignal(ASK) is not signal.SIG_DFL:
        return -1
    try:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        faulthandler.register(ASK, file=descriptor, all_threads=False)
    except (OSError, RuntimeError, ValueError):
        return -1
    return descriptor


def deaf(descriptor: int) -> None:
    """Answer no more. To be called once the others cannot read any more that this process listens."""
    if descriptor >= 0:
        # A signal may be on its way: ignored, since by default it would end this process.
        faulthandler.unregister(ASK)
        signal.signal(ASK, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def stack_of(place: Place) -> list[tuple[str, int, str]]:
    """(file, line, function) of the process, innermost first; empty where it gives none."""
    if place.stack_file < 0 or place.ended:
        return []
    path = f"/proc/{place.pid}/fd/{place.stack_file}"
    try:
        size = os.stat(path).st_size
        os.kill(place.pid, ASK)
        deadline, seen = time.monotonic() + ANSWER, size
        while time.monotonic() < deadline:
            time.sleep(0.02)
            now = os.stat(path).st_size
            if now == seen > size:
                break
            seen = now
        with open(path, "rb") as file:
            file.seek(size)
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [(name, int(line), function) for name, line, function in LINE.findall(text)]


def standing(stack: list[tuple[str, int, str]]) -> tuple[str, bool]:
    """(the lines that a user reads, whether the innermost one is outside torch and fabricfn)."""
    starts = [place for place, entry in enumerate(stack) if entry[0].endswith(STARTS)]
    stack = stack[: starts[0]] if starts else stack
    lines = [entry for entry in stack if not entry[0].startswith(OWN)] or stack
    shown = "\n".join(f"    {short(name)}:{line} in {function}" for name, line, function in lines[:SHOWN])
    return shown, bool(stack) and not stack[0][0].startswith(OWN)


def short(path: str) -> str:
    """A path as a message shows it: from here on, where it lies below."""
    with contextlib.suppress(ValueError, OSError):
        below = os.path.relpath(path)
        return path if below.startswith("..") else below
    return path
