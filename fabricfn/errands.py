"""Work that goes on beside the training, on a thread: one errand at a time in a world, and no error of one is lost.

[Note: errands] As torch keeps its process groups, the errands of a process stand in one list, each with its world: two
runtimes of one world share the order of their collectives, so they share this too. Whoever asks first is given an
errand's error: its `outcome`, the next errand of the world, `finish`; else it is printed when Python ends, and the
status is 1. Python is not left while an errand runs. A forked child has the list, but neither threads nor errands.
"""

import atexit
import concurrent.futures.thread
import contextlib
import dataclasses
import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

from fabricfn.errors import FabricfnError
from fabricfn.world import World


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Errand:
    """One piece of work that was begun."""

    world: World
    what: str
    """Names it in messages."""
    pid: int = dataclasses.field(default_factory=os.getpid)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    result: Any = None
    error: BaseException | None = None
    taken: bool = False
    """Whether somebody was given the error."""
    kept: Any = None
    """What the next errand of the world is given: memory that has been used before."""
    thread: threading.Thread | None = None
    """Runs it; None where no thread could be had."""


_errands: list[Errand] = []


def begin(world: World, what: str, work: Callable[[], Any], kept: Any = None) -> Errand:
    """Run `work` on a thread of its own. The errand before it has been `settled`."""
    errand = Errand(world=world, what=what, kept=kept)

    def run() -> None:
        try:
            errand.result = work()
        except BaseException as error:  # whoever asks is given it
            errand.error = error
        finally:
            errand.ended.set()

    _attend_exit()
    _errands.append(errand)
    # a daemon, so that a second Ctrl-C ends a process whose disk hangs
    thread = threading.Thread(target=run, name=what, daemon=True)
    try:
        thread.start()
        errand.thread = thread
    except RuntimeError:  # no more threads: the other ranks wait for this one, so it is done here
        run()
    return errand


def _wait(errand: Errand) -> None:
    errand.ended.wait()
    if errand.thread is not None:
        errand.thread.join()  # a daemon that is on its last lines when Python ends would abort the process


def outcome(errand: Errand) -> Any:
    """What the errand returned or raised, as often as it is asked for; waits for its end."""
    if errand.pid != os.getpid():
        raise FabricfnError(f"{errand.what} goes on in the process that began it, not in this child of it.")
    _wait(errand)
    errand.taken = True
    if errand.error is not None:
        raise errand.error
    return errand.result


def settled(world: World) -> tuple[BaseException | None, Any]:
    """Wait for the end of what was begun in this world, and forget it.

    Returns:
        its error if nobody has been given it, and what it kept.
    """
    error, kept = None, None
    for errand in [errand for errand in _errands if errand.world == world]:
        if errand.pid == os.getpid():
            _wait(errand)
            if errand.error is not None and not errand.taken:
                error, errand.taken = errand.error, True
            kept, errand.kept = errand.kept, None
        with contextlib.suppress(ValueError):
            _errands.remove(errand)
    return error, kept


def finish(world: World) -> None:
    """Wait for the end of what was begun in this world; raise its error if nobody has been given it."""
    error, _ = settled(world)
    if error is not None:
        raise error


def finish_all() -> list[BaseException]:
    """Wait for the end of all that was begun in this process; the errors that nobody has been given."""
    found = [settled(errand.world)[0] for errand in list(_errands)]
    return [error for error in found if error is not None]


@functools.cache
def _attend_exit() -> None:
    # Not `atexit`, whose functions run after Python's pools of threads have closed; they do in a function of this kind,
    # registered when this module was imported, and the last one runs first.
    assert concurrent.futures.thread
    cast(Any, threading)._register_atexit(_at_exit)


def _at_exit() -> None:
    errors = finish_all()
    for error in errors:
        sys.excepthook(type(error), error, error.__traceback__)
    if errors:
        atexit.register(_fail)


def _fail() -> None:
    """Leave with status 1, which Python's own way out cannot do any more; all other exit functions run before."""
    atexit.unregister(_fail)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)
