"""A rank breaks, or somebody stops the job: real processes, every kind of end, every way to start."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.endings import LIMIT, SAYS, Ending, alive, break_one, killed, pids_in, started, wait_until

pytestmark = pytest.mark.timeout(90)

# Each kind of end, each rank, each moment and each way to start, without the full product (that is R8).
TABLE = [
    ("script", "training", "exit-3", 0),
    ("script", "training", "segfault", 1),
    ("script", "starting", "exit-0", 1),
    ("run", "training", "raise", 1),
    ("fork", "alone", "_exit-0", 0),
    ("fork", "joining", "exit-0", 1),
    ("fork", "training", "memory", 0),
    ("fork", "saving", "kill", 1),
    ("fork", "saving", "raise", 0),
    ("spawn", "training", "_exit-4", 1),
    ("forkserver", "training", "segfault", 0),
]


@pytest.mark.parametrize(("way", "when", "how", "rank"), TABLE)
def test_the_cause_is_read_first_and_nothing_is_left(way, when, how, rank):
    end = break_one(way, when, how, rank)
    assert end.left == 0, end
    assert end.status not in (0, None), end
    assert end.gone < LIMIT, end
    assert end.told < LIMIT, end
    assert re.search(SAYS[how].format(rank=rank), end.first), end.err
    assert_one_traceback_at_most(end, rank)


def assert_one_traceback_at_most(end: Ending, rank: int) -> None:
    """No rank but the one that failed has shown its traceback."""
    assert not re.search(r"\[rank\d\]|Connection closed by peer|PeerError", end.err), end.err
    assert end.err.count("in work\n") <= 1, end.err


@pytest.mark.parametrize(("way", "when"), [("script", "training"), ("fork", "joining")])
def test_a_restart_follows_and_says_which_it_is(way, when):
    end = break_one(way, when, "kill", 1, restarts=1)
    assert end.status == 0, end
    assert end.left == 0, end
    assert end.out == "attempt 1\n"
    assert end.err.splitlines() == [
        "fabricfn: rank 1 was killed by signal 9 (SIGKILL); was the machine out of memory?",
        "fabricfn: restart 1 of 1",
    ]


def running(way, folder):
    """The job in the middle of its training, and the pids of its ranks alone."""
    process = started(way, "training", "raise", 7, folder)
    assert wait_until(lambda: len(pids_in(folder)) == 4, 60)
    return process, pids_in(folder)[::2]


@pytest.mark.parametrize(
    ("way", "number", "group"),
    [
        ("script", signal.SIGINT, True),
        ("script", signal.SIGTERM, False),
        ("fork", signal.SIGINT, False),
        ("fork", signal.SIGTERM, True),
    ],
)
def test_a_job_that_is_stopped_says_so_once(way, number, group, tmp_path):
    process, pids = running(way, tmp_path)
    try:
        began = time.monotonic()
        (os.killpg if group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=40)
        assert wait_until(lambda: not any(map(alive, pids)), LIMIT)
        assert time.monotonic() - began < LIMIT
    finally:
        killed([*pids, process.pid])
    if way == "script":
        assert err == f"fabricfn: stopped by {number.name}; no rank is left\n"
        assert process.returncode == 128 + number
    elif number == signal.SIGTERM:
        assert err == "fabricfn: launch was stopped by SIGTERM; no rank is left\n"
        assert process.returncode == -number
    else:  # the traceback of the one process that called launch
        assert err.count("Traceback") == 1
        assert err.rstrip().endswith("KeyboardInterrupt")


def listening(pid):
    """The addresses on which a process listens."""
    found = set()
    for name in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
        links = []
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                links.append(os.readlink(file))
            except FileNotFoundError:
                continue
        found |= {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_it_is_seen_when_somebody_listens_everywhere():
    with socket.create_server(("", 0)):
        assert not listening("self") <= LOOPBACK


@pytest.mark.parametrize("way", ["run", "fork", "spawn", "forkserver"])
def test_nothing_listens_beyond_the_loopback_interface_and_no_rank_outlives_a_killed_parent(way, tmp_path):
    process, pids = running(way, tmp_path)
    try:
        assert listening(process.pid) <= LOOPBACK
        for pid in pids:
            assert listening(pid)
            assert listening(pid) <= LOOPBACK
        process.kill()
        process.communicate()
        assert wait_until(lambda: not any(map(alive, pids)), 2.0)
    finally:
        killed(pids_in(tmp_path))


def test_a_rank_whose_parent_is_killed_while_it_imports_ends_too(tmp_path):
    """Long before init_runtime could say that it wants to."""
    (tmp_path / "slow.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "if 'RANK' in os.environ:\n"
        f"    Path({str(tmp_path)!r}, 'pids-0-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    time.sleep(1000)\n"
        "import fabricfn as ff\nff.init_runtime(devices=2, accelerator='cpu')\n"
    )
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py")], env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as job:
        assert wait_until(lambda: len(pids_in(tmp_path)) == 2, 60)
        job.kill()
    try:
        assert wait_until(lambda: not any(map(alive, pids_in(tmp_path))), 2.0)
    finally:
        killed(pids_in(tmp_path))


def test_torchrun_is_told_the_cause_too(tmp_path):
    program = str(Path(__file__).parent / "programs" / "breaks.py")
    by = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-backend=c10d")
    words = [sys.executable, *by, program, "script", "training", "raise", "1", str(tmp_path)]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("fabricfn: ")]
    assert lines[0] == "fabricfn: rank 1 raised ValueError: the data are gone"
    assert "rank      : 1" in done.stderr
    assert done.stderr.rindex("ValueError: the data are gone") > done.stderr.index("Root Cause")
    killed(pids_in(tmp_path))
