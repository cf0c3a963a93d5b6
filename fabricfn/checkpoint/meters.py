"""How far a save or a load has come, as rank 0 tells it: to a function of the user, or in plain lines."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from fabricfn.checkpoint.format.manifest import BLOCK

Progress = Callable[[int, int], object] | bool | None
"""(bytes done, bytes in all) of rank 0's part; True prints."""
Tell = Callable[[int], None]
"""Is told of so many bytes more that are done."""

PAUSE = 0.1
"""Seconds between two calls of a user's function, at least."""
PATIENCE = 3.0
"""Seconds until the first line is printed, and between two."""


def meter(progress: Progress, what: str, total: int) -> Tell:
    """A function that is told of bytes as they are done, on any thread, and now and then tells the user.

    The last call of a function of the user has both numbers equal.

    Args:
        progress: see `Progress`.
        what: begins the lines that are printed.
        total: the bytes in all.
    """
    printed, began, lock = progress is True, time.perf_counter(), threading.Lock()
    done, due = 0, began + PATIENCE if printed else 0.0

    def line(done: int, total: int) -> None:
        seconds = time.perf_counter() - began
        left = f"{seconds:.0f} s, about {seconds * (total - done) / max(1, done):.0f} s left"
        print(f"{what}: {done / 1e9:.2f} of {total / 1e9:.2f} GB in {left}", file=sys.stderr, flush=True)

    show = line if progress is True else progress

    def tell(count: int) -> None:
        nonlocal done, due
        if not count or not callable(show):
            return
        with lock:
            done += count
            now = time.perf_counter()
            if now >= due or (done >= total and not printed):
                due = now + (PATIENCE if printed else PAUSE)
                show(done, total)

    return tell


def told(chunks: Iterable[memoryview], tell: Tell) -> Iterator[memoryview]:
    """The same bytes, in chunks of at most one block, each told of when the next one is asked for."""
    for chunk in chunks:
        for begin in range(0, chunk.nbytes, BLOCK):
            part = chunk[begin : begin + BLOCK]
            yield part
            tell(part.nbytes)
