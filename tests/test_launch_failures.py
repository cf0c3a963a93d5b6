"""Ranks that fail, are killed or interrupted: the first cause is named, and no process is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fabricfn as ff
from fabricfn.errors import LaunchError
from fabricfn.failures import first_cause, record
from fabricfn.starting.agent import _Agent
from tests.support.starts import PROGRAMS, TWO, meet, own, wait_for

pytestmark = pytest.mark.timeout(120)


def is_running(pid):
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_first_cause_outranks_its_consequences():
    def failure(rank, error):
        return record(error, rank)

    def lost():
        try:
            raise RuntimeError("Connection closed by peer [127.0.0.1]")
        except RuntimeError as error:
            wrapped = ValueError("epoch 3 failed")
            wrapped.__cause__ = error
            return wrapped

    early, late = failure(0, lost()), failure(1, KeyError("cause"))
    assert early.consequence
    assert first_cause([early, late], {}) == (1, late)
    assert first_cause([early], {1: -9}) == (1, None)
    assert first_cause([early], {}) == (0, early)
    assert first_cause([late], {0: -6}) == (1, late)


class Odd(Exception):
    def __init__(self, code, detail):
        super().__init__(f"odd {code}")
        self.detail = detail


def test_launch_raises_the_first_failing_ranks_own_exception():
    def fn(rt, error):
        if rt.rank == 1:
            raise error
        meet(rt)

    with pytest.raises(ZeroDivisionError, match="by nothing") as caught:
        ff.launch(fn, ZeroDivisionError("by nothing"), **TWO)
    assert caught.value.args == ("by nothing",)
    assert "rank 1" in caught.value.__notes__[0]
    cause = str(caught.value.__cause__)
    assert cause.startswith("rank 1 failed first: raised ZeroDivisionError: by nothing\nTraceback")
    assert "raise error" in cause
    with pytest.raises(LaunchError, match="rank 1 raised Odd: odd 4"):  # it cannot be rebuilt from its arguments
        ff.launch(fn, Odd(4, "x"), **TWO)


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 was killed by signal 9 (SIGKILL)"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "rank 1 was killed by signal 15 (SIGTERM)"),
        (lambda: os.kill(os.getpid(), signal.SIGINT), "rank 1 was interrupted"),
        (lambda: sys.exit(3), "rank 1 left by sys.exit(3)"),
        (lambda: sys.exit(0), "rank 1 left by sys.exit(0)"),
        (lambda: os._exit(4), "rank 1 exited with status 4"),
        (lambda: os._exit(0), "rank 1 left with status 0"),
        (lambda: lambda: None, "cannot be pickled"),
    ],
)
def test_a_rank_that_ends_without_an_exception_is_named_and_nothing_is_left(end, says, tmp_path):
    def fn(rt):
        helper = subprocess.Popen(["sleep", "1000"])
        (tmp_path / f"pids-{rt.rank}").write_text(f"{os.getpid()} {helper.pid}")
        meet(rt)
        if rt.rank == 1:
            return end()
        meet(rt)

    with pytest.raises(LaunchError) as caught:
        ff.launch(fn, **TWO)
    assert says in str(caught.value)
    pids = [int(word) for file in tmp_path.iterdir() for word in file.read_text().split()]
    assert len(pids) == 4
    assert wait_for(lambda: not any(map(is_running, pids)), 5)


def test_the_first_one_to_die_is_named_where_torch_sees_it_before_we_do(monkeypatch):
    monkeypatch.setattr(_Agent, "_has_failed", lambda agent: False)

    def fn(rt):
        meet(rt)
        if rt.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        meet(rt)

    with pytest.raises(LaunchError, match=r"rank 1 was killed by signal 15 \(SIGTERM\)"):
        ff.launch(fn, **TWO)


def test_ctrl_c_ends_the_ranks():
    parent = os.getpid()

    def fn(rt):
        meet(rt)
        if rt.rank == 0:
            os.kill(parent, signal.SIGINT)
            signal.pause()
        meet(rt)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it as ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            ff.launch(fn, **TWO)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ranks_start_again_after_a_failure():
    def fn(rt):
        meet(rt)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rt.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        meet(rt)
        return int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    assert ff.launch(fn, max_restarts=1, **TWO) == [1, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_ranks_end_with_their_parent(number, tmp_path):
    words = [sys.executable, "launching.py", "hang", str(tmp_path)]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed parent leaves its folder behind
    with subprocess.Popen(words, cwd=PROGRAMS, env=environ, stdout=subprocess.PIPE, text=True) as parent:
        assert next(line for line in parent.stdout if own(line)) == "ready\n"
        pids = [int(file.read_text()) for file in tmp_path.glob("pid-*")]
        assert len(pids) == 2
        assert all(map(is_running, pids))
        parent.send_signal(number)
        assert parent.wait(20) == -number
    assert wait_for(lambda: not any(map(is_running, pids)), 10)
