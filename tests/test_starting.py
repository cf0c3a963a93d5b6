"""Starting ranks in every way there is, with real processes; and every way in which that ends."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fabricfn as ff
from fabricfn.environments import Topology, find
from fabricfn.errors import ConfigurationError, LaunchError
from fabricfn.failures import first_cause, record
from fabricfn.starting.again import command
from fabricfn.starting.agent import _Agent
from fabricfn.starting.launching import start_method
from fabricfn.starting.request import Request, choice_of

PROGRAMS = Path(__file__).parent / "programs"
TWO = {"devices": 2, "accelerator": "cpu", "timeout": 60}
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}

pytestmark = pytest.mark.timeout(120)


def run(*words, flags=(), **environ):
    """A program of tests/programs, in a process of its own; OMP_NUM_THREADS unset unless given."""
    arguments = [sys.executable, *flags, *words]
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environ = {**inherited, **{name: str(value) for name, value in environ.items()}}
    return subprocess.run(arguments, cwd=PROGRAMS, env=environ, text=True, capture_output=True, timeout=90, check=False)


def facts(folder):
    """What the ranks of script.py told, by rank."""
    told = [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*"))]
    return {fact["rank"]: fact for fact in told}


def is_running(pid):
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=10.0):
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def meet(rt):
    dist.barrier(group=rt.world.group)


# One process


def test_one_rank_needs_no_process_group():
    rt = ff.init_runtime(accelerator="cpu", precision=64, seed=7)
    assert (rt.rank, rt.world_size, rt.device, rt.seed, rt.strategy.name) == (0, 1, torch.device("cpu"), 7, "single")
    assert rt.world.group is None
    assert not dist.is_initialized()
    assert ff.init_runtime(accelerator="cpu", strategy="ddp").world.group is None
    assert ff.init_runtime(accelerator="cpu", strategy="functional").strategy.name == "functional"
    assert repr(rt) == "Runtime(rank 0 of 1 on cpu, single, float64, seed 7)"


def test_outside_a_script_several_devices_need_launch():
    assert ff.init_runtime(accelerator="cpu", devices="auto").world_size == 1
    with pytest.raises(ConfigurationError, match=r"this is a test.*ff\.launch\(fn, devices=2\)"):
        ff.init_runtime(devices=2, accelerator="cpu")


def test_runtime_ends_what_it_began_after_an_error_too():
    def inside(rt):
        ended = []
        for wrong in (False, True):
            ff.shutdown(rt)
            try:
                with ff.runtime() as inner:
                    meet(inner)
                    assert dist.is_initialized()
                    if wrong:
                        raise KeyError("body")
            except KeyError:
                pass
            ended.append(not dist.is_initialized())
            ff.shutdown(inner)  # twice
        return ended

    assert ff.launch(inside, **TWO) == [[True, True]] * 2


def test_a_group_that_the_user_made_is_joined_and_left_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with ff.runtime(accelerator="cpu") as rt:
            assert rt.environment == "process group"
        assert dist.is_initialized()
        with pytest.raises(ConfigurationError, match="devices=2, but process group says 1"):
            ff.init_runtime(devices=2, accelerator="cpu")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "dpp"}, "'ddp'"),
        ({"strategy": "no.such.module:factory"}, "cannot be imported"),
        ({"strategy": "fabricfn.tree:tree_paths_"}, "cannot be imported"),
        ({"strategy": "builtins:dict"}, "no Strategy record but a dict"),
        ({"strategy": 3}, "no Strategy record"),
        ({"precision": "8-bit"}, "32-true"),
        ({"accelerator": "abacus"}, "a cpu"),
        ({"environment": "slurn"}, "torchrun"),
        ({"environment": "torchrun"}, "not started by it"),
        ({"spawn": "sometimes"}, "script, never"),
        ({"start_method": "clone"}, "fork"),
        ({"num_nodes": 0}, "at least 1"),
        ({"max_restarts": -1}, "at least 0"),
        ({"timeout": 0}, "positive"),
    ],
)
def test_what_is_unknown_is_an_error_that_says_what_there_is(options, says):
    with pytest.raises(ConfigurationError) as caught:
        ff.init_runtime(**{"accelerator": "cpu", **options})
    assert says in str(caught.value)


def test_a_strategy_may_be_a_record_or_a_path():
    record = ff.strategies.functional()
    assert ff.init_runtime(accelerator="cpu", strategy=record).strategy is record
    path = "fabricfn.strategies.functional:functional"
    assert ff.init_runtime(accelerator="cpu", strategy=path).strategy.name == "functional"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"devices": 2}, "devices=2, but my cluster says 1 processes on this node"),
        ({"num_nodes": 3}, "num_nodes=3, but my cluster says 1"),
        ({"node_rank": 1}, "node_rank=1, but my cluster says 0"),
        ({"main_address": "a"}, "main_address='a', but my cluster says 'b'"),
        ({"main_port": 1}, "main_port=1, but my cluster says 2"),
        ({"max_restarts": 1}, "max_restarts=1, but my cluster says 3"),
    ],
)
def test_an_option_that_contradicts_the_launcher_names_both(options, says):
    mine = Topology(name="my cluster", main_address="b", main_port=2, max_restarts=3)
    assert ff.init_runtime(accelerator="cpu", environment=mine).environment == "my cluster"
    with pytest.raises(ConfigurationError) as caught:
        ff.init_runtime(accelerator="cpu", environment=mine, **options)
    assert says in str(caught.value)


def test_who_started_this_process_is_a_pure_function_of_the_environment():
    elastic = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    elastic |= {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29", "TORCHELASTIC_RUN_ID": "x"}
    topology = find(elastic)
    assert (topology.name, topology.rank, topology.node_rank, topology.num_nodes) == ("torchrun", 5, 1, 2)
    assert (topology.main_address, topology.main_port) == ("head", 29)
    ours = {
        **elastic,
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "FABRICFN_STARTED_BY": "script",
        "FABRICFN_FOLDER": "/tmp/f",
    }
    ours["TORCHELASTIC_RESTART_COUNT"] = "2"
    assert find(ours).name == "script"
    assert (find(ours).folder, find(ours).main_address) == ("/tmp/f/attempt-2", None)
    assert find({}) == Topology()
    assert find(elastic, "single") == Topology()
    for wrong in ({**elastic, "RANK": "one"}, {name: elastic[name] for name in elastic if name != "RANK"}):
        with pytest.raises(ConfigurationError, match="RANK"):
            find(wrong)


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


# launch


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
    for own, parents in ff.launch(fn, **TWO):
        assert own
        assert set(own) <= LOOPBACK
        assert sorted(parents) == sorted(before)


def own(text):
    """What a program printed itself: gloo greets on stdout in torch 2.9."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("[Gloo]"))


def test_launch_by_spawn_carries_closures_with_cloudpickle_and_says_when_it_is_missing():
    done = run("launching.py", "spawn")
    assert done.returncode == 0, done.stderr
    assert "fabricfn[closures]" in done.stdout


def test_launch_by_forkserver():
    done = run("launching.py", "forkserver")
    assert done.returncode == 0, done.stderr
    assert own(done.stdout).splitlines() == ["[[6.0, 6.0], [6.0, 6.0]]"] * 2


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
    assert wait_for(lambda: not any(map(is_running, pids)))


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


# Scripts


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


# One rank for all


def test_one_rank_prints(capsys):
    rt = ff.init_runtime(accelerator="cpu")
    ff.print(rt, "a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


def test_several_ranks_print_once(capfd):
    ff.launch(lambda rt: ff.print(rt, "from", rt.rank), **TWO)
    assert own(capfd.readouterr().out) == "from 0"


def test_ranks_start_where_stderr_is_no_file(capsys):
    """As in a notebook."""
    assert ff.launch(lambda rt: rt.rank, **TWO) == [0, 1]


def test_run_once_gives_every_rank_the_result_or_the_error():
    def fn(rt):
        result = ff.run_once(rt, lambda: {"by": rt.rank, "x": torch.arange(3)})
        errors = []
        for bad in (lambda: {}[1], lambda: lambda: None):
            try:
                ff.run_once(rt, bad)
            except (KeyError, LaunchError) as error:
                errors.append(type(error).__name__)
        return result["by"], result["x"].tolist(), errors

    assert ff.launch(fn, **TWO) == [(0, [0, 1, 2], ["KeyError", "LaunchError"])] * 2


def test_rank_zero_goes_first(tmp_path):
    def fn(rt):
        with ff.rank_zero_first(rt):
            found = (tmp_path / "cache").exists()
            (tmp_path / "cache").touch()
        try:
            with ff.rank_zero_first(rt):
                entered = True
                raise OSError("disk full")
        except OSError as error:
            entered = rt.rank == 0
            return found, entered, str(error)

    assert ff.launch(fn, **TWO) == [(False, True, "disk full"), (True, False, "disk full")]
