"""Checkpoints of sharded training states: every strategy and layout loads what any other saved."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fabricfn as ff
from tests.support.layouts import Layout, bits, local
from tests.support.runtimes import RT
from tests.support.worlds import world_of

ranks = world_of("threads", 4)


def trained():
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.linspace(-1, 1, param.numel(), dtype=torch.float64).reshape(param.shape))
    model = ff.setup_model(RT, module)
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)
    _, grads = ff.value_and_grad(RT, lambda net, x: net(x).square().sum())(model, x)
    return model, grads


def test_records_with_sharded_leaves(tmp_path, ranks):
    """A model and gradients by shards are a plain model for one rank, and the other way round."""
    model, grads = trained()

    def shard(rt, record):
        mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))

        def put(leaf):
            return distribute_tensor(leaf, mesh, [Shard(0)], src_data_rank=None) if leaf.ndim else leaf

        return dataclasses.replace(record, params={name: put(leaf) for name, leaf in record.params.items()})

    def saved(rt):
        ff.save(rt, tmp_path / "c", {"model": shard(rt, model), "grads": shard(rt, grads)})

    def loaded(rt):
        like = {"model": shard(rt, ff.tree_map(torch.zeros_like, model)), "grads": shard(rt, grads)}
        for path in (tmp_path / "c", tmp_path / "plain"):
            found = ff.load(rt, path, like)
            for name, param in shard(rt, model).params.items():
                assert bits(local(found["model"].params[name])) == bits(local(param))
            assert bits(local(found["grads"].params["0.weight"])) == bits(local(like["grads"].params["0.weight"]))
            assert found["model"].buffers["1.running_mean"].tolist() == model.buffers["1.running_mean"].tolist()

    ranks.run(saved, world_size=3)
    ff.save(RT, tmp_path / "plain", {"model": model, "grads": grads})
    found = ff.load(RT, tmp_path / "c", {"model": ff.tree_map(torch.zeros_like, model), "grads": grads})
    assert {name: bits(leaf) for name, leaf in found["model"].params.items()} == {
        name: bits(leaf) for name, leaf in model.params.items()
    }
    for world_size in (2, 4):
        ranks.run(loaded, world_size=world_size)


STRATEGIES = [("single", 1), ("ddp", 2), ("functional", 3), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("flat_sharded", 3)]


def named(name):
    return ff.strategies.fsdp() if name == "fsdp" else name


def linear():
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.linspace(-1, 1, param.numel()).reshape(param.shape))
    return module


def test_every_strategy_loads_the_model_that_any_other_saved(tmp_path, ranks):
    def saved(rt, path):
        ff.save(rt, path, {"model": ff.setup_model(rt, linear())})

    def loaded(rt, path):
        model = ff.setup_model(rt, linear())
        for donate in (False, True):
            like = ff.tree_map(torch.zeros_like, model)
            found = ff.load(rt, path, {"model": like}, donate=donate)["model"]
            assert found.params.keys() == model.params.keys()
            for name, param in model.params.items():
                assert type(found.params[name]) is type(param)
                assert bits(local(found.params[name])) == bits(local(param))
        return ff.value(rt, lambda net, x: net(x).square().mean())(found, torch.ones(4, 3)).item()

    for saver, writers in STRATEGIES:
        ranks.run(saved, tmp_path / "c", world_size=writers, strategy=named(saver))
        found = [ranks.run(loaded, tmp_path / "c", world_size=n, strategy=named(name)) for name, n in STRATEGIES]
        assert len({value for values in found for value in values}) == 1


@dataclasses.dataclass(frozen=True)
class Way:
    """How a world holds a training state: a strategy's own records, or those of one rank put into a layout."""

    world_size: int
    strategy: str
    mesh: tuple = ()
    placements: tuple = ()
    """Of matrices; vectors are sharded by the first dimension where these shard at all."""

    def put(self, rt, leaf):
        if not isinstance(leaf, torch.Tensor) or not self.mesh or not leaf.ndim:
            return leaf
        vector = [placement if placement.is_replicate() else Shard(0) for placement in self.placements]
        return Layout(self.world_size, self.mesh, self.placements if leaf.ndim > 1 else vector).put(rt, leaf)


WAYS = {
    "single": Way(1, "single"),
    "ddp 1": Way(1, "ddp"),
    "ddp 2": Way(2, "ddp"),
    "ddp 4": Way(4, "ddp"),
    "functional 2": Way(2, "functional"),
    "functional 4": Way(4, "functional"),
    "fsdp 1": Way(1, "fsdp"),
    "fsdp 2": Way(2, "fsdp"),
    "fsdp 4": Way(4, "fsdp"),
    "hsdp 2x2": Way(4, "functional", (2, 2), (Replicate(), Shard(0))),
    "hsdp 2x1": Way(2, "functional", (2, 1), (Replicate(), Shard(0))),
    "tensor parallel, columns": Way(2, "functional", (2,), (Shard(1),)),
    "tensor parallel, rows": Way(4, "functional", (4,), (Shard(0),)),
    "fsdp over tensor parallel": Way(4, "functional", (2, 2), (Shard(0), Shard(1))),
    "fsdp over rows": Way(4, "functional", (2, 2), (Shard(0), Shard(0))),
}


def block():
    """Sizes that are uneven on 4 ranks, buffers of two dtypes, and units of their own."""
    module = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 5))
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.linspace(-1, 1, param.numel()).reshape(param.shape))
    return module


def fresh(rt, way):
    """A state before its first step, as a program that begins anew has it. Its optimizer has no moments yet."""
    model = ff.setup_model(rt, block())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    return placed(rt, way, {"model": model, "opt": opt, "cursor": ff.Cursor(), "key": ff.key(0), "epoch": 0})


def placed(rt, way, state):
    """The state in the layout of a way; of a strategy's own, as it is."""

    def put(leaf):
        return way.put(rt, leaf)

    model, opt = state["model"], state["opt"]
    model = dataclasses.replace(model, params={name: put(leaf) for name, leaf in model.params.items()})
    return {**state, "model": model, "opt": ff.tree_map(put, opt)}


def trained_state(rt, way, steps=2):
    """Two steps of AdamW, the same on every rank; then the layout."""
    state = fresh(rt, Way(way.world_size, way.strategy))
    model, opt = state["model"], state["opt"]
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    for _ in range(steps):
        _, grads = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())(model, x)
        model, opt = ff.optimizer_step(rt, model, opt, grads)
    cursor, key = ff.Cursor(seed=7, epoch=2, index=48), ff.fold_in(ff.key(3), 5)
    return placed(rt, way, {"model": model, "opt": opt, "cursor": cursor, "key": key, "epoch": 2})


def differences(state, whole):
    """The entries of a state that are not, bit for bit, this rank's part of the plain tree of the checkpoint."""
    model, opt = state["model"], state["opt"]
    plain = whole["model"]
    pairs = {
        **{f"params/{name}": (leaf, plain["params"][name]) for name, leaf in model.params.items()},
        **{f"buffers/{name}": (leaf, plain["buffers"][name]) for name, leaf in model.buffers.items()},
        **{
            f"{name}/{slot}": (leaf, whole["opt"]["state"][name][slot])
            for name, slots in opt.state.items()
            for slot, leaf in slots.items()
        },
    }
    assert len(pairs) == 7 + 3 + 21
    found = []
    for name, (leaf, expected) in pairs.items():
        if isinstance(leaf, DTensor):
            expected = distribute_tensor(expected, leaf.device_mesh, leaf.placements, src_data_rank=None)
        if bits(local(leaf)) != bits(local(expected)):
            found.append(name)
    rest = (state["cursor"], state["key"], state["epoch"], opt.step)
    assert rest == (ff.Cursor(seed=7, epoch=2, index=48), ff.fold_in(ff.key(3), 5), 2, 2)
    return found


@pytest.fixture(scope="module")
def every_way(tmp_path_factory, ranks):
    """A folder with a checkpoint of the training state of each way."""
    folder = tmp_path_factory.mktemp("ways")

    def saved(rt, way, path):
        state = trained_state(rt, way)
        ff.save(rt, path, state)
        return differences(state, ff.load(rt, path))

    for name, way in WAYS.items():
        said = ranks.run(saved, way, folder / name, world_size=way.world_size, strategy=named(way.strategy))
        assert said == [[]] * way.world_size, f"{name}: what was written is what was there"
    return folder


@pytest.mark.parametrize("loader", WAYS)
def test_every_way_loads_the_whole_training_state_that_any_other_saved(ranks, every_way, loader):
    """All pairs: parameters, buffers, moments, cursor, key; into a fresh state, or one that has run."""

    def loaded(rt, way):
        like = fresh(rt, way) if not way.mesh else trained_state(rt, way, 1)
        kinds = {name: type(leaf) for name, leaf in like["model"].params.items()}
        found = {}
        for name in WAYS:
            state = ff.load(rt, every_way / name, like)
            assert {name: type(leaf) for name, leaf in state["model"].params.items()} == kinds
            found[name] = differences(state, ff.load(rt, every_way / name))
        return found

    way = WAYS[loader]
    said = ranks.run(loaded, way, world_size=way.world_size, strategy=named(way.strategy))
    assert said == [{name: [] for name in WAYS}] * way.world_size
