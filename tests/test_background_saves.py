"""Saves beside the training: the save of the call, bit for bit; errors are on every rank, and none is lost."""

import copy
import dataclasses
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import fabricfn as ff
from fabricfn.errors import CheckpointError, MismatchError
from fabricfn.testing import cases
from tests.support.checkpoints import bits
from tests.support.gates import Gate, ends
from tests.support.runtimes import RT
from tests.support.worlds import world_of

nothing_is_left = ends()

ranks = world_of("threads", 2)
pair = world_of("processes", 2)


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
        ff.barrier(rt)  # whoever opens the gates lets the others' saves end, too
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
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
