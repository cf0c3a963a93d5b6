"""Sharded checkpoints that cannot be, or are damaged, are refused by name; boxes that overlap or leave a gap."""

import dataclasses
import hashlib
import json

import pytest
import torch
from hypothesis import given, strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fabricfn as ff
from fabricfn.checkpoint.format.boxes import Box, flaw
from fabricfn.checkpoint.storage.opening import opened
from fabricfn.checkpoint.trees.placements import parts_of
from fabricfn.checkpoint.trees.reading import read_parts
from fabricfn.errors import CheckpointError, MismatchError
from tests.support.layouts import ROWS, bits, filled, load_plain, save_as
from tests.support.runtimes import RT
from tests.support.worlds import world_of

ranks = world_of("threads", 4)


# ---------------------------------------------------------------- what cannot be, is refused


def test_ranks_that_tie_differently_are_told(tmp_path, ranks):
    def saved(rt):
        w = ROWS.put(rt, torch.ones(8, 3))
        with pytest.raises(MismatchError, match=r"(?s)share memory.*tied"):
            ff.save(rt, tmp_path / "c", {"w": w, "tied": w.clone() if rt.rank == 2 else w})

    ranks.run(saved)
    assert list(tmp_path.iterdir()) == []


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
