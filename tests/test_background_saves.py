"""Saves beside the training: the values of the call, bit for bit; the same outcome on all ranks; no error is lost."""

import contextlib
import copy
import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import fabricfn as ff
from fabricfn import errands
from fabricfn.checkpoint import meters as progress_lines
from fabricfn.checkpoint.agreement import HEAD, together
from fabricfn.checkpoint.format import manifest
from fabricfn.checkpoint.snapshots import snapshot
from fabricfn.errors import CheckpointError, MismatchError
from fabricfn.testing import cases
from tests.checkpoints import bits
from tests.worlds import world_of

RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())


ranks = world_of("threads", 2)
pair = world_of("processes", 2)


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert errands.finish_all() == []


class Gate:
    """Holds a save up: a `progress` that lets rank 0's writing pass its first bytes when the gate is open."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, done, total):
        self.reached.set()
        assert self.open.wait(60)


@pytest.fixture
def gate():
    held = Gate()
    yield held
    held.open.set()


# ---------------------------------------------------------------- the values of the call


def start(rt, problem):
    model = ff.setup_model(rt, problem.module)
    return model, ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)


def train(rt, problem, state, steps):
    model, opt = state
    grad_fn = ff.value_and_grad(rt, problem.loss_fn)
    for _ in range(steps):
        grads = grad_fn(model, *problem.batch)[1]
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
    return model, opt


def saves_while_training(rt, folder, build, gates):
    problem = build()
    model, opt = train(rt, problem, start(rt, problem), 1)
    notes, counts = ["a"], np.arange(3)
    tree = {"model": model, "opt": opt, "tied": [model], "notes": notes, "counts": counts, "key": ff.key(3)}
    ff.save(rt, folder / "blocking", tree)
    # rank 0 writes the first bytes at once, all others after the steps
    gate = gates[rt.rank]
    saving = ff.save(rt, folder / "beside", tree, blocking=False, progress=gate)
    del tree
    try:
        train(rt, problem, (model, opt), 2)
        notes.append("b")
        counts += 1
        assert not (folder / "beside").exists()
    finally:  # a rank that fails waits for its save
        for each in gates:
            each.open.set()
    receipt = saving.wait()
    assert saving.done()
    assert saving.wait() is receipt
    blocking, beside = ff.load(rt, folder / "blocking"), ff.load(rt, folder / "beside")
    assert bits(beside) == bits(blocking)
    return dataclasses.asdict(receipt)


STRATEGIES = st.sampled_from([("single", 1), ("ddp", 2), ("fsdp", 2), ("functional", 2), ("functional", 1)])


@given(cases.problems(), STRATEGIES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_save_beside_donated_steps_is_the_save_before_them(tmp_path, ranks, problem, place):
    strategy, size = place
    copies = [dataclasses.replace(problem, module=copy.deepcopy(problem.module)) for _ in range(size)]
    receipts = ranks.run(
        *(saves_while_training, tmp_path, copies.pop, [Gate() for _ in range(size)]),
        world_size=size, strategy=strategy, precision="64-true",
    )  # fmt: skip
    assert receipts[0] == receipts[-1]
    assert receipts[0]["bytes"] == sum(path.stat().st_size for path in (tmp_path / "beside").rglob("*.*"))
    shutil.rmtree(tmp_path / "beside")
    shutil.rmtree(tmp_path / "blocking")


def build_linear():
    generator = torch.Generator().manual_seed(0)
    module = cases.initialised(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), 1)
    batch = (torch.randn(8, 5, generator=generator).double(), torch.randn(8, 3, generator=generator).double())
    return cases.Problem(name="linear", module=module, loss_fn=cases.mean_square, batch=batch)


def trains_on_processes(rt, folder):
    return saves_while_training(rt, folder, build_linear, [Gate() for _ in range(rt.world_size)])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_on_processes_too(tmp_path, pair, strategy):
    receipts = pair.run(trains_on_processes, tmp_path, strategy=strategy, precision="64-true")
    assert receipts[0] == receipts[1]
    ff.verify_checkpoint(tmp_path / "beside")


DTYPES = [getattr(torch, name) for name in (*manifest.DTYPES, *manifest.RAW_DTYPES)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_copied_bit_for_bit(tmp_path, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (24 * size,), dtype=torch.uint8)
    value = data.view(dtype).reshape(4, 6)
    tree = {
        "odd": torch.zeros(3, dtype=torch.uint8), "plain": value, "t": value.t(), "cut": value[1:3, ::2],
        "scalar": value[0, 0], "none": value[:0], "tied": value, "wide": value[:1].expand(3, 6),
    }  # fmt: skip
    if dtype.is_complex and dtype is not torch.complex32:
        tree |= {"conj": value.conj(), "neg": value.conj().imag}
    ff.save(RT, tmp_path / "a", tree)
    with torch.inference_mode():
        saving = ff.save(RT, tmp_path / "b", tree, blocking=False)
    saving.wait()
    assert bits(ff.load(RT, tmp_path / "b")) == bits(ff.load(RT, tmp_path / "a"))
    assert ff.save(RT, tmp_path / "b", tree, blocking=False).wait().path.exists()  # the memory of inference mode


def test_numpy_arrays_and_empty_trees_are_copied(tmp_path, gate):
    array = np.arange(12.0).reshape(3, 4)
    tree = {"first": torch.ones(9), "t": array.T, "number": np.float32(2.5), "none": np.zeros((0, 2))}
    expected = bits({**tree, "t": array.T.copy()})
    saving = ff.save(RT, tmp_path / "c", tree, blocking=False, progress=gate)
    array += 1
    gate.open.set()
    saving.wait()
    assert bits(ff.load(RT, tmp_path / "c")) == expected
    assert ff.load(RT, ff.save(RT, tmp_path / "e", {"n": 1}, blocking=False).wait().path) == {"n": 1}


def test_the_memory_of_the_copy_is_handed_on_and_given_back(tmp_path):
    """Fresh pages cost several copies: that is what the stall of a save would be."""

    def place(size):
        return ff.save(RT, tmp_path / "c", {"w": torch.ones(size)}, blocking=False).errand.kept.data_ptr()

    first = place(1000)
    assert place(1000) == place(10) == first
    assert place(5000) != first
    ff.save(RT, tmp_path / "c", {"w": torch.ones(5)})
    assert all(errand.world != RT.world for errand in errands._errands)


def test_a_buffer_is_taken_when_it_is_large_enough():
    copies, buffer = snapshot([torch.arange(3.0), None, np.arange(2)], None)
    assert [copy.tobytes() for copy in copies] == [torch.arange(3.0).numpy().tobytes(), b"", np.arange(2).tobytes()]
    assert snapshot([torch.ones(8)], buffer)[1] is buffer
    assert snapshot([torch.ones(800)], buffer)[1] is not buffer


# ---------------------------------------------------------------- until its end


def test_until_the_end_the_old_checkpoint_is_there(tmp_path, gate):
    ff.save(RT, tmp_path / "c", {"w": torch.zeros(5)})
    saving = ff.save(RT, tmp_path / "c", {"w": torch.ones(5)}, blocking=False, progress=gate)
    assert gate.reached.wait(60)
    assert not saving.done()
    assert ff.load(RT, ff.latest(tmp_path))["w"].sum() == 0
    assert "errand" not in repr(saving)
    gate.open.set()
    assert saving.wait().path == saving.path == tmp_path / "c"
    assert ff.load(RT, tmp_path / "c")["w"].sum() == 5


@pytest.mark.parametrize("blocking", [True, False])
def test_a_second_save_waits_for_the_first(tmp_path, gate, blocking):
    first = ff.save(RT, tmp_path / "a", {"w": torch.ones(5)}, blocking=False, progress=gate)
    assert gate.reached.wait(60)
    opener = threading.Timer(0.05, gate.open.set)
    opener.start()
    second = ff.save(RT, tmp_path / "b", {"w": torch.zeros(5)}, blocking=blocking)
    assert gate.open.is_set()
    assert first.done()
    if not blocking:
        second.wait()
    assert ff.load(RT, tmp_path / "b")["w"].sum() == 0
    opener.join()


def test_ctrl_c_ends_the_waiting_and_not_the_save(tmp_path, gate):
    caught = threading.Event()

    def handle(number, frame):
        caught.set()
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGINT, handle)

    def interrupt(done, total):
        gate.reached.wait(60)
        while not caught.wait(0.2):  # Python overlooks a signal that comes right before it begins to wait for a lock
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        gate(done, total)

    saving = ff.save(RT, tmp_path / "c", {"w": torch.ones(5)}, blocking=False, progress=interrupt)

    def wait():
        gate.reached.set()
        saving.wait()

    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not saving.done()
    gate.open.set()
    saving.wait()
    ff.verify_checkpoint(tmp_path / "c")


def test_receipts_say_the_same_on_all_ranks(tmp_path, ranks):
    def saved(rt, blocking):
        receipt = ff.save(rt, tmp_path / "c", {"w": [torch.ones(500), torch.ones(300)]}, blocking=blocking)
        return receipt if blocking else receipt.wait()

    for blocking in (True, False):
        a, b = ranks.run(saved, blocking)
        assert a == b
        files = sorted((tmp_path / "c/data").iterdir())
        assert a.rank_bytes == tuple(path.stat().st_size for path in files)
        assert a.bytes == sum(a.rank_bytes) + (tmp_path / "c/manifest.json").stat().st_size
        assert 0 < a.seconds_writing < a.seconds
        assert a.seconds_stalled == a.seconds if blocking else 0 < a.seconds_stalled < a.seconds


# ---------------------------------------------------------------- errors: at once, or never lost


def test_what_cannot_be_stored_is_refused_in_the_call_on_every_rank(tmp_path, ranks):
    def refused(rt):
        with pytest.raises(CheckpointError, match="cannot be stored"):
            ff.save(rt, tmp_path / "c", {"w": object()}, blocking=False)
        with pytest.raises(MismatchError, match="do not hold the same tree"):
            ff.save(rt, tmp_path / "c", {"w": rt.rank}, blocking=False)

    ranks.run(refused)
    assert os.listdir(tmp_path) == []


def failing(rt, folder, gates=None):
    """A save whose folder is gone before it can be committed."""
    gate = Gate() if gates is None else gates[rt.rank]
    saving = ff.save(rt, folder / "gone/c", {"w": [torch.ones(500), torch.ones(300)]}, blocking=False, progress=gate)
    if rt.rank == 0:
        assert gate.reached.wait(60)
        shutil.rmtree(folder / "gone")
    gate.open.set()
    return saving


def fails_at_wait(rt, folder):
    saving = failing(rt, folder)
    messages = []
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"gone/c failed") as caught:
            saving.wait()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    ff.save(rt, folder / "after", {"w": torch.ones(3)}, blocking=False).wait()  # the error was given already
    return messages[0]


def test_a_failure_to_write_is_raised_by_wait_on_every_rank(tmp_path, ranks, pair):
    for world in (ranks, pair):
        a, b = world.run(fails_at_wait, tmp_path)
        assert "rank 0" in a
        assert a.replace("rank 0)", "rank 1)") == b
    assert os.listdir(tmp_path) == ["after"]


def full_disk(rt, folder):
    ff.save(rt, folder / "c", {"w": [torch.zeros(500_000), torch.zeros(500_000)]})
    tree = {"w": [torch.ones(500_000), torch.ones(500_000)]}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rt.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    with pytest.raises(CheckpointError, match=r"on 1 of 2 ranks.*rank 1: OSError"):
        ff.save(rt, folder / "c", tree, blocking=False).wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_disk_that_is_full_on_one_rank_fails_all_and_leaves_nothing(tmp_path, pair):
    pair.run(full_disk, tmp_path)
    assert os.listdir(tmp_path) == ["c"]
    assert sum(ff.load(RT, tmp_path / "c")["w"]).sum() == 0


def next_save_fails(rt, folder, takers):
    saving = failing(rt, folder)
    if rt.rank in takers:
        with pytest.raises(CheckpointError):
            saving.wait()
    with pytest.raises(CheckpointError, match="gone/c failed") as caught:
        ff.save(rt, folder / "next", {"w": torch.ones(3)})
    assert not (folder / "next").exists()
    ff.save(rt, folder / "next", {"w": torch.ones(3)})
    shutil.rmtree(folder / "next") if rt.rank == 0 else None
    return "".join(getattr(caught.value, "__notes__", []))


def test_an_error_that_nobody_took_is_raised_by_the_next_save_on_every_rank(tmp_path, ranks):
    assert "next was not begun" in ranks.run(next_save_fails, tmp_path, (), world_size=1)[0]
    for takers in ((), (0,), (1,)):
        notes = ranks.run(next_save_fails, tmp_path, takers)
        assert [bool(note) for note in notes] == [rank not in takers for rank in range(2)] or takers
    assert os.listdir(tmp_path) == []


def test_else_shutdown_raises_it_after_everything_is_ended(tmp_path):
    def body(error):
        with ff.runtime(accelerator="cpu", devices=1) as rt:
            failing(rt, tmp_path)
            if error:
                raise ZeroDivisionError

    with pytest.raises(CheckpointError, match="gone/c failed"):
        body(error=False)
    with pytest.raises(ZeroDivisionError) as caught:
        body(error=True)
    assert "gone/c failed" in caught.value.__notes__[0]
    rt = ff.init_runtime(accelerator="cpu", devices=1)
    with pytest.raises(CheckpointError):
        failing(rt, tmp_path).wait()
    ff.shutdown(rt)


def test_a_world_of_ranks_waits_at_the_end_of_a_run(tmp_path, ranks, pair):
    for world in (ranks, pair):
        with pytest.raises(CheckpointError, match="gone/c failed"):
            world.run(lambda rt: failing(rt, tmp_path) and None)
        world.run(lambda rt: ff.save(rt, tmp_path / "c", {"w": torch.ones(9)}, blocking=False) and None)
        ff.verify_checkpoint(tmp_path / "c")


def test_what_progress_raises_fails_the_save(tmp_path):
    def wrong(done, total):
        raise ZeroDivisionError

    saving = ff.save(RT, tmp_path / "c", {"w": torch.ones(5)}, blocking=False, progress=wrong)
    with pytest.raises(ZeroDivisionError):
        saving.wait()
    assert os.listdir(tmp_path) == []


def no_memory(rt, folder):
    tree = {"w": [torch.ones(50), torch.ones(30)], "huge": torch.zeros(1).expand(1 << 44)}
    with pytest.raises(CheckpointError, match=r"rank 0.*memory"):
        ff.save(rt, folder / "c", tree, blocking=False).wait()


def test_a_copy_that_finds_no_memory_on_one_rank_fails_all(tmp_path, ranks):
    ranks.run(no_memory, tmp_path)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- processes that end


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def program(text, *args):
    """A Python program, begun."""
    text = "import os, sys, threading, torch, fabricfn as ff\n" + text
    environment = {"GLOO_SOCKET_IFNAME": LOOPBACK, **os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", text, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ran(text, *args):
    """(status, what was written) of a program."""
    with program(text, *args) as process:
        said = process.communicate(timeout=100)[0]
    return process.returncode, said


LEAVING = """
import atexit
atexit.register(print, "other exit functions run")
folder, how = sys.argv[1:]
rt = ff.init_runtime(accelerator="cpu", devices=1)
leaving = threading.Event()

def late(done, total):
    leaving.wait()  # all but the first bytes are written when Python has begun to end
    if how == "fails":
        raise OSError("the disk is full")

tree = {"w": [torch.full((400_000,), 2.0) for _ in range(3)]}
ff.save(rt, folder + "/c", tree, blocking=False, progress=late)
threading._register_atexit(leaving.set)
if how == "raises":
    raise ZeroDivisionError
if how == "exits":
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "status"), [("raises", 1), ("exits", 3), ("fails", 1)])
def test_leaving_python_waits_for_the_save(tmp_path, how, status):
    code, said = ran(LEAVING, tmp_path, how)
    assert code == status, said
    assert "other exit functions run" in said
    assert ("the disk is full" in said) == (how == "fails"), said
    assert ("ZeroDivisionError" in said) == (how == "raises"), said
    if how == "fails":
        assert os.listdir(tmp_path) == []
    else:
        assert ff.load(RT, tmp_path / "c")["w"][2].sum() == 800_000
        ff.verify_checkpoint(tmp_path / "c")


AT_ONCE = """
def work(rt, folder, how):
    tree = {"w": [torch.full((400_000,), 2.0) for _ in range(3)]}
    ff.save(rt, folder + "/c", tree, blocking=False)
    if how == "raises":
        raise ZeroDivisionError

if __name__ == "__main__":
    if sys.argv[2] == "ends":
        work(ff.init_runtime(accelerator="cpu", devices=2), *sys.argv[1:])
    else:
        ff.launch(work, *sys.argv[1:], accelerator="cpu", devices=2)
"""


@pytest.mark.parametrize("how", ["ends", "returns", "raises"])
def test_ranks_that_end_at_once_save_to_the_end_and_those_that_fail_all_or_nothing(tmp_path, how):
    (tmp_path / "train.py").write_text("import sys, torch, fabricfn as ff\n" + AT_ONCE)
    process = subprocess.run([sys.executable, tmp_path / "train.py", tmp_path, how], check=False, capture_output=True,
                             text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert (process.returncode == 0) == (how != "raises"), process.stderr
    if how != "raises" or (tmp_path / "c").exists():  # ranks of a job that failed are ended within seconds
        assert sum(ff.load(RT, tmp_path / "c")["w"]).sum() == 2_400_000


FORKING = """
folder = sys.argv[1]
rt = ff.init_runtime(accelerator="cpu", devices=1)
reached, forked = threading.Event(), threading.Event()

def hold(done, total):
    reached.set()
    forked.wait()

saving = ff.save(rt, folder + "/c", {"w": torch.ones(2_000_000), "v": torch.ones(9)}, blocking=False, progress=hold)
reached.wait()
child = os.fork()
if child == 0:
    try:
        saving.wait()
    except ff.FabricfnError as error:
        print(error)
    ff.save(rt, folder + "/child", {"w": torch.zeros(5)}, blocking=False)
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
forked.set()
"""


def test_a_forked_child_has_nothing_to_wait_for_and_can_save(tmp_path):
    code, said = ran(FORKING, tmp_path)
    assert code == 0, said
    assert "goes on in the process that began it" in said
    assert said.splitlines()[-1] == "7"
    for name in ("c", "child"):
        ff.verify_checkpoint(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["c", "child"]


def test_data_workers_are_forked_beside_a_save(tmp_path, gate):
    saving = ff.save(RT, tmp_path / "c", {"w": torch.ones(50)}, blocking=False, progress=gate)
    assert gate.reached.wait(60)
    loader = torch.utils.data.DataLoader(list(range(8)), num_workers=1, multiprocessing_context="fork")
    assert sum(int(batch) for batch in loader) == 28
    gate.open.set()
    saving.wait()


DYING = """
import datetime, signal, torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
world = ff.World(rank=rank, world_size=2, local_rank=rank, local_world_size=2, group=dist.group.WORLD)
rt = ff.Runtime(world=world, precision=ff.Precision(), strategy=ff.strategies.ddp())
w = [torch.full((500_000,), 1.0) for _ in range(2)]
ff.save(rt, folder + "/c", {"w": w}, blocking=False).wait()
gone = threading.Event()
ff.barrier(rt)
saving = ff.save(rt, folder + "/c", {"w": [2 * t for t in w]}, blocking=False, progress=lambda done, total: gone.wait())
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    rt.world.group.barrier().wait()
except RuntimeError:
    gone.set()  # the other rank is dead
try:
    saving.wait()
except ff.CheckpointError as error:
    print("told:", error)
os._exit(0)
"""


def test_a_rank_that_dies_is_an_error_on_the_other_and_the_old_checkpoint_stands(tmp_path):
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(program(DYING, rank, tmp_path)) for rank in range(2)]
        said = both[0].communicate(timeout=100)[0]
    assert [each.returncode for each in both] == [0, -signal.SIGKILL], said
    assert "told: ff.save to" in said
    assert "the ranks lost each other (this is rank 0)" in said
    assert ff.load(RT, tmp_path / "c")["w"][1].sum() == 500_000


# ---------------------------------------------------------------- progress


def watched(rt, folder, seen):
    tree = {"w": [torch.ones(1_500_000), torch.ones(700_000), torch.zeros(0)]}
    saved, loaded = [], []
    receipt = ff.save(rt, folder / "c", tree, progress=lambda *at: saved.append(at))
    assert ff.save(rt, folder / "c", tree, blocking=False, progress=lambda *at: seen.append(at)).wait()
    ff.load(rt, folder / "c", tree, progress=lambda *at: loaded.append(at))
    return receipt, saved, loaded


@pytest.mark.parametrize("size", [1, 2])
def test_rank_0_is_told_how_far_its_part_is(tmp_path, ranks, size):
    seen = []
    results = ranks.run(watched, tmp_path, seen, world_size=size)
    receipt, saved, loaded = results[0]
    own = 6_000_000 if size == 2 else 8_800_000
    assert saved[-1] == seen[-1] == (own, own)
    assert loaded[-1] == (8_800_000, 8_800_000)
    for calls in (saved, seen, loaded):
        assert calls == sorted(set(calls))
    assert saved[0] == (manifest.BLOCK, own)  # a large array is told of by blocks
    assert receipt.rank_bytes[0] > own
    assert [result[1:] for result in results[1:]] == [([], [])] * (size - 1)


def test_lines_are_printed_when_it_takes_long(tmp_path, capfd, monkeypatch):
    tree = {"w": torch.ones(3_000_000)}
    ff.save(RT, tmp_path / "c", tree, progress=True)
    ff.load(RT, tmp_path / "c", progress=True)
    ff.save(RT, tmp_path / "c", tree, progress=False)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress_lines, "PATIENCE", 0.0)
    ff.save(RT, tmp_path / "c", tree, progress=True)
    ff.load(RT, tmp_path / "c", progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4
    assert f"ff.save to {tmp_path}/c: 0.01 of 0.01 GB in 0 s, about 0 s left" in lines
    assert lines[-1].startswith("ff.load of")


def test_calls_come_at_most_ten_times_a_second(monkeypatch):
    now = iter(0.03 * n for n in range(100))
    monkeypatch.setattr(progress_lines.time, "perf_counter", lambda: next(now))
    calls = []
    tell = progress_lines.meter(lambda *at: calls.append(at), "x", 20)
    for _ in range(20):
        tell(1)
    assert calls == [(1, 20), (5, 20), (9, 20), (13, 20), (17, 20), (20, 20)]


# ---------------------------------------------------------------- what travels between the ranks


@given(st.lists(st.integers(0, 3 * HEAD), min_size=2, max_size=2))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_messages_of_any_length_arrive(ranks, lengths):
    def exchange(rt):
        data = {"é\udc80": ["x" * lengths[rt.rank], rt.rank, None, 2.5]}
        plain = together(rt.world, "here", lambda: (rt.rank, data))
        objects = together(rt.world, "here", lambda: (rt.rank, (1j, data)), objects=True)[1]
        assert [value for _, value in objects] == plain[1]
        return plain

    results = ranks.run(exchange)
    assert [mine for mine, _ in results] == [0, 1]
    expected = [{"é\udc80": ["x" * lengths[rank], rank, None, 2.5]} for rank in range(2)]
    assert [data for _, data in results] == [expected] * 2


def test_a_failure_meets_every_rank_whatever_it_is(ranks):
    def one_fails(rt, work):
        with pytest.raises(CheckpointError, match=r"here failed on 1 of 2 ranks.*rank 1: "):
            together(rt.world, "here", lambda: (None, work() if rt.rank else 1))

    ranks.run(one_fails, lambda: 1 / 0)
    ranks.run(one_fails, set)  # what JSON does not know
