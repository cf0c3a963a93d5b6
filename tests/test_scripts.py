"""Scripts that start themselves again as ranks, and torchrun that starts the same file."""

import json
import os

import pytest

from fabricfn.starting.again import command
from tests.support.starts import LOOPBACK, PROGRAMS, run

pytestmark = pytest.mark.timeout(120)


def facts(folder):
    """What the ranks of script.py told, by rank."""
    told = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*"))]
    return {fact["rank"]: fact for fact in told}


def test_a_script_runs_again_with_its_flags_and_arguments(tmp_path):
    words = ["--lr", "1", "a$$b", "${local_rank}", "two words", ""]
    done = run("script.py", "ok", *words, flags=["-O", "-X", "mine=1"], FACTS=tmp_path, ELSEWHERE=tmp_path.parent)
    assert done.returncode == 0, done.stderr
    ranks = facts(tmp_path)
    came_back = {rank for rank in ranks if "came_back" in ranks[rank]}
    assert came_back == {"0", "1"}  # no None: the process that waits for the ranks never came back
    assert set(ranks) - came_back == {0, 1}
    for fact in (ranks[0], ranks[1]):
        assert fact["argv"] == ["ok", *words]
        assert (fact["optimize"], fact["xoptions"]) == (1, "1")
        assert (fact["environment"], fact["strategy"]) == ("script", "ddp")
        assert fact["omp"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert fact["listens"]
        assert set(fact["listens"]) <= LOOPBACK
        assert not fact["parent_listens"]


def test_a_module_runs_again_and_its_first_failure_is_told_last(tmp_path):
    done = run("raise", flags=["-m", "script"], FACTS=tmp_path)
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("fabricfn: rank 1 failed first:") :]
    assert last.rstrip().endswith("ValueError: the data are gone")


def test_the_exit_status_of_a_script_passes_through(tmp_path):
    done = run("script.py", "exit", FACTS=tmp_path)
    assert done.returncode == 3
    assert "fabricfn: rank 1 exited with status 3" in done.stderr.splitlines()[-1]


def test_a_script_is_not_run_again_when_that_is_forbidden():
    done = run("script.py", "never")
    assert done.returncode == 1
    assert 'spawn="never"' in done.stderr
    assert "torchrun --nproc-per-node=2" in done.stderr


def test_the_command_that_runs_a_program_again(tmp_path):
    script = str(tmp_path / "gone.py")
    assert command(["python", "-m", "pkg.train", "x"], None) == ["-m", "pkg.train", "x"]
    assert command(["python", "-c", "pass"], None) == ["-c", "pass"]
    assert command(["python", "-u", "gone.py", "x"], script) == ["-u", script, "x"]
    assert command(["python", str(PROGRAMS / "script.py")], script) == [str(PROGRAMS / "script.py")]


def test_torchrun_starts_the_same_file(tmp_path):
    flags = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-backend=c10d"]
    done = run("script.py", "torchrun", flags=flags, FACTS=tmp_path, TMPDIR=tmp_path)
    assert done.returncode == 0, done.stderr
    ranks = facts(tmp_path)
    assert set(ranks) == {0, 1}
    for rank, fact in ranks.items():
        devices, nodes, node_rank, restarts, single = fact["errors"]
        assert f"devices=3, but torchrun says 2 processes on this node (rank {rank} of 2)" in devices
        assert "num_nodes=2, but torchrun says 1" in nodes
        assert "node_rank=1, but torchrun says 0" in node_rank
        assert "max_restarts=5, but torchrun says 0" in restarts
        assert 'strategy="ddp"' in single
