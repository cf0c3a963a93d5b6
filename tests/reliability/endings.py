"""R8 and R10: a rank breaks, or the process that started the ranks is killed; who is left, and what the user reads."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "programs" / "breaks.py"
LIMIT = 5.0
"""Seconds from the death of a rank to the end of the last process, and to the cause on the screen."""

SAYS = {
    "raise": r"rank {rank} .*raised ValueError: the data are gone",
    "exit-0": r"rank {rank} .*(status 0|exit\(0\)|has left)",
    "exit-3": r"rank {rank} .*(status 3|exit\(3\))",
    "_exit-0": r"rank {rank} .*(status 0|has left)",
    "_exit-4": r"rank {rank} .*status 4",
    "segfault": r"rank {rank} .*SIGSEGV",
    "kill": r"rank {rank} .*SIGKILL",
    "memory": r"rank {rank} .*(memory|Memory)",
}
"""What is told of each end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended."""

    status: int
    """The exit status of the process that started the ranks."""
    gone: float
    """Seconds from the death to the end of the last process; `inf` when one lived on."""
    told: float
    """Seconds from the death to the line that names the cause; `inf` when there is none."""
    left: int
    """Processes that were still there after the time limit, among them what the ranks had started."""
    out: str
    err: str

    @property
    def first(self) -> str:
        """The first line on stderr."""
        return self.err.splitlines()[0] if self.err else ""


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command(way: str, *words: str) -> list[str]:
    """The program, started directly or by `fabricfn run`."""
    if way == "run":
        return [sys.executable, "-m", "fabricfn", "run", "--devices", "2", str(PROGRAM), "script", *words]
    return [sys.executable, str(PROGRAM), way, *words]


def wait_until(condition, seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def started(way: str, when: str, how: str, rank: int, folder: Path, restarts: int = 0) -> subprocess.Popen[str]:
    """The job."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    return subprocess.Popen(
        command(way, when, how, str(rank), str(folder), str(restarts)),
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def pids_in(folder: Path, attempt: int = 0) -> list[int]:
    """The ranks and what they started."""
    return [int(word) for file in folder.glob(f"pids-{attempt}-*") for word in file.read_text().split()]


def killed(pids: list[int]) -> None:
    """What a failed trial left behind is ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def break_one(way: str, when: str, how: str, rank: int, restarts: int = 0) -> Ending:
    """Start two ranks, of which one breaks; and wait for the end.

    Args:
        way: script, run, fork, spawn or forkserver.
        when: starting (before it joins; scripts alone), joining, training, saving or alone.
        how: a key of `SAYS`.
        rank: which.
        restarts: how often all start again.
    """
    with tempfile.TemporaryDirectory(prefix="endings-") as name:
        folder = Path(name)
        process = started(way, when, how, rank, folder, restarts)
        lines: list[tuple[float, str]] = []
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: lines.extend((time.time(), line) for line in process.stderr))
        reader.start()
        out, pids = "", []
        try:
            assert wait_until(lambda: (folder / "died").exists() or process.poll() is not None, 60)
            died = float((folder / "died").read_text()) if (folder / "died").exists() else time.time()
            pids = [process.pid, *pids_in(folder)]
            deadline = died + 4 * LIMIT + (40 if restarts else 0)
            while any(map(alive, pids)) and time.time() < deadline:
                time.sleep(0.005)
                process.poll()
                pids = [process.pid, *pids_in(folder)]
            gone = time.time() - died
        finally:
            left = [pid for pid in pids if alive(pid)]
            killed([*left, process.pid])
            reader.join()
            with process:
                out = process.stdout.read() if process.stdout else ""
    says = re.compile(SAYS[how].format(rank=rank))
    told = min((at - died for at, line in lines if says.search(line)), default=float("inf"))
    return Ending(
        status=process.returncode,
        gone=float("inf") if left else gone,
        told=told,
        left=len(left),
        out=out,
        err="".join(line for _, line in lines),
    )
