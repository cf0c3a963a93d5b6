"""R8, R10, R14: a rank breaks, or the process that started it is killed; who is left, and what the user reads."""

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
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

PROGRAMS = Path(__file__).parents[1] / "programs"
LIMIT = 5.0
"""Seconds from the death of a rank to the end of the last process, and to the cause on the screen."""
WAYS = ("script", "run", "fork", "spawn", "forkserver")
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as the kernel writes them."""

SAYS = {
    "raise": r"rank {rank} .*(raised|rank {rank}:) ValueError: the data are gone",
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

    status: int | None
    """The exit status of the process that started the ranks; None when it had not ended after the time limit."""
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


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def pids_in(folder: Path, attempt: int = 0) -> list[int]:
    """The ranks and what they started, in turn."""
    return [int(word) for file in folder.glob(f"pids-{attempt}-*") for word in file.read_text().split()]


@contextlib.contextmanager
def killed_at_last(process: subprocess.Popen[str], folder: Path) -> Generator[None]:
    """Nothing of the job outlives the block: what its processes hold, such as the pipe of stderr, is free then."""
    try:
        yield
    finally:
        for pid in [process.pid, *pids_in(folder), *pids_in(folder, 1)]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def started(way: str, when: str, how: str, rank: int, folder: Path, restarts: int = 0) -> subprocess.Popen[str]:
    """The job, started directly or by `fabricfn run`."""
    run = ("-m", "fabricfn", "run", "--devices", "2") if way == "run" else ()
    words = ("script" if way == "run" else way, when, how, str(rank), str(folder), str(restarts))
    return subprocess.Popen(
        [sys.executable, *run, str(PROGRAMS / "breaks.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@contextlib.contextmanager
def running(way: str, folder: Path) -> Generator[tuple[subprocess.Popen[str], list[int]]]:
    """Two ranks in the middle of their training, and their pids."""
    process = started(way, "training", "raise", 7, folder)
    with process, killed_at_last(process, folder):
        assert wait_until(lambda: len(pids_in(folder)) == 4, 60)
        yield process, pids_in(folder)[::2]


def break_one(way: str, when: str, how: str, rank: int, restarts: int = 0) -> Ending:
    """Start two ranks, of which one breaks; and wait for the end.

    Args:
        way: one of `WAYS`.
        when: starting (before it joins; scripts alone), joining, training, saving or alone.
        how: a key of `SAYS`.
        rank: which.
        restarts: how often all start again.
    """
    lines: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory(prefix="endings-") as name:
        folder = Path(name)
        process = started(way, when, how, rank, folder, restarts)
        assert process.stdout is not None
        assert process.stderr is not None
        err = process.stderr
        reader = threading.Thread(target=lambda: lines.extend((time.time(), line) for line in err))
        reader.start()
        with killed_at_last(process, folder):
            assert wait_until(lambda: (folder / "died").exists() or process.poll() is not None, 60)
            died = float((folder / "died").read_text()) if (folder / "died").exists() else time.time()

            def there() -> list[int]:
                return [pid for pid in (process.pid, *pids_in(folder)) if alive(pid)]

            process_ended = wait_until(lambda: not there(), 4 * LIMIT + (40 if restarts else 0))
            gone = time.time() - died
            left, status = len(there()), process.poll()
        reader.join()
        with process:
            out = process.stdout.read()
    says = re.compile(SAYS[how].format(rank=rank))
    return Ending(
        status=status,
        gone=gone if process_ended else float("inf"),
        told=min((at - died for at, line in lines if says.search(line)), default=float("inf")),
        left=left,
        out=out,
        err="".join(line for _, line in lines),
    )


def breakages(full: bool) -> dict[str, dict[str, int]]:
    """R8: trials of each kind of end and each rank, over all ways to start. Times in milliseconds."""
    rows: dict[str, dict[str, int]] = {}
    for how in SAYS:
        times = (20 if how in ("raise", "exit-0", "kill") else 5) if full else 2
        for rank in (0, 1):
            ends = [break_one(WAYS[trial % len(WAYS)], "training", how, rank) for trial in range(times)]
            says = re.compile(SAYS[how].format(rank=rank))
            rows[f"{how}, rank {rank}"] = {
                "trials": times,
                "left": sum(end.left for end in ends),
                "status 0": sum(not end.status for end in ends),
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


def aborted(ranks: int, times: int) -> int:
    """How many ranks of so many jobs ended otherwise than with status 0, Python ending right after a collective."""
    words = [sys.executable, str(PROGRAMS / "leaving.py"), str(ranks), str(times)]
    return subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


def orphans(times: int) -> dict[str, dict[str, int]]:
    """R10: the parent is killed (-9); ranks that are there after 2 seconds, and when the last one was gone."""
    rows: dict[str, dict[str, int]] = {}
    for way in WAYS:
        spans: list[float] = []
        for _ in range(times):
            with tempfile.TemporaryDirectory(prefix="endings-") as name, running(way, Path(name)) as (process, ranks):
                process.kill()
                began = time.monotonic()
                gone = wait_until(lambda ranks=ranks: not any(map(alive, ranks)), 10)
                spans.append(time.monotonic() - began if gone else float("inf"))
        late = sum(span > 2 for span in spans)
        rows[way] = {"kills": times, "orphans": late, "last gone, ms": milliseconds(spans)}
    return rows


def listening(pid: int | str) -> set[str]:
    """The addresses on which a process listens."""
    links: set[str] = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(file))
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


def listeners() -> dict[str, dict[str, int]]:
    """R14: on how many addresses the ranks and the process that started them listen."""
    rows: dict[str, dict[str, int]] = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory(prefix="endings-") as name, running(way, Path(name)) as (process, ranks):
            found = [address for pid in (process.pid, *ranks) for address in listening(pid)]
        rows[way] = {"processes": 3, "on loopback": len(found), "beyond": sum(at not in LOOPBACK for at in found)}
    return rows
