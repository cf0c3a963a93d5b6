"""Worlds of ranks for tests: threads and processes behave alike; failures are named and leave a world that works."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fabricfn as ff
from fabricfn import testing
from tests.support.worlds import world_of


class OwnError(Exception):
    pass


@pytest.fixture(scope="module", params=["threads", "processes"])
def ranks(request):
    with testing.world(request.param, 3) as world:
        yield world


threads = world_of("threads", 4)


def total(rt, offset=1):
    tensor = torch.full((2,), float(rt.rank + offset))
    if rt.world.group is not None:
        dist.all_reduce(tensor, group=rt.world.group)
    return tensor.tolist()


def sees_itself(rt):
    if rt.world_size > 1:
        assert (dist.get_rank(), dist.get_world_size()) == (rt.rank, rt.world_size)
    return rt.rank, rt.world_size, rt.local_rank, rt.strategy.name, str(rt.precision.param_dtype), rt.seed


def test_every_rank_has_a_runtime_and_a_group(ranks):
    assert ranks.run(total) == [[6.0, 6.0]] * 3
    assert ranks.run(total, 10, world_size=2) == [[21.0, 21.0]] * 2
    assert ranks.run(total, world_size=1) == [[1.0, 1.0]]
    assert ranks.run(sees_itself, precision=64, seed=5)[2] == (2, 3, 2, "ddp", "torch.float64", 5)
    assert ranks.run(sees_itself, world_size=1)[0][3] == "single"
    assert ranks.run(sees_itself, strategy="functional")[1][3] == "functional"
    assert ranks.run(sees_itself, strategy=ff.strategies.ddp(bucket_cap_mb=1))[1][3] == "ddp"
    assert not dist.is_initialized()


def all_collectives(rt):
    group, rank, size = rt.world.group, rt.rank, rt.world_size
    own, every = torch.tensor([float(rank)]), [float(r) for r in range(size)]

    def filled(collective, *args, **kwargs):
        out = [torch.zeros(1) for _ in range(size)]
        collective(out, *args, group=group, **kwargs)
        return torch.cat(out).tolist()

    assert filled(dist.all_gather, own) == every
    if not (dist.get_backend(group) == "gloo" and torch.__version__ < "2.10"):  # gloo learnt it later
        assert filled(dist.all_to_all, [own * 10 + r for r in range(size)]) == [r * 10.0 + rank for r in range(size)]
    gathered = [torch.zeros(1) for _ in range(size)]
    dist.gather(own, gathered if rank == 1 else None, dst=1, group=group)
    assert torch.cat(gathered).tolist() == (every if rank == 1 else [0.0] * size)
    out = torch.zeros(1)
    dist.scatter(out, [own + r for r in range(size)] if rank == 1 else None, src=1, group=group)
    assert out.item() == 1 + rank
    dist.reduce_scatter(out, [own + r for r in range(size)], group=group)
    assert out.item() == sum(every) + size * rank
    for op, expected in ((dist.ReduceOp.MAX, size), (dist.ReduceOp.MIN, 1), (dist.ReduceOp.PRODUCT, 6)):
        value = own + 1
        dist.all_reduce(value, op, group=group)
        assert value.item() == expected
    value = own.clone()
    dist.broadcast(value, src=2, group=group)
    assert value.item() == 2
    value = own.clone()
    dist.reduce(value, dst=0, group=group)
    assert rank != 0 or value.item() == sum(every)
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    assert objects == [{"rank": r} for r in range(size)]
    work = dist.all_reduce(value := own.clone(), group=group, async_op=True)
    work.wait()
    assert value.item() == sum(every)
    dist.barrier(group=group)
    incoming = torch.zeros(2)
    receiving = dist.irecv(incoming, src=(rank - 1) % size, group=group)
    dist.isend(torch.full((2,), own.item()), dst=(rank + 1) % size, group=group).wait()
    receiving.wait()
    assert incoming.tolist() == [float((rank - 1) % size)] * 2
    pair = dist.new_group([0, 2])
    if rank != 1:
        value = own.clone()
        dist.all_reduce(value, group=pair)
        assert value.item() == 2


def test_all_collectives_work_in_both_worlds(ranks):
    for _ in range(2):  # groups that a run makes are gone with it
        ranks.run(all_collectives)


def test_a_collective_touches_no_version_counter(ranks):
    def versions(rt):
        tensor = torch.ones(2)
        dist.all_reduce(tensor, group=rt.world.group)
        dist.broadcast(tensor, src=0, group=rt.world.group)
        return tensor._version

    assert ranks.run(versions) == [0, 0, 0]


def fails_on_rank_1(rt, where):
    net = DistributedDataParallel(nn.Linear(2, 1), process_group=rt.world.group)
    loss = net(torch.ones(3, 2)).sum()
    if rt.rank == 1 and where == "forward":
        raise OwnError("boom")
    if rt.rank == 1:
        loss.register_hook(lambda grad: 1 / 0)
    loss.backward()


@pytest.mark.parametrize(("where", "error"), [("forward", OwnError), ("backward", ZeroDivisionError)])
def test_an_exception_names_its_rank_and_leaves_a_world_that_works(ranks, where, error):
    with pytest.raises(error) as caught:
        ranks.run(fails_on_rank_1, where)
    assert "rank 1 of 3" in caught.value.__notes__[0]
    assert ranks.run(total) == [[6.0, 6.0]] * 3


def test_system_exit_of_a_rank_does_not_end_the_pool(ranks):
    def leave(rt):
        if rt.rank == 2:
            sys.exit(3)
        dist.barrier(group=rt.world.group)

    with pytest.raises(SystemExit):
        ranks.run(leave)
    assert ranks.run(total) == [[6.0, 6.0]] * 3


def hangs_on_rank_1(rt, hang_here):
    if rt.rank == 1:
        hang_here()
    dist.barrier(group=rt.world.group)


def test_a_hung_process_is_named_with_its_place():
    with testing.processes(2) as world:
        with pytest.raises(ff.errors.LaunchError, match=r"^rank 1 of 2 did not return(.|\n)*hang_here") as caught:
            world.run(hangs_on_rank_1, lambda: threading.Event().wait(), timeout=2)
        assert "barrier" not in str(caught.value)
        assert world.run(total) == [[3.0, 3.0]] * 2


def test_a_hung_thread_is_named_with_its_place():
    release = threading.Event()
    with testing.threads(2) as world:
        with pytest.raises(ff.errors.LaunchError, match=r"^rank 1 of 2 did not return(.|\n)*hang_here") as caught:
            world.run(hangs_on_rank_1, release.wait, timeout=0.5)
        assert "barrier" not in str(caught.value)
        with pytest.raises(ff.errors.LaunchError, match="never returned"):
            world.run(total)
    release.set()


def test_what_cannot_be_asked_for_is_refused(ranks):
    for options in ({"world_size": 4}, {"world_size": 0}, {"strategy": "single"}, {"strategy": "dpp"}):
        with pytest.raises(ff.errors.ConfigurationError):
            ranks.run(total, **options)
    with pytest.raises(ff.errors.ConfigurationError, match="threads, processes"):
        testing.run(total, kind="greenlets")


def test_run_opens_a_world_for_one_call():
    assert testing.run(total, world_size=2) == [[3.0, 3.0]] * 2
    before = set(threading.enumerate())
    testing.run(total, world_size=4)
    assert set(threading.enumerate()) <= before


# What only threads do


def test_calls_that_can_never_end_are_errors_at_once(threads):
    def other_shapes(rt):
        dist.all_reduce(torch.ones(rt.rank + 1), group=rt.world.group)

    def other_calls(rt):
        (dist.barrier if rt.rank else total)(rt.world.group if rt.rank else rt)

    def returns_early(rt):
        if rt.rank:
            dist.barrier(group=rt.world.group)

    def crossed(rt):
        groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
        dist.barrier(group=groups[rt.rank])

    for fn, match in (
        (other_shapes, r"rank 0: all_reduce sum float32\[1\], rank 1: all_reduce sum float32\[2\]"),
        (other_calls, r"rank 0: all_reduce.*rank 1: barrier"),
        (returns_early, "rank 0 has returned, rank 1 waits in barrier"),
        (crossed, "rank 0 waits in barrier, rank 1 waits in barrier"),
    ):
        with pytest.raises(ff.errors.MismatchError, match=match):
            threads.run(fn, world_size=2)
    assert threads.run(total) == [[10.0, 10.0]] * 4


def test_no_handler_of_the_users_keeps_a_released_rank_alive(threads):
    def stubborn(rt):
        if rt.rank == 0:
            raise OwnError
        while True:
            try:
                dist.barrier(group=rt.world.group)
            except Exception:
                continue

    with pytest.raises(OwnError):
        threads.run(stubborn)


def test_an_open_world_leaves_the_surrounding_process_alone(tmp_path, threads):
    code = f"""if True:
        import torch, torch.distributed as dist
        from fabricfn import testing
        dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
        with testing.threads(2) as ranks:
            assert ranks.run(lambda rt: dist.get_world_size()) == [2, 2]
            assert dist.get_world_size() == 1
            dist.all_reduce(torch.ones(1))
        assert dist.get_world_size() == 1 and type(dist.distributed_c10d._world).__name__ == "_World"
        dist.destroy_process_group()
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_world_inside_a_world(threads):
    def inner(rt):
        return testing.run(total, world_size=2), total(rt)

    assert threads.run(inner, world_size=2) == [([[3.0, 3.0]] * 2, [3.0, 3.0])] * 2
    with pytest.raises(ff.errors.LaunchError, match="inside"):
        threads.run(lambda rt: threads.run(total))


# What only processes do


def test_random_numbers_belong_to_a_rank_and_start_from_the_seed():
    def draws(rt):
        if rt.rank == 0:
            torch.rand(3)
        return torch.rand(()).item()

    with testing.processes(2) as world:
        first, again, other = world.run(draws), world.run(draws), world.run(draws, seed=1)
    assert first == again
    assert first[0] != first[1]
    assert other != first


def test_a_rank_that_dies_is_named_and_no_process_is_left(tmp_path):
    def note(rt):
        (tmp_path / str(os.getpid())).touch()
        return total(rt)

    def die(rt):
        if rt.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier(group=rt.world.group)

    with testing.processes(2) as world:
        assert world.run(note) == [[3.0, 3.0]] * 2
        with pytest.raises(ff.errors.LaunchError, match="rank 1 of 2 died"):
            world.run(die)
        assert world.run(note) == [[3.0, 3.0]] * 2
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 4
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_end_with_their_owner(tmp_path):
    """A named pipe says so without waiting for a clock: it ends when the last process that holds its other end has."""
    code = f"""if True:
        import os, signal, sys, threading
        from fabricfn import testing
        def work(rt, owner):
            os.open({str(tmp_path / "pipe")!r}, os.O_WRONLY)
            if rt.rank == 1:
                os.kill(owner, signal.SIGKILL)
            threading.Event().wait()
        with testing.processes(2) as world:
            world.run(work, os.getpid())
    """
    os.mkfifo(tmp_path / "pipe")
    owner = subprocess.Popen([sys.executable, "-c", code])
    with open(tmp_path / "pipe") as pipe:
        assert pipe.read() == ""
    assert owner.wait() == -signal.SIGKILL
