"""Checkpoints of DTensors: any layout loads what any other wrote, bit for bit, and each number is written once."""

import itertools
import json
import math
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fabricfn as ff
from fabricfn.checkpoint.format import manifest
from fabricfn.checkpoint.format.boxes import whole
from fabricfn.checkpoint.sharing import shares
from fabricfn.errors import CheckpointError
from tests.support.layouts import ROWS, Layout, bits, filled, load_as, load_plain, local, save_as
from tests.support.runtimes import RT
from tests.support.worlds import world_of

ranks = world_of("threads", 4)
EXAMPLES = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


# ---------------------------------------------------------------- blocks

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
