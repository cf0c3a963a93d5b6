"""Pre-emption: a signal sets a flag, all ranks leave their loop at the same step. Real processes, real signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

import fabricfn as ff
from fabricfn.errors import ConfigurationError
from fabricfn.interrupts import StopFlag, install, uninstall
from tests.support.starts import PROGRAMS, wait_for

PROGRAM = str(PROGRAMS / "stops.py")

pytestmark = pytest.mark.timeout(60)


def start(folder, mode, *, by=()):
    """The program in a process of its own, when its ranks are in their loops; and the ranks' pids."""
    words = [sys.executable, *by, PROGRAM, str(folder), mode]
    process = subprocess.Popen(words, text=True, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    there = wait_for(lambda: all((folder / f"pid-{rank}").exists() for rank in range(2)), 20)
    assert there, process.stderr.read()
    return process, [int((folder / f"pid-{rank}").read_text()) for rank in range(2)]


def left(folder):
    """At which step each rank left its loop."""
    return [int(file.read_text()) for file in sorted(folder.glob("left-*"))]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_the_script_lets_all_ranks_leave_at_the_same_step(number, tmp_path):
    process, _ = start(tmp_path, "ask")
    process.send_signal(number)
    _, told = process.communicate(timeout=20)
    assert (process.returncode, told) == (0, "")
    assert len(left(tmp_path)) == 2
    assert len(set(left(tmp_path))) == 1


def test_under_torchrun_the_ranks_leave_too(tmp_path):
    process, _ = start(tmp_path, "ask", by=TORCHRUN)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert len(left(tmp_path)) == 2
    assert len(set(left(tmp_path))) == 1


def test_launch_waits_for_its_ranks_and_ends_as_it_did_before(tmp_path):
    process, _ = start(tmp_path, "launch")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert len(left(tmp_path)) == 2


def test_a_program_that_never_asks_ends_as_it_did_before(tmp_path):
    process, _ = start(tmp_path, "never")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 5
    assert left(tmp_path) == []


def test_ranks_that_do_not_leave_within_the_grace_are_killed(tmp_path):
    process, _ = start(tmp_path, "slow")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 6
    assert left(tmp_path) == []


def test_a_signal_to_one_rank_alone_is_heard_by_all_and_a_handler_of_the_users_own_is_called_too(tmp_path):
    process, pids = start(tmp_path, "chained")
    os.kill(pids[1], signal.SIGTERM)
    _, told = process.communicate(timeout=20)
    assert (process.returncode, told) == (0, "")
    assert len(left(tmp_path)) == 2
    assert len(set(left(tmp_path))) == 1
    assert [(tmp_path / f"own-{pid}").exists() for pid in pids] == [False, True]


# One process


def test_one_rank_answers_by_itself_and_handlers_are_put_back():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    own = signal.getsignal(signal.SIGUSR1)
    try:
        rt = ff.init_runtime(accelerator="cpu", stop_signals=["SIGUSR1"])
        second = ff.init_runtime(accelerator="cpu", stop_signals=["SIGUSR1"])
        assert second.stop is rt.stop
        signal.raise_signal(signal.SIGUSR1)
        assert (heard, ff.should_stop(rt)) == ([signal.SIGUSR1], False), "nobody had asked yet"
        signal.raise_signal(signal.SIGUSR1)
        assert (len(heard), ff.should_stop(rt), ff.should_stop(second)) == (2, True, True)
        ff.shutdown(second)
        assert signal.getsignal(signal.SIGUSR1) != own
        ff.shutdown(rt)
        assert signal.getsignal(signal.SIGUSR1) is own
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_calls_than_each_nth_answer_at_once():
    rt = ff.init_runtime(accelerator="cpu", stop_signals=["SIGUSR2"])
    try:
        answers = []
        for step in range(7):
            if step == 1:
                signal.raise_signal(signal.SIGUSR2)
            answers.append(ff.should_stop(rt, every=3))
        assert answers == [False, False, False, True, True, True, True]
    finally:
        ff.shutdown(rt)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_is_a_positive_whole_number(every):
    with pytest.raises(ConfigurationError, match="at least 1"):
        ff.should_stop(ff.init_runtime(accelerator="cpu", stop_signals=()), every=every)


@pytest.mark.parametrize(("names", "says"), [(["SIGFOO"], "no signal 'SIGFOO'"), (["SIGKILL"], "can handle SIGKILL")])
def test_a_signal_that_cannot_be_had_is_named(names, says):
    with pytest.raises(ConfigurationError, match=says):
        ff.init_runtime(accelerator="cpu", stop_signals=names)


def test_a_forked_process_keeps_the_old_meaning_of_the_signal():
    flag = install(["SIGUSR2"])
    assert isinstance(flag, StopFlag)
    try:
        flag.asked = True
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(signal.SIGUSR2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGUSR2
        assert not flag.wanted
    finally:
        uninstall(flag)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
