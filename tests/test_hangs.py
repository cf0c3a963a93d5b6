"""Ranks that disagree, leave, fail or stop answering: an error that names the rank, the call and the line, in time."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import fabricfn as ff
from fabricfn.errors import HangError, LaunchError, LeftError, MismatchError, PeerError
from fabricfn.failures import is_consequence
from tests.support.nets import prepared, square
from tests.support.starts import TWO

HERE = Path(__file__).name
PROGRAM = Path(__file__).parent / "programs" / "leaves.py"

pytestmark = pytest.mark.timeout(90)


# Calls that differ


def gradients_against_all_reduce(rt, folder):
    model, grad_fn, x = prepared(rt)
    if rt.rank == 0:
        grad_fn(model, x)
    else:
        ff.all_reduce(rt, 1)


def save_on_one_rank(rt, folder):
    model, grad_fn, x = prepared(rt)
    if rt.rank == 0:
        ff.save(rt, folder / "checkpoint", {"model": model})
    grad_fn(model, x)


def one_step_more(rt, folder):
    model, grad_fn, x = prepared(rt)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    loader = ff.setup_dataloader(rt, DataLoader(torch.ones(16, 3), batch_size=2))
    for step, batch in enumerate(ff.batches(rt, loader)):
        if (rt.rank, step) == (1, 2):
            break
        _, grads = grad_fn(model, batch)
        model, opt = ff.optimizer_step(rt, model, opt, grads)
    ff.barrier(rt, "end of epoch")


LINE = one_step_more.__code__.co_firstlineno + 9
"""Of its barrier."""


def models_in_another_order(rt, folder):
    small, grad_fn, x = prepared(rt)
    large, _, y = prepared(rt, 5)
    for model, batch in [(small, x), (large, y)][:: 1 if rt.rank == 0 else -1]:
        grad_fn(model, batch)


def one_update_less(rt, folder):
    model, grad_fn, x = prepared(rt)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    _, grads = grad_fn(model, x)
    if rt.rank == 0:
        ff.optimizer_step(rt, model, opt, grads)
    grad_fn(model, x)


def exact_value_on_one_rank(rt, folder):
    model, grad_fn, x = prepared(rt)
    if rt.rank == 1:
        ff.value(rt, lambda net, x: (net(x).sum(), len(x)), weighted=True)(model, x)
    ff.run_once(rt, dict)


@pytest.mark.parametrize(
    ("work", "calls"),
    [
        (gradients_against_all_reduce, {0: "value_and_grad", 1: "all_reduce"}),
        (save_on_one_rank, {0: "save", 1: "value_and_grad"}),
        (one_step_more, {0: "value_and_grad", 1: rf"barrier\('end of epoch'\) at .*:{LINE}$"}),
        (models_in_another_order, {0: r"value_and_grad of a model \(weight \[3, 3\]", 1: r".*weight \[5, 5\]"}),
        (one_update_less, {0: "optimizer_step", 1: "value_and_grad"}),
        (exact_value_on_one_rank, {0: "run_once", 1: "value"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_calls_that_differ_are_named_on_both_ranks(work, calls, tmp_path):
    """Before: garbage, SIGABRT, or a time-out without a word about who."""
    began = time.monotonic()
    with pytest.raises(MismatchError, match="same collective calls in the same order") as caught:
        ff.launch(work, tmp_path, **TWO)
    assert time.monotonic() - began < 20
    for rank, call in calls.items():
        assert re.search(rf"(?m)^  rank {rank}: (?=.* at .*{HERE}:\d+$){call}", str(caught.value)), caught.value


def test_trees_that_differ_are_still_an_error_on_both_ranks():
    def inside(rt):
        with pytest.raises(MismatchError, match="rank 0: float32.*rank 1: int32"):
            ff.all_reduce(rt, torch.ones(3, dtype=(torch.float32, torch.int32)[rt.rank]))
        with pytest.raises(MismatchError, match=r"barrier\('a'\)"):
            ff.barrier(rt, "ab"[rt.rank])
        return ff.all_reduce(rt, 1, "sum")

    assert ff.launch(inside, **TWO) == [2, 2]


def test_calls_for_some_ranks_only_and_calls_of_threads_are_not_counted():
    def inside(rt):
        if rt.rank == 0:
            ff.all_reduce(rt, 1, axis=(0,))
            thread = threading.Thread(target=lambda: ff.all_reduce(dataclasses.replace(rt, world=ff.World()), 1))
            thread.start()
            thread.join()
        return ff.all_reduce(rt, rt.rank, "sum")

    assert ff.launch(inside, **TWO) == [1, 1]


def test_a_call_is_never_seen_half_written():
    """Two ranks that count without waiting for each other: neither finds a difference where there is none."""

    def inside(rt):
        for _ in range(40):
            for _ in range(500):
                assert rt.world.watch.begin("step")
                rt.world.watch.end()
            ff.barrier(rt)
        return rt.world.watch.calls

    assert ff.launch(inside, **TWO) == [20_040] * 2


# Ranks that leave


def test_a_rank_that_returned_earlier_is_named():
    def inside(rt):
        model, grad_fn, x = prepared(rt)
        for _ in range(4 - rt.rank):
            grad_fn(model, x)

    with pytest.raises(LeftError, match=r"\(call 5\) for rank 1, which has left.* made 4") as caught:
        ff.launch(inside, **TWO)
    assert "could only be ended" in "".join(caught.value.__notes__)


def test_a_rank_that_left_by_an_error_of_its_own_outranks_those_that_missed_it():
    assert is_consequence(LeftError("rank 1, which has left"))
    assert not is_consequence(MismatchError("other calls"))
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one  # a circle
    assert not is_consequence(one)
    assert issubclass(LeftError, MismatchError)


@pytest.mark.parametrize("by", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")])
def test_a_script_whose_rank_leaves_says_so_and_not_that_a_connection_closed(by):
    words = [sys.executable, *by, str(PROGRAM)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environ, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.search(r"(?m)^(\[rank0\]: )?fabricfn.errors.LeftError: .*rank 1, which has left", done.stderr)
    assert "Rank 1 has made 1 collective call, the last one setup_model at" in done.stderr
    assert not re.search(r"(?m)^(\[rank0\]: )?RuntimeError", done.stderr)


def caught_by_rank_zero(rt, folder, end):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent ends the others as soon as it sees that one is gone
    model, grad_fn, x = prepared(rt)
    if rt.rank == 1:
        end()
    try:
        grad_fn(model, x)
    except PeerError as error:
        (folder / "told").write_text(f"{type(error).__name__} {is_consequence(error)} {error}")
        raise


def fall():
    raise KeyError("sample 17")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "raised", "told"),
    [
        (fall, KeyError, r"PeerError True rank 0 has waited .* for rank 1, which failed: KeyError: 'sample 17'"),
        (die, LaunchError, r"PeerError True rank 0 has waited .* for rank 1, whose process \d+ has ended"),
    ],
    ids=["raises", "is killed"],
)
def test_the_others_say_which_rank_failed_and_the_job_says_why(end, raised, told, tmp_path):
    with pytest.raises(raised):
        ff.launch(caught_by_rank_zero, tmp_path, end, **TWO)
    assert re.match(told, (tmp_path / "told").read_text())


# Ranks that stop answering

LIMIT = 1.5


def sleeping_in_the_loss(rt):
    model, _, x = prepared(rt)

    def slow(net, x):
        if rt.rank == 1:
            threading.Event().wait(60)
        return square(net, x)

    ff.value_and_grad(rt, slow)(model, x)


def locked_before_a_step(rt):
    model, grad_fn, x = prepared(rt)
    lock = threading.Lock()
    with lock:
        if rt.rank == 1:
            lock.acquire()
        grad_fn(model, x)


def missing_at_a_barrier(rt):
    if rt.rank == 1:
        signal.pause()
    ff.barrier(rt, "data is ready")


@pytest.mark.parametrize(
    ("work", "call", "where"),
    [
        (sleeping_in_the_loss, r"value_and_grad.* \(call 2\)", r"has made 2 .* stands at.*:\d+ in slow"),
        (locked_before_a_step, r"value_and_grad.* \(call 2\)", r"has made 1 .* at.*:\d+ in locked_before_a_step"),
        (missing_at_a_barrier, r"barrier\('data is ready'\)", r"made no .* yet.* at.*:\d+ in missing_at_a_barrier"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rank_that_hangs_is_named_with_the_line_where_it_stands(work, call, where):
    with pytest.raises(HangError) as caught:
        ff.launch(work, **{**TWO, "timeout": LIMIT})
    text = str(caught.value)
    waited = re.match(r"rank 1 stopped answering: rank 0 has waited ([\d.]+) s in ", text)
    assert waited, text
    assert LIMIT <= float(waited[1]) + 0.05 <= LIMIT + 1
    assert re.search(call, text), text
    assert re.search(f"Rank 1 .*{where}", text, flags=re.DOTALL), text
    assert not is_consequence(caught.value)
