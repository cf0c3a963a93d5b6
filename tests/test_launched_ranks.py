"""ff.launch with real processes: what it returns, by every start method, over two nodes."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import fabricfn as ff
from fabricfn.errors import ConfigurationError
from fabricfn.starting.launching import start_method
from fabricfn.starting.request import Request, choice_of
from tests.support.starts import LOOPBACK, PROGRAMS, TWO, meet, own, run

pytestmark = pytest.mark.timeout(120)


def test_launch_returns_what_each_rank_returned():
    def fn(rt, factor):
        tensor = torch.tensor([float(rt.rank + 1)]) * factor
        dist.all_reduce(tensor, group=rt.world.group)
        return {"rank": rt.rank, "sum": tensor, "large": torch.full((2_000_000,), rt.rank), "text": "x" * 3_000_000}

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    environ = dict(os.environ)
    first, second = ff.launch(fn, 10, **TWO)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["sum"].item() == second["sum"].item() == 30
    assert (second["large"] == 1).all()
    assert len(second["text"]) == 3_000_000
    second["large"].add_(1)  # memory of this process
    assert second["large"].sum().item() == 4_000_000
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    changed = {name for name in {*environ, *os.environ} if environ.get(name) != os.environ.get(name)}
    assert changed <= {"PYTEST_CURRENT_TEST"}
    assert not dist.is_initialized()


def test_launch_of_one_rank_runs_here_and_inside_a_launch_it_starts_nothing():
    assert ff.launch(lambda rt: (os.getpid(), rt.world_size), accelerator="cpu") == [(os.getpid(), 1)]
    with pytest.raises(KeyError, match="own"):
        ff.launch(lambda rt: {}["own"], accelerator="cpu")

    def outer(rt):
        return os.getpid(), ff.launch(lambda inner: (os.getpid(), inner.rank), **TWO)

    for rank, (pid, inner) in enumerate(ff.launch(outer, **TWO)):
        assert inner == [(pid, rank)]


def test_a_wrong_option_of_launch_is_named():
    with pytest.raises(TypeError, match=r"'lr'.*functools.partial\(fn, lr="):
        ff.launch(meet, lr=1)
    with pytest.raises(ConfigurationError, match=r'"single"|\'single\' serves at most 1 rank'):
        ff.launch(meet, strategy="single", **TWO)


def test_forked_ranks_may_use_threads_after_this_process_did():
    """OpenMP's threads do not survive a fork: a child that waited for them would hang."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.exp(torch.randn(1_000_000)).sum()
        assert ff.launch(lambda rt: torch.exp(torch.zeros(1_000_000)).sum().item(), **TWO) == [1e6, 1e6]
    finally:
        torch.set_num_threads(threads)


def test_the_start_method():
    request = Request(accelerator="cpu", devices=2)
    assert start_method(request, choice_of(request)) == "fork"
    assert start_method(request, choice_of(request), lambda: True) == "spawn"  # CUDA is in use in this process
    forced = dataclasses.replace(request, start_method="fork")
    with pytest.raises(ConfigurationError, match="CUDA"):
        start_method(forced, choice_of(forced), lambda: True)


def test_nothing_listens_beyond_the_loopback_interface():
    sys.path.insert(0, str(PROGRAMS))
    try:
        from script import listeners
    finally:
        sys.path.remove(str(PROGRAMS))

    def fn(rt):
        meet(rt)
        found = listeners("self"), listeners(os.getppid())
        meet(rt)
        return found

    before = listeners("self")
    for mine, parents in ff.launch(fn, **TWO):
        assert mine
        assert set(mine) <= LOOPBACK
        assert sorted(parents) == sorted(before)


def test_launch_by_spawn_carries_closures_with_cloudpickle_and_says_when_it_is_missing():
    done = run("launching.py", "spawn")
    assert done.returncode == 0, done.stderr
    assert "fabricfn[closures]" in done.stdout


def test_launch_by_forkserver():
    done = run("launching.py", "forkserver")
    assert done.returncode == 0, done.stderr
    assert own(done.stdout).splitlines() == ["[[6.0, 6.0], [6.0, 6.0]]"] * 2


def test_launch_over_two_nodes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [sys.executable, "launching.py", "node", str(node), str(port)],
            cwd=PROGRAMS,
            stdout=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    assert [own(node.communicate(timeout=90)[0]) for node in nodes] == ["2 0 [3.0, 3.0]", "2 1 [3.0, 3.0]"]
    with pytest.raises(ConfigurationError, match="needs node_rank=0 .. 1"):
        ff.launch(meet, num_nodes=2, accelerator="cpu", devices=1)


def test_ranks_start_where_stderr_is_no_file(capsys):
    """As in a notebook."""
    assert ff.launch(lambda rt: rt.rank, **TWO) == [0, 1]
