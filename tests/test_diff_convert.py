"""`fabricfn diff` and `convert`, on checkpoints that are real."""

import itertools
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fabricfn as ff
from fabricfn.checkpoint import exporting
from fabricfn.errors import CheckpointError
from tests.support.checkpoints import trained
from tests.support.commands import GOLDEN, checkpoints, command
from tests.support.runtimes import RT, RT64

made = checkpoints()


# ---------------------------------------------------------------- diff


def test_diff_is_0_for_the_same_training_however_it_was_cut(capsys, made):
    for other in ("one", "hub", "one.pt"):
        status, out, err = command(capsys, "diff", made / "one", made / other)
        assert (status, err) == (0, "")
        assert " entries equal, 0 differ" in out
    # two ranks add up in another order
    assert command(capsys, "diff", made / "one", made / "two", "--atol", "1e-9")[0] == 0
    assert ff.diff_checkpoints(made / "two", made / "two").equal


def test_diff_names_what_differs_by_how_much_and_what_is_missing(capsys, tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"w": base, "i": torch.tensor([1, 2]), "gone": 1, "x": 0.0, "same": base.half(), "shape": base, "kind": base}
    other = {
        **tree, "w": base.clone(), "i": torch.tensor([1, 2 + (1 << 60)]), "new": torch.ones(2), "x": -0.0,
        "shape": base[:2], "kind": base.double(),
    }  # fmt: skip
    del other["gone"]
    other["w"][1, 2] += 0.5
    other["w"][2, 3] = float("-inf")
    ff.save(RT, tmp_path / "a", tree)
    ff.save(RT, tmp_path / "b", other)
    status, out, _ = command(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert status == 1
    assert out.splitlines() == [
        f"{tmp_path}/a and {tmp_path}/b: 1 entries equal, 5 differ, 1 only in the first, 1 only in the second",
        "  w: float32[3, 4], 2 of 12 differ, by at most inf",
        "  i: int64[2], 1 of 2 differ, by at most 1.15e+18",
        "  gone: only in the first, 1",
        "  x: 0.0 -> -0.0",
        "  shape: float32[3, 4] -> float32[2, 4]",
        "  kind: float32[3, 4] -> float64[3, 4], 0 of 12 differ, by at most 0",
        "  new: only in the second, float32[2]",
    ]
    assert command(capsys, "diff", tmp_path / "a", tmp_path / "b", "--only", "same", "-q") == (0, "", "")
    assert command(capsys, "diff", tmp_path / "a", tmp_path / "b", "--only", "x")[0] == 1


@pytest.mark.parametrize("buffer", [8, 24, 1 << 20])
def test_differences_are_counted_over_all_blocks(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(exporting, "BUFFER", buffer)
    a, b = torch.zeros(5, 7), torch.zeros(5, 7, dtype=torch.float64)
    b[0, 0], b[2, 3], b[4, 6] = -2.5, 1e-30, float("nan")
    torch.save({"same": {"w": a}, "kind": {"w": a}}, tmp_path / "a.pt")
    torch.save({"same": {"w": b.float()}, "kind": {"w": b}}, tmp_path / "b.pt")
    for change in ff.diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt").changes:
        assert (change.count, change.size) == (3, 35)
        assert math.isnan(change.max_abs)
    b[4, 6] = 0
    torch.save({"same": {"w": b.float()}}, tmp_path / "b.pt")
    (change,) = ff.diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", only="same").changes
    assert (change.count, change.max_abs) == (2, 2.5)
    assert ff.diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", only="same", atol=2.5).equal


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_a_nan_is_itself_and_every_dtype_can_be_compared(tmp_path):
    assert ff.diff_checkpoints(GOLDEN / "v1", GOLDEN / "v1").equal
    whole = ff.load(RT, GOLDEN / "v1")
    for name, value in whole["dtypes"].items():
        raw = value.contiguous().view(torch.uint8).clone()
        raw.reshape(-1)[0] ^= 1
        ff.save(RT, tmp_path / "b", {"dtypes": {**whole["dtypes"], name: raw.view(value.dtype)}})
        (change,) = ff.diff_checkpoints(GOLDEN / "v1", tmp_path / "b", only="dtypes").changes
        assert (change.path, change.count) == (f"dtypes/{name}", 1)
        assert math.isnan(change.max_abs) or change.max_abs >= 0


# ---------------------------------------------------------------- convert


def test_convert_goes_to_each_format_and_back_with_the_same_bits(capsys, made, tmp_path):
    model, _ = trained(RT64)
    state = {**model.params, **model.buffers}
    ways = [made / "two", "a.safetensors", "b.pt", "hub", "c.ckpt", "d.safetensors"]
    for source, target in itertools.pairwise(ways):
        status, out, _ = command(capsys, "convert", tmp_path / source, tmp_path / target)
        assert status == 0
        assert out.startswith(str(tmp_path / target))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    for found in (load_file(tmp_path / "d.safetensors"), torch.load(tmp_path / "b.pt", weights_only=True)):
        assert set(found) == set(state)
        for name, value in found.items():
            torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.pt",
        "c.ckpt",
        "d.safetensors",
        "hub",
    ]
    loaded = ff.load_raw(RT64, tmp_path / "b.pt", model)
    assert ff.diff_checkpoints(made / "two", tmp_path / "b.pt").equal
    assert torch.equal(loaded.params["0.weight"], load_file(tmp_path / "a.safetensors")["0.weight"])


def test_convert_takes_what_only_says_and_the_state_dicts_of_a_training(capsys, made, tmp_path):
    status, _, _ = command(
        capsys, "consolidate", GOLDEN / "fabric/full.ckpt", tmp_path / "hub", "--max-shard-size", "20B"
    )
    assert status == 0
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) == 3
    command(capsys, "convert", GOLDEN / "fabric/sharded", tmp_path / "a.safetensors")
    assert ff.diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "hub").equal
    assert set(load_file(tmp_path / "a.safetensors")) == {"seen", "lin.weight", "lin.bias"}
    command(capsys, "convert", GOLDEN / "fabric/full.ckpt", tmp_path / "b.pt", "--only", "optimizer/state/0")
    assert set(torch.load(tmp_path / "b.pt", weights_only=True)) == {"step", "exp_avg", "exp_avg_sq"}
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.zeros(1)}}, tmp_path / "two.pt")
    command(capsys, "convert", tmp_path / "two.pt", tmp_path / "two.safetensors")
    assert {name: value.item() for name, value in load_file(tmp_path / "two.safetensors").items()} == {
        "a.w": 1,
        "b.w": 0,
    }


def test_one_array_under_two_names_is_one_in_a_pytorch_file(made, tmp_path):
    net = nn.ModuleDict({"inp": nn.Linear(3, 3, bias=False), "out": nn.Linear(3, 3, bias=False)})
    tied = net["inp"].weight.detach()
    ff.save(RT, tmp_path / "a", {"x": tied, "y": tied, "z": tied.clone()})
    ff.consolidate(tmp_path / "a", tmp_path / "a.pt", only=["x", "y", "z"])
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found["x"].data_ptr() == found["y"].data_ptr() != found["z"].data_ptr()


def test_a_failed_conversion_leaves_the_file_that_stood_there(made, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"mine")
    shutil.copytree(made / "one", tmp_path / "bad")
    file = next((tmp_path / "bad" / "data").iterdir())
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        ff.consolidate(tmp_path / "bad", tmp_path / "a.pt", only="opt/state")
    assert (tmp_path / "a.pt").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "bad"]
