"""Checkpoints of DTensors: any layout loads what any other wrote, bit for bit, and no rank holds more than its part."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fabricfn as ff
from fabricfn.checkpoint.format import manifest
from fabricfn.checkpoint.format.boxes import Box, flaw, whole
from fabricfn.checkpoint.sharing import shares
from fabricfn.checkpoint.storage.opening import opened
from fabricfn.checkpoint.trees.placements import parts_of
from fabricfn.checkpoint.trees.reading import read_parts
from fabricfn.errors import CheckpointError, MismatchError
from tests.worlds import world_of

RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


ranks = world_of("threads", 4)
pair = world_of("processes", 2)


def bits(tensor):
    """The bits of a plain tensor."""
    row = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    return tensor.dtype, tuple(tensor.shape), row.view(torch.uint8).tolist()


def filled(dtype, shape, seed=0):
    empty = torch.empty(shape, dtype=dtype)
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (empty.nbytes,), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return data.view(dtype).reshape(shape) if empty.numel() else empty


@dataclasses.dataclass(frozen=True)
class Layout:
    """A world, and how a tensor lies in it: no mesh is a plain tensor on every rank."""

    world_size: int
    mesh: tuple = ()
    placements: tuple = ()

    def put(self, rt, value):
        """This rank's tensor; torch does the cutting."""
        if not self.mesh:
            return value.clone()
        if len(self.mesh) == 1:
            mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
        else:
            mesh = init_device_mesh("cpu", self.mesh, mesh_dim_names=("a", "b", "c")[: len(self.mesh)])
        return distribute_tensor(value, mesh, self.placements, src_data_rank=None)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_as(rt, path, layout, value):
    ff.save(rt, path, {"w": layout.put(rt, value), "epoch": 3})


def load_as(rt, path, layout, value, donate=False):
    """Whether the loaded tensor is the value in this layout, and whether the template was left alone."""
    expected, like = layout.put(rt, value), layout.put(rt, torch.ones_like(value))
    before = bits(local(like))
    loaded = ff.load(rt, path, {"w": like, "epoch": 0}, donate=donate)
    assert loaded["epoch"] == 3
    assert type(loaded["w"]) is type(expected)
    assert (loaded["w"] is like) is donate
    if layout.mesh:
        assert loaded["w"]._spec == expected._spec
    assert bits(local(loaded["w"])) == bits(local(expected))
    assert local(loaded["w"]).stride() == local(expected).stride()
    if not donate:
        assert bits(local(like)) == before


def load_plain(rt, path, value):
    loaded = ff.load(rt, path)
    assert type(loaded["w"]) is torch.Tensor
    assert bits(loaded["w"]) == bits(value)


# ---------------------------------------------------------------- law 5, every pair

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


@st.composite
def layouts(draw, ndim):
    placement = st.one_of(st.just(Replicate()), *[st.just(Shard(dim)) for dim in range(ndim)])
    mesh = draw(st.sampled_from([(), (2,), (3,), (4,), (2, 2), (1, 3), (4, 1)]))
    world_size = math.prod(mesh) if mesh else draw(st.integers(1, 4))
    placements = tuple(draw(placement) for _ in mesh)
    return Layout(world_size, mesh, placements)


@st.composite
def pairs(draw):
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)))
    value = filled(draw(st.sampled_from(DTYPES)), shape, draw(st.integers(0, 9)))
    return value, draw(layouts(len(shape))), draw(layouts(len(shape)))


@given(pairs(), st.booleans())
@EXAMPLES
def test_any_layout_loads_what_any_other_wrote(tmp_path, ranks, case, donate):
    value, saver, loader = case
    ranks.run(save_as, tmp_path / "c", saver, value, world_size=saver.world_size)
    ranks.run(load_as, tmp_path / "c", loader, value, donate, world_size=loader.world_size)
    ranks.run(load_plain, tmp_path / "c", value, world_size=loader.world_size)
    ff.verify_checkpoint(tmp_path / "c")
    written = sum(path.stat().st_size for path in (tmp_path / "c/data").iterdir())
    heads = sum(int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in (tmp_path / "c/data").iterdir())
    assert written - heads == value.nbytes  # nothing twice, whatever is replicated
    shutil.rmtree(tmp_path / "c")


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


def test_five_rows_on_four_ranks_leave_one_without_a_file(tmp_path, ranks):
    value = filled(torch.float32, (5, 3))
    ranks.run(save_as, tmp_path / "c", Layout(4, (4,), (Shard(0),)), value)
    names = sorted(path.name for path in (tmp_path / "c/data").iterdir())
    assert names == [f"r{rank:05d}-000.safetensors" for rank in range(3)]
    leaf = json.loads((tmp_path / "c/manifest.json").read_text())["leaves"][0]
    assert leaf["shape"] == [5, 3]
    assert [(piece["file"], piece["offset"], piece["shape"]) for piece in leaf["pieces"]] == [
        (0, [0, 0], [2, 3]), (1, [2, 0], [2, 3]), (2, [4, 0], [1, 3]),
    ]  # fmt: skip
    rows = [row for name in names for row in load_file(tmp_path / "c/data" / name).values()]
    assert torch.equal(torch.cat(rows).view(torch.int32), value.view(torch.int32))
    assert ff.inspect_checkpoint(tmp_path / "c").entries[0].shape == (5, 3)


def test_replicas_share_the_writing(tmp_path, ranks):
    """Replicate x Shard: each box has two holders, and each of the four ranks writes."""
    layout = Layout(4, (2, 2), (Replicate(), Shard(0)))

    def saved(rt):
        tree = {"sharded": [layout.put(rt, filled(torch.float32, (6, 4), i)) for i in range(4)]}
        ff.save(rt, tmp_path / "c", {**tree, "plain": [torch.ones(12) for _ in range(4)]})

    ranks.run(saved)
    sizes = [path.stat().st_size for path in (tmp_path / "c/data").iterdir()]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) < 200
    assert len(ff.load(RT, tmp_path / "c")["plain"]) == 4


def test_what_all_hold_is_written_by_those_who_have_less_of_their_own():
    leaves = [manifest.Leaf(kind="tensor", dtype="float32", shape=(size,)) for size in (100, 60)]
    owners = [((whole((100,)), (0, 1)),), ((whole((60,)), (0,)),)]
    assert [[chore.leaf for chore in share] for share in shares(leaves, owners, 2)] == [[1], [0]]


def test_strided_shards_of_fsdp_over_tensor_parallel_are_mapped(tmp_path, ranks):
    value = filled(torch.float32, (8, 6))
    strided = Layout(4, (2, 2), (_StridedShard(0, split_factor=2), Shard(0)))
    columns = Layout(4, (2, 2), (_StridedShard(1, split_factor=3), Replicate()))
    others = [Layout(1), Layout(3, (3,), (Shard(0),)), Layout(4, (2, 2), (Shard(1), Shard(0)))]
    for saver, loader in itertools.product([strided, columns, *others], [strided, columns, *others]):
        if Layout(1) != loader or saver in (strided, columns):
            ranks.run(save_as, tmp_path / "c", saver, value, world_size=saver.world_size)
            ranks.run(load_as, tmp_path / "c", loader, value, world_size=loader.world_size)


def test_meshes_that_are_slices_of_a_larger_one(tmp_path, ranks):
    """Ranks 0, 1 and ranks 2, 3 hold the same tensor over meshes of their own: it is written once."""
    value = filled(torch.float32, (5, 3))

    def sliced(rt, tensor):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "dp"))["dp"]
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    def both(rt):
        ff.save(rt, tmp_path / "c", {"w": sliced(rt, value)})
        loaded = ff.load(rt, tmp_path / "c", {"w": sliced(rt, torch.zeros(5, 3))})
        assert bits(local(loaded["w"])) == bits(local(sliced(rt, value)))

    ranks.run(both)
    assert bits(ff.load(RT, tmp_path / "c")["w"]) == bits(value)


def test_ranks_outside_of_the_mesh_hold_nothing(tmp_path, ranks):
    value = filled(torch.float32, (5, 3))

    def both(rt):
        mesh = DeviceMesh("cpu", [0, 2])
        put = lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)  # noqa: E731
        ff.save(rt, tmp_path / "c", {"w": put(value)})
        loaded = ff.load(rt, tmp_path / "c", {"w": put(torch.zeros(5, 3))})
        assert bits(local(loaded["w"])) == bits(local(put(value)))

    ranks.run(both)
    assert bits(ff.load(RT, tmp_path / "c")["w"]) == bits(value)


# ---------------------------------------------------------------- records, ties, templates

ROWS = Layout(4, (4,), (Shard(0),))


def test_tied_tensors_are_written_once_also_where_a_rank_has_nothing_of_them(tmp_path, ranks):
    value = filled(torch.float32, (5, 3))

    def saved(rt):
        w = ROWS.put(rt, value)
        ff.save(rt, tmp_path / "c", {"w": w, "tied": w.detach(), "other": w.clone(), "same": w})

    ranks.run(saved)
    entries = {entry.path: entry.bytes for entry in ff.inspect_checkpoint(tmp_path / "c").entries}
    assert entries == {"w": 60, "tied": 0, "other": 60, "same": 0}
    loaded = ff.load(RT, tmp_path / "c")
    assert loaded["w"] is loaded["tied"]
    assert bits(loaded["other"]) == bits(value)


def test_one_memory_in_two_layouts_is_two_tensors(tmp_path, ranks):
    def saved(rt):
        mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
        part = torch.full((2, 3), float(rt.rank))
        tree = {
            "rows": DTensor.from_local(part, mesh, [Shard(0)]),
            "columns": DTensor.from_local(part, mesh, [Shard(1)]),
        }
        ff.save(rt, tmp_path / "c", tree)

    ranks.run(saved, world_size=2)
    loaded = ff.load(RT, tmp_path / "c")
    assert loaded["rows"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert loaded["columns"].tolist() == [[0.0] * 3 + [1.0] * 3] * 2


def test_ranks_that_tie_differently_are_told(tmp_path, ranks):
    def saved(rt):
        w = ROWS.put(rt, torch.ones(8, 3))
        with pytest.raises(MismatchError, match=r"(?s)share memory.*tied"):
            ff.save(rt, tmp_path / "c", {"w": w, "tied": w.clone() if rt.rank == 2 else w})

    ranks.run(saved)
    assert list(tmp_path.iterdir()) == []


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
        put = lambda leaf: distribute_tensor(leaf, mesh, [Shard(0)], src_data_rank=None) if leaf.ndim else leaf  # noqa: E731
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


STRATEGIES = [("single", 1), ("ddp", 2), ("functional", 3), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4)]


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


# ---------------------------------------------------------------- the whole training state, every pair


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
    put = lambda leaf: way.put(rt, leaf)  # noqa: E731
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


def test_parameters_meta_templates_and_filling_in_place(tmp_path, ranks):
    value = filled(torch.float32, (5, 3))
    ranks.run(save_as, tmp_path / "c", ROWS, value)

    def check(rt):
        expected = bits(local(ROWS.put(rt, value)))
        param = nn.Parameter(ROWS.put(rt, torch.zeros(5, 3)))
        found = ff.load(rt, tmp_path / "c", {"w": param})["w"]
        assert isinstance(found, nn.Parameter)
        assert isinstance(found, DTensor)
        assert found.requires_grad
        assert bits(found.to_local()) == expected
        with torch.device("meta"):
            like = DTensor.from_local(
                torch.empty(param.to_local().shape), param.device_mesh, [Shard(0)], shape=(5, 3), stride=(3, 1)
            )
        assert bits(ff.load(rt, tmp_path / "c", {"w": like})["w"].to_local()) == expected
        # a part that is not contiguous is filled, too; open graphs see it by the versions
        columns = distribute_tensor(torch.zeros(5, 3), param.device_mesh, [Shard(0)], src_data_rank=None)
        holder = torch.zeros(3, len(columns.to_local())).t()
        columns = DTensor.from_local(holder, param.device_mesh, [Shard(0)], shape=(5, 3), stride=(3, 1))
        versions = columns._version, columns._local_tensor._version
        assert ff.load(rt, tmp_path / "c", {"w": columns}, donate=True)["w"] is columns
        assert bits(holder) == expected
        assert columns._version > versions[0]
        assert columns._local_tensor._version > versions[1]

    ranks.run(check)


def test_misfits_name_the_global_shapes_and_parts_are_loaded(tmp_path, ranks):
    value = filled(torch.float32, (5, 3))

    def saved(rt):
        ff.save(rt, tmp_path / "c", {"a": ROWS.put(rt, value), "b": ROWS.put(rt, value + 1), "n": 1})

    def check(rt):
        like = {"a": ROWS.put(rt, torch.zeros(6, 3)), "b": ROWS.put(rt, torch.zeros(5, 3, dtype=torch.float64))}
        with pytest.raises(CheckpointError) as caught:
            ff.load(rt, tmp_path / "c", like)
        assert "a: the template has a tensor float32[6, 3], the checkpoint a tensor float32[5, 3]" in str(caught.value)
        assert "b: the template has a tensor float64[5, 3], the checkpoint a tensor float32[5, 3]" in str(caught.value)
        zeros = ROWS.put(rt, torch.zeros(5, 3))
        loaded = ff.load(rt, tmp_path / "c", {"a": zeros, "c": zeros}, strict=False)
        assert loaded.missing == ("c",)
        assert loaded.tree["c"] is zeros
        assert bits(local(loaded.tree["a"])) == bits(local(ROWS.put(rt, value)))
        assert bits(loaded.rest["b"]) == bits(value + 1)
        only = ff.load(rt, tmp_path / "c", {"a": zeros, "b": zeros}, only="b")
        assert only["a"] is zeros
        assert bits(local(only["b"])) == bits(local(ROWS.put(rt, value + 1)))

    ranks.run(saved)
    ranks.run(check)


# ---------------------------------------------------------------- what cannot be, is refused


def test_layouts_that_cannot_be_told_are_refused_by_name(tmp_path, ranks):
    def check(rt):
        mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
        cases = {
            "partial": (DTensor.from_local(torch.ones(2), mesh, [Partial()]), r"partial sums.*redistribute"),
            "uneven": (DTensor.from_local(torch.ones(4), mesh, [Shard(0)], shape=(9,), stride=(1,)), "placements say"),
            "strided": (
                distribute_tensor(torch.ones(5), mesh, [_StridedShard(0, split_factor=2)], src_data_rank=None),
                "not even",
            ),
        }
        for name, (value, text) in cases.items():
            with pytest.raises(CheckpointError, match=rf"(?s)in/{name}: a DTensor cannot be stored: .*{text}"):
                ff.save(rt, tmp_path / "c", {"in": {name: value}})
        ff.save(rt, tmp_path / "plain", torch.ones(2))
        with pytest.raises(CheckpointError, match="partial sums"):
            ff.load(rt, tmp_path / "plain", cases["partial"][0])

    ranks.run(check)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_parts_that_leave_a_gap_and_ranks_that_shard_differently_are_told(tmp_path, ranks):
    def check(rt):
        here = DeviceMesh("cpu", [0, 1])
        other = DeviceMesh("cpu", [2, 3])
        one = distribute_tensor(torch.ones(6, 2), here, [Shard(0)], src_data_rank=None)
        two = distribute_tensor(torch.ones(6, 2), other, [Shard(1)], src_data_rank=None)
        with pytest.raises(MismatchError, match=r"(?s)w: ranks 0, 1 have a tensor float32\[6, 2\], sharded \(Shard"):
            ff.save(rt, tmp_path / "c", {"w": one if rt.rank < 2 else two})
        with pytest.raises(MismatchError, match=r"(?s)w: ranks 0, 1 have .*; ranks 2, 3 have a tensor float32\[6, 2\]"):
            ff.save(rt, tmp_path / "c", {"w": one if rt.rank < 2 else torch.ones(6, 2)})
        # a runtime of fewer ranks than the mesh has: one rank saves its half alone
        alone = dataclasses.replace(rt, world=ff.World())
        if rt.rank == 0:
            with pytest.raises(CheckpointError, match=r"(?s)w, \(Shard\(dim=0\),\) on a mesh of \[2\] ranks: .*gap"):
                ff.save(alone, tmp_path / "c", {"w": one})

    ranks.run(check)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_damaged_files_are_named_on_every_rank(tmp_path, ranks):
    value = filled(torch.float32, (8, 3))
    ranks.run(save_as, tmp_path / "c", ROWS, value)
    name = tmp_path / "c/data/r00002-000.safetensors"
    good = name.read_bytes()

    def check(rt, text):
        with pytest.raises(CheckpointError, match=text):
            ff.load(rt, tmp_path / "c", {"w": ROWS.put(rt, value)})

    name.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    ranks.run(check, r"failed on 1 of 4 ranks.*rank 2: .*r00002-000.safetensors is damaged.*'w'")
    name.unlink()
    ranks.run(check, r"data/r00002-000.safetensors with w is missing")
    with pytest.raises(CheckpointError, match=r"data/r00002-000.safetensors with w is missing"):
        ff.verify_checkpoint(tmp_path / "c")
    name.write_bytes(good)
    ranks.run(load_plain, tmp_path / "c", value)


def test_manifests_whose_pieces_overlap_or_leave_a_gap_name_the_leaf(tmp_path, ranks):
    ranks.run(save_as, tmp_path / "c", ROWS, filled(torch.float32, (8, 3)))
    text = json.loads((tmp_path / "c/manifest.json").read_text())
    del text["sha256"]

    def check(pieces, message):
        leaf = {**text["leaves"][0], "pieces": pieces}
        body = json.dumps({**text, "leaves": [leaf, *text["leaves"][1:]]}).encode()[:-1]
        signed = body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()
        (tmp_path / "c/manifest.json").write_bytes(signed)
        with pytest.raises(CheckpointError, match=rf"manifest.json.*entry 'w': .*{message}"):
            ff.load(RT, tmp_path / "c")

    pieces = text["leaves"][0]["pieces"]
    check(pieces[:-1], "gap")
    check([*pieces[:-1], {**pieces[-1], "offset": [5, 0]}], "overlap")


def test_elements_that_no_piece_has_are_never_left_as_they_were(tmp_path, ranks):
    """Manifests with gaps are refused when they are read; reading itself counts as well."""
    ranks.run(save_as, tmp_path / "c", ROWS, filled(torch.float32, (8, 3)))
    with opened(tmp_path / "c") as source:
        leaf, into = source.manifest.leaves[0], torch.zeros(8, 3)
        read_parts(source, leaf, into, parts_of(into), "w")
        assert bits(into) == bits(filled(torch.float32, (8, 3)))
        with pytest.raises(CheckpointError, match=r"has 18 of the 24 elements of 'w'"):
            read_parts(source, dataclasses.replace(leaf, pieces=leaf.pieces[1:]), into, parts_of(into), "w")


# ---------------------------------------------------------------- boxes


@st.composite
def boxed(draw):
    """An array cut into boxes; then perhaps one of them moved, or left out, or there twice."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    found = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = found.pop(draw(st.integers(0, len(found) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        first = draw(st.integers(0, box.shape[dim]))
        for at, length in ((0, first), (first, box.shape[dim] - first)):
            offset, lengths = list(box.offset), list(box.shape)
            offset[dim], lengths[dim] = offset[dim] + at, length
            found.append(Box(tuple(offset), tuple(lengths)))
    index = draw(st.integers(0, len(found) - 1))
    match draw(st.sampled_from(["keep", "keep", "drop", "twice", "move"])):
        case "drop":
            found.pop(index)
        case "twice":
            found.append(found[index])
        case "move":
            offset = tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, found[index].shape, strict=True))
            found[index] = Box(offset, found[index].shape)
    return shape, found


@given(boxed())
def test_a_flaw_is_an_element_that_is_not_in_exactly_one_box(case):
    shape, found = case
    counts = torch.zeros(shape, dtype=torch.int64)
    for box in found:
        counts[tuple(slice(b, b + n) for b, n in zip(box.offset, box.shape, strict=True))] += 1
    assert (flaw(found, shape) == "") is bool(found and (counts == 1).all())


def test_a_pinwheel_has_no_straight_cut_and_is_no_flaw():
    pinwheel = [Box((0, 0), (2, 1)), Box((0, 1), (1, 2)), Box((1, 2), (2, 1)), Box((2, 0), (1, 2)), Box((1, 1), (1, 1))]
    assert flaw(pinwheel, (3, 3)) == ""
    assert "overlap" in flaw([*pinwheel[:-1], Box((1, 2), (1, 1))], (3, 3))


# ---------------------------------------------------------------- blocks, bytes, memory

ROW = manifest.BLOCK // 8 + 100


def test_parts_that_begin_and_end_inside_of_blocks(tmp_path, ranks):
    """Rows longer and shorter than a block of 4 MiB, several blocks a piece, cut across and along."""
    wide = torch.arange(2 * 3 * ROW, dtype=torch.int64).reshape(2, 3, ROW)
    layouts = [
        Layout(1),
        *(Layout(2, (2,), (Shard(dim),)) for dim in range(3)),
        Layout(2, (2, 1), (Shard(1), Shard(2))),
    ]

    def load_wide(rt, layout):
        like = layout.put(rt, torch.zeros_like(wide))
        expected = layout.put(rt, wide)
        assert torch.equal(local(ff.load(rt, tmp_path / "c", {"w": like})["w"]), local(expected))
        if layout.mesh:  # a template whose memory has another order
            turned = local(like).transpose(0, 2).contiguous().transpose(0, 2)
            spec = like._spec
            turned = DTensor.from_local(turned, spec.mesh, spec.placements, shape=wide.shape, stride=wide.stride())
            assert torch.equal(local(ff.load(rt, tmp_path / "c", {"w": turned}, donate=True)["w"]), local(expected))

    for saver in (layouts[0], layouts[2]):
        ranks.run(save_as, tmp_path / "c", saver, wide, world_size=saver.world_size)
        for loader in layouts:
            ranks.run(load_wide, loader, world_size=loader.world_size)


def status(field):
    """Bytes of memory: VmRSS is what this process has, VmHWM the most that it had."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def cost(work, *args, **options):
    """(the most memory that `work` took on top of what there was, the bytes that it read), in MiB."""
    read = lambda: int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])  # noqa: E731
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
    rows = lambda value: DTensor.from_local(torch.full((side // 2, width), value), mesh, [Shard(0)])  # noqa: E731
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
    shard = lambda value: DTensor.from_local(torch.full((half // 3 << 8, 1 << 10), value), mesh, [Shard(0)])  # noqa: E731
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
