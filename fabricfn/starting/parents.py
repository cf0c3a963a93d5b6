"""A worker ends with the process that started it, whatever ended that one."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from multiprocessing import spawn
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch.multiprocessing

from fabricfn.environments import Topology

PARENT_DIED = signal.SIGKILL
"""What the kernel sends to a worker whose parent was killed (Linux)."""

# The kernel forgets the wish at fork, but not at exec; a parent that is gone already sends nothing any more. A session
# of its own: Ctrl-C comes through the parent, and what the worker starts can be ended with it.
_BIND = (
    "import ctypes, os, sys; "
    f"ctypes.CDLL(None).prctl(1, {int(PARENT_DIED)}); "
    "os.getppid() == {parent} or os._exit(1); "
    "os.getsid(0) == os.getpid() or os.setsid(); "
)

Step = Literal["came", "joined", "left"]
"""What a rank tells the parent: it looks for the others, it has met them, it lets go of them since Python ends."""

_CRASH_FILES: list[IO[str]] = []
"""faulthandler keeps the number of a file alone, so somebody must keep it open."""


def bound(command: Sequence[str]) -> tuple[str, ...]:
    """The command, run so that it ends with this process from its first instruction on, before it imports anything.

    Without it a program whose parent is killed meanwhile would live until it has imported torch.
    """
    if sys.platform != "linux" or getattr(sys, "frozen", False):
        return tuple(command)
    bind = _BIND.format(parent=os.getpid())
    return (sys.executable, "-I", "-S", "-c", f"{bind}os.execv(sys.argv[1], sys.argv[1:])", *command)


@contextlib.contextmanager
def bound_spawn() -> Generator[None]:
    """What multiprocessing spawns inside the block is bound, too: it has no option for that.

    It imports torch sooner without garbage collection, which `entering.enter` switches on again.
    """
    plain = spawn.get_command_line

    def command(**options: Any) -> list[str]:
        words = list(plain(**options))
        if sys.platform == "linux" and "-c" in words:
            at = words.index("-c") + 1
            words[at] = f"import gc; gc.disable(); {_BIND.format(parent=os.getpid())}{words[at]}"
        return words

    spawn.get_command_line = command
    try:
        yield
    finally:
        spawn.get_command_line = plain


def attend(topology: Topology) -> None:
    """In a worker: end with the parent, and leave the stack behind where a crash ends this process."""
    cast(Any, torch.multiprocessing)._prctl_pr_set_pdeathsig(PARENT_DIED)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
    if parent is not None and parent.pid != os.getppid():  # a fork server, which lives as long as its children
        threading.Thread(target=_follow, args=(parent,), name="fabricfn parent", daemon=True).start()
    if topology.folder is None:
        return
    os.makedirs(topology.folder, exist_ok=True)
    mark(topology.folder, topology.rank, "came")
    if topology.name == "launch" or not faulthandler.is_enabled():
        file = crash_file(Path(topology.folder), topology.rank).open("w")
        _CRASH_FILES.append(file)
        faulthandler.enable(file)


def _follow(parent: Any) -> None:
    """End this process when its parent ends."""
    parent.join()
    os.kill(os.getpid(), PARENT_DIED)


def crash_file(folder: Path, rank: int) -> Path:
    """Where the stack of a rank that crashed stands."""
    return folder / f"rank-{rank}.crash"


def mark(folder: str | None, rank: int, what: Step) -> None:
    """In a worker: tell the parent how far this rank is."""
    if folder is not None:
        with contextlib.suppress(OSError):  # the parent is gone, and the folder with it
            _mark(Path(folder), rank, what).touch()


def marked(folder: Path, rank: int, what: Step) -> bool:
    """Whether that rank has come so far."""
    return _mark(folder, rank, what).exists()


def _mark(folder: Path, rank: int, what: Step) -> Path:
    return folder / f"rank-{rank}.{what}"
