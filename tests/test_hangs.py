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
import torch.distributed as dist
from torch.utils.data import DataLoader

import fabricfn as ff
from fabricfn.errors import HangError, LaunchError, LeftError, MismatchError, PeerError
from fabricfn.failures import is_consequence

TWO = {"devices": 2, "accelerator": "cpu", "timeout": 60}
HERE = Path(__file__).name
PROGRAM = Path(__file__).parent / "programs" / "leaves.py"

pytestmark = pytest.mark.timeout(90)


def square(net, x):
    return net(x).square().mean()


def prepared(rt, size=3):
    torch.manual_seed(0)
    return ff.setup_model(rt, torch.nn.Linear(size, size)), ff.value_and_grad(rt, square), torch.ones(2, size)


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


# debug=True


def collectives_of_torch(rt):
    told = []

    def attempt(*calls):
        try:
            calls[rt.rank]()
            told.append("no error")
        except MismatchError as error:
            told.append(str(error))

    ones, most = torch.ones(4), dist.ReduceOp.MAX
    attempt(lambda: dist.all_reduce(ones), lambda: dist.all_reduce(torch.ones(4, dtype=torch.int32)))
    attempt(lambda: dist.all_reduce(ones), lambda: dist.all_reduce(torch.ones(6)))
    attempt(lambda: dist.all_reduce(torch.ones(2, 3)), lambda: dist.all_reduce(torch.ones(3, 2)))
    attempt(lambda: dist.all_reduce(ones), lambda: dist.all_reduce(ones, most))
    attempt(lambda: dist.all_reduce(ones), lambda: dist.broadcast(ones, 0))
    attempt(lambda: dist.broadcast(ones, 1), lambda: dist.broadcast(ones, 0))
    a, b = torch.ones(4), torch.ones(4)
    if rt.rank == 0:
        attempt(*[lambda: dist.all_reduce(a)] * 2)
    else:
        attempt(*[lambda: dist.all_reduce(b)] * 2)
    gathered = [torch.empty(4) for _ in range(2)]
    dist.all_gather(gathered, ones)
    return told, ff.all_reduce(rt, 1, "sum")


def test_under_debug_every_collective_of_torch_is_compared():
    """Seven of seven; without it four of them give garbage, in silence (docs/failures.md)."""
    for rank, (told, total) in enumerate(ff.launch(collectives_of_torch, debug=True, **TWO)):
        assert total == 2, "the group is whole afterwards"
        kinds = [
            *(r"allreduce\(float32\[4\], SUM\).*allreduce\(int32\[4\], SUM\)", r"float32\[4\].*float32\[6\]"),
            *(r"float32\[2, 3\].*float32\[3, 2\]", "SUM.*MAX", r"allreduce.*broadcast", "root 1.*root 0"),
            rf"{HERE}:\d+.*{HERE}:\d+",
        ]
        assert len(told) == len(kinds)
        for text, kind in zip(told, kinds, strict=True):
            assert re.search(rf"seen on rank {rank}\)\n  rank 0: .*{kind}", text, flags=re.DOTALL), text


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_under_debug_a_step_gives_the_same_bits(strategy):
    def inside(rt):
        model, grad_fn, x = prepared(rt)
        loss, grads = grad_fn(model, x * (rt.rank + 1))
        return {name: ff.gather_params(rt, model)[name] for name in grads.params}, loss, ff.all_gather(rt, loss)

    plain, checked = (ff.launch(inside, strategy=strategy, debug=debug, **TWO) for debug in (False, True))
    for one, other in zip(plain, checked, strict=True):
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def test_under_debug_replicas_that_drifted_apart_are_found():
    def inside(rt):
        model, grad_fn, x = prepared(rt)
        grad_fn(ff.tree_map(lambda leaf: leaf + rt.rank, model), x)

    with pytest.raises(MismatchError, match=r"(?s)2 of 2 leaves differ.*bias: rank 0 against rank 1") as caught:
        ff.launch(inside, debug=True, **TWO)
    assert "ff.broadcast" in str(caught.value)


# Replicas


def test_check_replicas_names_leaves_and_ranks():
    def inside(rt):
        model = ff.setup_model(rt, torch.nn.BatchNorm1d(2))
        tree = {"model": model, "epoch": 3, "name": "run", "none": torch.ones(0)}
        ff.check_replicas(rt, tree)
        wrong = {**tree, "epoch": 3 + (rt.rank == 1), "x": torch.tensor([1.0, 2.0 + (rt.rank == 2)])}
        with pytest.raises(MismatchError) as caught:
            ff.check_replicas(rt, wrong)
        return str(caught.value)

    for rank, text in enumerate(ff.testing.run(inside, world_size=3)):
        assert f"2 of 9 leaves differ (seen on rank {rank})" in text or "leaves differ" in text
        assert re.search(r"epoch: ranks 0, 2 against rank 1\n", text), text
        assert re.search(r"x: ranks 0, 1 against rank 2\n", text), text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
def test_every_single_flipped_bit_is_found(dtype):
    def inside(rt):
        values = torch.ones(5, dtype=dtype)
        found = 0
        for bit in range(8 * values.nbytes):
            copy = values.clone()
            if rt.rank == 1:
                copy.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            try:
                ff.check_replicas(rt, [copy])
            except MismatchError:
                found += 1
        return found == 8 * values.nbytes

    assert ff.testing.run(inside, world_size=2) == [True, True]


# What one rank does for all


def on_two_nodes(rt):
    """The runtime as if every second rank were on another machine, as far as such calls can tell."""
    place = {"node_rank": rt.rank // 2, "local_rank": rt.rank % 2, "num_nodes": 2, "local_world_size": 2}
    return dataclasses.replace(rt, world=dataclasses.replace(rt.world, **place))


def test_once_and_first_on_every_machine(tmp_path):
    def inside(rt):
        rt, ran = on_two_nodes(rt), []
        value = ff.run_once(rt, lambda: ran.append(1) or f"from {rt.rank}", per_node=True)
        with ff.rank_zero_first(rt, per_node=True):
            cache = tmp_path / str(rt.node_rank)
            first = not cache.exists()
            cache.touch()
        with pytest.raises(KeyError, match="disk"):
            ff.run_once(rt, lambda: {}["disk"] if rt.rank == 2 else None, per_node=True)
        return value, len(ran), first

    told = ff.testing.run(inside, world_size=4)
    assert told == [("from 0", 1, True), ("from 0", 0, False), ("from 2", 1, True), ("from 2", 0, False)]


def test_whether_a_file_system_is_shared(tmp_path):
    def inside(rt):
        own = tmp_path / str(rt.rank)
        own.mkdir()
        os.chdir(own)
        shared = ff.is_shared_filesystem(rt, tmp_path / "not" / "there")
        apart = ff.is_shared_filesystem(rt, "/proc/self/cwd")  # the same name, another folder in each process
        return shared, apart, [file.name for file in tmp_path.rglob(".*")]

    assert ff.launch(inside, **TWO) == [(True, False, [])] * 2


def test_importing_needs_no_launcher_and_starts_nothing():
    code = (
        "import fabricfn as ff\n"
        "for name in ff.__all__: getattr(ff, name)\n"
        "import threading, torch.distributed as dist\n"
        "assert not dist.is_initialized() and threading.active_count() == 1\n"
    )
    environ = {**os.environ, "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere.invalid"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environ)
