"""Worlds whose ranks are processes with real gloo groups: for the truth, for random numbers, for crashes."""

import contextlib
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from fabricfn.errors import LaunchError
from fabricfn.precision import Precision
from fabricfn.strategy import Strategy
from fabricfn.testing.carrying import END, FORK, READY, WHERE, pack
from fabricfn.testing.ranks import TIMEOUT, Ranks, named, options_of

START = 120.0
"""Seconds that the mother gets to import torch."""
GRACE = 0.3
"""Seconds to wait for further reports after the first failure: its cause may be the second one to arrive."""


class ProcessRanks:
    """A pool of processes, started at the first run, and new ones after a failure. See `Ranks`."""

    kind = "processes"

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.mother: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self.folder = tempfile.mkdtemp(prefix="fabricfn-")
        self.size, self.epoch = 0, 0
        self.busy = threading.Lock()
        self.jobs: list[Connection] = []
        self.lives: list[Connection] = []

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
        """See `Ranks.run`."""
        options = options_of(self.world_size, world_size, strategy, precision, seed)
        payload = pack((fn, args))
        if not self.busy.acquire(blocking=False):
            raise LaunchError("a world runs one function at a time. Open another one.")
        with contextlib.ExitStack() as stack:
            stack.callback(self.busy.release)
            if not self.jobs:
                self._fork()
            if self.size != options.world_size:
                self.size, self.epoch = options.world_size, self.epoch + 1
            place = os.path.join(self.folder, str(self.epoch))
            undo = stack.enter_context(contextlib.ExitStack())
            undo.callback(self._end)  # a failure, Ctrl-C: no rank is left in the middle of something
            results = self._exchange(pack((place, timeout, options, payload)), options.world_size, timeout)
            undo.pop_all()
        return results

    def close(self) -> None:
        """End the processes."""
        if self.mother is not None and self.control is not None:
            for connection in (*self.jobs, *self.lives):
                connection.close()
            self.control.close()
            self.mother.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_mother(self) -> socket.socket:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(START)
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from fabricfn.testing.process_rank import mother\n"
            f"mother({theirs.fileno()}, {self.world_size}, {self.folder!r})"
        )
        loopback = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        self.mother = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            env={**loopback, **os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        return self.control

    def _fork(self) -> None:
        control = self.control or self._start_mother()
        theirs: list[Connection] = []
        for mine in (self.jobs, self.lives) * self.world_size:
            own, other = Pipe()
            mine.append(own)
            theirs.append(other)
        socket.send_fds(control, [FORK], [connection.fileno() for connection in theirs])
        for connection in theirs:
            connection.close()
        self.size = 0
        self._confirm(control)

    def _end(self) -> None:
        for connection in (*self.jobs, *self.lives):
            connection.close()
        self.jobs, self.lives = [], []
        if self.control is not None:
            self.control.sendall(END)
            self._confirm(self.control)

    def _confirm(self, control: socket.socket) -> None:
        if control.recv(16) != READY:
            raise LaunchError("the processes could not be started; what they printed says why.")

    def _exchange(self, message: bytes, world_size: int, timeout: float) -> list[Any]:
        pending = dict(zip(self.jobs[:world_size], range(world_size), strict=True))
        for connection in pending:
            connection.send_bytes(message)
        results: dict[int, Any] = {}
        failures: list[tuple[bool, float, int, Any]] = []
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready and not failures:
                raise self._hung(sorted(pending.values()), world_size, timeout)
            if not ready:
                break
            for connection in list(pending):
                if connection not in ready:
                    continue
                rank = pending.pop(connection)
                try:
                    report: Any = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    report = ("dead", 0.0)
                if report[0] == "ok":
                    results[rank] = report[2]
                    continue
                if not failures:
                    deadline = time.monotonic() + GRACE
                failures.append((report[0] != "dead", report[1], rank, report))
        if failures:
            _, _, rank, report = min(failures, key=lambda failure: failure[:3])
            if report[0] == "error":
                raise named(report[2], rank, world_size, report[3])
            raise LaunchError(f"rank {rank} of {world_size} died without an exception: a signal, os._exit, no memory.")
        return [results[rank] for rank in range(world_size)]

    def _hung(self, late: list[int], world_size: int, timeout: float) -> LaunchError:
        places = {rank: self._where(rank) for rank in late}
        hung = {rank: place for rank, place in places.items() if "distributed_c10d.py" not in place} or places
        names = ", ".join(f"rank {rank}" for rank in hung)
        text = "".join(f"rank {rank} is at\n{place}" for rank, place in hung.items())
        others = ", ".join(str(rank) for rank in range(world_size) if rank not in late)
        returned = f" (returned: {others})" if others else ""
        return LaunchError(f"{names} of {world_size} did not return within {timeout} s{returned}.\n{text}")

    def _where(self, rank: int) -> str:
        with contextlib.suppress(OSError, EOFError):
            self.lives[rank].send_bytes(WHERE)
            if self.lives[rank].poll(1.0):
                return self.lives[rank].recv_bytes().decode()
        return "(no answer: inside a library call)\n"


@contextlib.contextmanager
def processes(world_size: int) -> Generator[Ranks]:
    """A world of ranks that are processes, with real gloo groups over the loopback device.

    For what threads cannot show: the truth of a real back end, random numbers, a rank that dies or hangs. Starting
    takes the time of one `import torch`; each run then about a millisecond, and about 30 when the number of ranks
    changes. No process is left behind, whatever happens to this one.

    A function travels by pickle, closures by cloudpickle (the extra "closures"). The global random generators start
    from `seed` in every run. Global state that a function changes otherwise stays until the world is closed.

    Args:
        world_size: how many ranks there are; `run(..., world_size=2)` uses the first two of them.

    Example:
        >>> import operator
        >>> with processes(2) as ranks:
        ...     ranks.run(operator.attrgetter("rank"))
        [0, 1]
    """
    ranks = ProcessRanks(world_size)
    try:
        yield ranks
    finally:
        ranks.close()
