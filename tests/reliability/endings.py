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
from collections.abc import Iterable
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


WAYS = ("script", "run", "fork", "spawn", "forkserver")


def breakages(times: int, kinds: tuple[str, ...] = tuple(SAYS)) -> dict[str, dict[str, int]]:
    """R8: for each kind of end and each rank, so many trials over all ways to start. Times in milliseconds."""
    rows: dict[str, dict[str, int]] = {}
    for how in kinds:
        for rank in (0, 1):
            ends = [break_one(WAYS[trial % len(WAYS)], "training", how, rank) for trial in range(times)]
            says = re.compile(SAYS[how].format(rank=rank))
            rows[f"{how}, rank {rank}"] = {
                "trials": times,
                "left": sum(end.left for end in ends),
                "status 0": sum(end.status == 0 for end in ends),
                "slow": sum(max(end.gone, end.told) > LIMIT for end in ends),
                "unnamed": sum(not says.search(end.first) for end in ends),
                "last gone, ms": milliseconds(end.gone for end in ends),
                "cause read, ms": milliseconds(end.told for end in ends),
            }
    return rows


def milliseconds(seconds: Iterable[float]) -> int:
    """The worst of them; -1 where one never came."""
    worst = max(seconds)
    return -1 if worst == float("inf") else round(1000 * worst)


def orphans(times: int) -> dict[str, dict[str, int]]:
    """R10: the parent is killed (-9); ranks that are there after 2 seconds, and when the last one was gone."""
    rows: dict[str, dict[str, int]] = {}
    for way in WAYS:
        spans: list[float] = []
        for _ in range(times):
            with tempfile.TemporaryDirectory(prefix="endings-") as name:
                folder = Path(name)
                with started(way, "training", "raise", 7, folder) as process:
                    assert wait_until(lambda folder=folder: len(pids_in(folder)) == 4, 60)
                    ranks = pids_in(folder)[::2]
                    process.kill()
                    began = time.monotonic()
                    gone = wait_until(lambda ranks=ranks: not any(map(alive, ranks)), 10)
                    spans.append(time.monotonic() - began if gone else float("inf"))
                    killed(pids_in(folder))
        late = sum(span > 2 for span in spans)
        rows[way] = {"kills": times, "orphans": late, "last gone, ms": milliseconds(spans)}
    return rows
