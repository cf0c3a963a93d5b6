"""A rank breaks, or somebody stops the job: real processes, every kind of end, every way to start."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.reliability.endings import (
    LIMIT,
    LOOPBACK,
    PROGRAMS,
    SAYS,
    Ending,
    aborted,
    alive,
    break_one,
    killed_at_last,
    listening,
    pids_in,
    running,
    wait_until,
)

pytestmark = pytest.mark.timeout(90)

# Each kind of end, each rank, each moment and most ways to start; the full product is R8.
TABLE = [
    ("script", "training", "exit-3", 0),
    ("script", "starting", "exit-0", 1),
    ("run", "training", "raise", 1),
    ("fork", "alone", "_exit-0", 0),
    ("fork", "training", "memory", 0),
    ("fork", "training", "segfault", 1),
    ("fork", "saving", "kill", 1),
    ("fork", "saving", "raise", 0),
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


def test_a_restart_follows_and_says_which_it_is():
    end = break_one("fork", "joining", "kill", 1, restarts=1)
    assert end.status == 0, end
    assert end.left == 0, end
    assert end.out == "attempt 1\n"
    assert end.err.splitlines() == [
        "fabricfn: rank 1 was killed by signal 9 (SIGKILL); was the machine out of memory?",
        "fabricfn: restart 1 of 1",
    ]


@pytest.mark.parametrize(
    ("way", "number", "group"),
    [
        ("script", signal.SIGINT, True),
        ("fork", signal.SIGINT, False),
        ("fork", signal.SIGTERM, True),
    ],
)
def test_a_job_that_is_stopped_says_so_once(way, number, group, tmp_path):
    with running(way, tmp_path) as (process, pids):
        began = time.monotonic()
        (os.killpg if group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=40)
        assert wait_until(lambda: not any(map(alive, pids)), LIMIT)
        assert time.monotonic() - began < LIMIT
    if way == "script":
        assert err == f"fabricfn: stopped by {number.name}; no rank is left\n"
        assert process.returncode == 128 + number
    elif number == signal.SIGTERM:
        assert err == "fabricfn: launch was stopped by SIGTERM; no rank is left\n"
        assert process.returncode == -number
    else:  # the traceback of the one process that called launch
        assert err.count("Traceback") == 1
        assert err.rstrip().endswith("KeyboardInterrupt")


def test_it_is_seen_when_somebody_listens_everywhere():
    with socket.create_server(("", 0)):
        assert not listening("self") <= LOOPBACK


@pytest.mark.parametrize("way", ["run", "fork", "forkserver"])
def test_nothing_listens_beyond_the_loopback_interface_and_no_rank_outlives_a_killed_parent(way, tmp_path):
    with running(way, tmp_path) as (process, pids):
        assert listening(process.pid) <= LOOPBACK
        for pid in pids:
            assert listening(pid)
            assert listening(pid) <= LOOPBACK
        process.kill()
        assert wait_until(lambda: not any(map(alive, pids)), 2.0)


SLOW = """
import os, time
from pathlib import Path
import fabricfn as ff
{guard}    ff.{call}
else:
    name = os.environ["RANK"] if "RANK" in os.environ else os.getpid()
    Path({folder!r}, f"pids-0-{{name}}").write_text(str(os.getpid()))
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(
    ("guard", "call"),
    [
        ("if 'RANK' not in os.environ:\n", "init_runtime(devices=2, accelerator='cpu')"),
        ("if __name__ == '__main__':\n", "launch(print, devices=2, accelerator='cpu', start_method='spawn')"),
    ],
)
def test_ranks_that_import_still_end_with_the_job(guard, call, number, tmp_path):
    """Long before init_runtime could say that it wants to. A terminal sends Ctrl-C to all processes of the job."""
    (tmp_path / "slow.py").write_text(SLOW.format(guard=guard, call=call, folder=str(tmp_path)))
    with (tmp_path / "err").open("w") as file:
        words, environ = [sys.executable, str(tmp_path / "slow.py")], {**os.environ, "TMPDIR": str(tmp_path)}
        job = subprocess.Popen(words, env=environ, text=True, stderr=file, start_new_session=True)
        with killed_at_last(job, tmp_path):
            assert wait_until(lambda: len(pids_in(tmp_path)) == 2, 60)
            os.killpg(job.pid, number)
            assert wait_until(
                lambda: not any(map(alive, [job.pid, *pids_in(tmp_path)])), 2.0 if number == signal.SIGKILL else LIMIT
            )
    err = (tmp_path / "err").read_text()
    if number == signal.SIGKILL:
        assert err == ""
    elif "init_runtime" in call:
        assert err == "fabricfn: stopped by SIGINT; no rank is left\n"
    else:  # the traceback of the process that called launch
        assert err.count("Traceback") == 1


def test_no_rank_aborts_when_python_ends_right_after_a_collective():
    """gloo's threads still hold its tensors then, and Python's own threads may be anywhere."""
    assert aborted(ranks=4, times=2) == 0


def test_torchrun_is_told_the_cause_too(tmp_path):
    by = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-backend=c10d")
    words = [sys.executable, *by, str(PROGRAMS / "breaks.py"), "script", "training", "raise", "1", str(tmp_path)]
    with (tmp_path / "err").open("w+") as file:
        job = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stderr=file)
        with killed_at_last(job, tmp_path):
            assert job.wait(60) == 1
        err = (tmp_path / "err").read_text()
    lines = [line for line in err.splitlines() if line.startswith("fabricfn: ")]
    assert lines[0] == "fabricfn: rank 1 raised ValueError: the data are gone"
    assert "rank      : 1" in err
    assert err.rindex("ValueError: the data are gone") > err.index("Root Cause")
