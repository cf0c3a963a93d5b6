"""Sharded checkpoints of real processes: what threads wrote, and the memory and the bytes that a rank needs."""

import contextlib
import itertools
import resource
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fabricfn as ff
from fabricfn.errors import CheckpointError
from tests.support.layouts import Layout, filled, load_as, load_plain, save_as
from tests.support.runtimes import RT
from tests.support.worlds import world_of

ranks = world_of("threads", 4)
pair = world_of("processes", 2)


# ---------------------------------------------------------------- every pair

TWO = [Layout(2), *(Layout(2, (2,), (placement,)) for placement in (Shard(0), Shard(1), Replicate()))]


def every_pair(rt, path, value):
    for saver, loader in itertools.product(TWO, TWO):
        save_as(rt, path, saver, value)
        load_as(rt, path, loader, value)
    save_as(rt, path, TWO[1], value)


def test_real_processes_and_other_worlds(tmp_path, ranks, pair):
    value = filled(torch.float32, (5, 3))
    pair.run(every_pair, tmp_path / "c", value)
    load_plain(RT, tmp_path / "c", value)
    ranks.run(load_as, tmp_path / "c", Layout(4, (2, 2), (Shard(1), Shard(0))), value)
    ranks.run(save_as, tmp_path / "c", Layout(3, (3,), (Shard(0),)), value, world_size=3)
    pair.run(load_as, tmp_path / "c", TWO[2], value)


# ---------------------------------------------------------------- bytes, memory


def status(field):
    """Bytes of memory: VmRSS is what this process has, VmHWM the most that it had."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def cost(work, *args, **options):
    """(the most memory that `work` took on top of what there was, the bytes that it read), in MiB."""

    def read():
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the high water mark begins anew
    before, begun = status("VmRSS"), read()
    result = work(*args, **options)
    return (status("VmHWM") - before) / MIB, (read() - begun) / MIB, result


MIB = 1 << 20
SHARD = 128
"""MiB of one rank."""
BUFFER = 48
"""MiB that saving and loading may take besides: four readers with two blocks each, and some room."""


def costs(rt, path):
    """A tensor of which each of two ranks has 128 MiB: what save takes, and load into templates of three kinds."""
    mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
    side, width = 8192, 8186  # almost 256 MiB; blocks end within rows

    def rows(value):
        return DTensor.from_local(torch.full((side // 2, width), value), mesh, [Shard(0)])

    tree = {"w": rows(float(rt.rank))}
    found = {"save": cost(ff.save, rt, path, tree)[:2]}
    del tree
    like = {"w": rows(7.0)}
    *found["load"], loaded = cost(ff.load, rt, path, like)
    assert (loaded["w"].to_local() == rt.rank).all()
    del loaded
    *found["donate"], loaded = cost(ff.load, rt, path, like, donate=True)
    assert (loaded["w"].to_local() == rt.rank).all()
    del loaded, like
    columns = {"w": DTensor.from_local(torch.full((side, width // 2), 7.0), mesh, [Shard(1)])}
    *found["columns"], loaded = cost(ff.load, rt, path, columns, donate=True)
    assert loaded["w"].to_local()[:, 0].tolist() == [0.0] * (side // 2) + [1.0] * (side // 2)
    return found


def resumed(rt, path):
    """The bytes that a fresh optimizer reads, whose momentum appears with the first step; and two runs to compare."""
    module = nn.Linear(1 << 11, 1 << 10, bias=False)
    nn.init.constant_(module.weight, 0.5)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())
    x = torch.linspace(-1, 1, 1 << 11)[None]

    def fresh():
        model = ff.setup_model(rt, module)
        return model, ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True)

    def step(model, opt):
        _, grads = grad_fn(model, x)
        return ff.optimizer_step(rt, model, opt, grads)

    model, opt = step(*fresh())
    ff.save(rt, path, {"model": model, "opt": opt})
    like = dict(zip(("model", "opt"), fresh(), strict=True))
    assert like["opt"].state == {"weight": {}}
    found = []
    for donate in (False, True):
        _, read, loaded = cost(ff.load, rt, path, like, donate=donate)
        found.append(read)
        momentum = loaded["opt"].state["weight"]["momentum_buffer"]
        assert isinstance(momentum, DTensor)
        assert torch.equal(momentum.to_local(), opt.state["weight"]["momentum_buffer"].to_local())
        for ours, theirs in zip(step(model, opt)[0].params.values(), step(**loaded)[0].params.values(), strict=True):
            assert torch.equal(ours.to_local(), theirs.to_local())
    return found


def test_state_that_a_fresh_optimizer_has_not_yet_is_read_by_parts(tmp_path, pair):
    for read in pair.run(resumed, tmp_path / "c", strategy=ff.strategies.fsdp()):
        assert all(8 <= mib < 8.5 for mib in read)  # half of 8 MiB of weights and 8 MiB of momentum


def test_a_rank_needs_the_memory_and_the_bytes_of_its_own_part(tmp_path, pair):
    for found in pair.run(costs, tmp_path / "c"):
        memory = {name: values[0] for name, values in found.items()}
        read = {name: values[1] for name, values in found.items()}
        assert memory["save"] < BUFFER
        assert memory["load"] < SHARD + BUFFER
        assert memory["donate"] < BUFFER
        assert memory["columns"] < BUFFER
        assert SHARD - 1 <= read["load"] < SHARD + 1
        assert SHARD - 1 <= read["donate"] < SHARD + 1
        assert read["columns"] < 2 * SHARD + 1  # each block has elements of both ranks; none is read twice


@contextlib.contextmanager
def at_most(mib):
    """This process gets so much memory on top of what it has, not more."""
    kept = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + mib * MIB, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, kept)


STACKS = 48
"""MiB of address space for the stacks of the reading threads, which the system counts as data."""


def larger_than_a_rank(rt, path):
    """Parameters and two moments, 384 MiB, on ranks that may take half of that and the buffer."""
    mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
    half = 3 * SHARD // 2
    names = ("params", "exp_avg", "exp_avg_sq")

    def shard(value):
        return DTensor.from_local(torch.full((half // 3 << 8, 1 << 10), value), mesh, [Shard(0)])

    with at_most(half + BUFFER):  # the state itself, and a save of it
        ff.save(rt, path, {name: shard(float(rt.rank + place)) for place, name in enumerate(names)})
    like = {name: shard(7.0) for name in names}
    with at_most(half + BUFFER + STACKS):
        loaded = ff.load(rt, path, like)
        for place, name in enumerate(names):
            assert (loaded[name].to_local() == rt.rank + place).all()
        del loaded
        with pytest.raises(CheckpointError, match="allocate memory"):  # whole it does not fit
            ff.load(rt, path)
    return True


def test_a_state_larger_than_the_memory_of_a_rank_is_saved_and_loaded(tmp_path, pair):
    assert pair.run(larger_than_a_rank, tmp_path / "c") == [True, True]
