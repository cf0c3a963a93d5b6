"""A thread that ends this rank when it waits for another one in vain, and the back end does not notice.

[Note: guard] gloo raises when a connection closes or its limit passes; then this thread has nothing to do. But a rank
that has left need not close its connections (a worker of `launch` lives on until all have returned), a wait in C++
cannot be interrupted, and a collective of NCCL is waited for nowhere: so what is known for sure ends the process.
"""

import threading
import time
import weakref
from collections.abc import Callable

from fabricfn.errors import FabricfnError
from fabricfn.watching.board import IN_CALL, LEFT
from fabricfn.watching.explaining import cause, hang
from fabricfn.watching.watch import Watch

TICK = 0.25
"""Seconds between two looks."""
PATIENCE = 1.5
"""Seconds that the back end has to raise by itself once a rank is gone, or the limit has passed."""


def guard(watch: Watch, finish: Callable[[FabricfnError], None], *, host_waits: bool) -> None:
    """Look after this rank until it leaves.

    Args:
        watch: this rank's.
        finish: ends this process, saying why.
        host_waits: whether a call returns when it is done (CPU), and not when it is started.
    """
    of = weakref.ref(watch)
    watch.guard = threading.Thread(target=_look, args=(of, watch.left, finish, host_waits), daemon=True)
    watch.guard.name = "fabricfn guard"
    watch.guard.start()


def _look(
    of: "weakref.ref[Watch]", left: threading.Event, finish: Callable[[FabricfnError], None], host_waits: bool
) -> None:
    while not left.wait(TICK) and (watch := of()) is not None:
        error = _in_vain(watch, host_waits)
        if error is not None:
            finish(error)
        del watch  # nobody else may hold it


def _in_vain(watch: Watch, host_waits: bool) -> FabricfnError | None:
    """Why the wait of this rank has no end, where that is sure."""
    mine, now = watch.mine(), time.monotonic_ns()
    if mine.state >= LEFT or (mine.state != IN_CALL and host_waits) or now - mine.since < PATIENCE * 1e9:
        return None
    behind = [place for place in watch.places() if place.calls < mine.calls]
    since = max([mine.since, *(place.since for place in behind)])
    error: FabricfnError | None = None
    if any(place.ended for place in behind) and now - since > PATIENCE * 1e9:
        error = cause(watch)
    elif behind and now - since > (watch.limit + PATIENCE) * 1e9:
        error = hang(watch)
    return error if watch.mine().since == mine.since else None
