"""Loading: what the template decides, parts, and all misfits in one error."""

import numpy as np
import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.errors import CheckpointError
from tests.support.checkpoints import bits, trained
from tests.support.runtimes import RT


def test_donate_overwrites_every_kind_of_array(tmp_path):
    tree = {
        "w": torch.arange(6.0),
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "n": np.arange(3),
        "p": nn.Parameter(torch.ones(2)),
        "e": 4,
    }
    ff.save(RT, tmp_path / "c", tree)
    like = {
        "w": torch.zeros(6),
        "t": torch.zeros(3, 2),
        "n": np.zeros(3, int),
        "p": nn.Parameter(torch.zeros(2)),
        "e": 0,
    }
    versions = like["w"]._version
    loaded = ff.load(RT, tmp_path / "c", like, donate=True)
    assert bits(loaded) == bits(tree)
    assert all(loaded[key] is like[key] for key in "wtnp")
    assert like["w"]._version > versions


def test_donate_refuses_memory_that_cannot_hold_what_is_there(tmp_path):
    shared = torch.zeros(6)
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    ff.save(RT, tmp_path / "c", {"a": torch.ones(6), "b": torch.zeros(6), "c": torch.zeros(2, 3), "n": np.ones(3)})
    expanded = torch.zeros(1, 3).expand(2, 3)
    with pytest.raises(CheckpointError) as caught:
        ff.load(RT, tmp_path / "c", {"a": shared, "b": shared, "c": expanded, "n": frozen}, donate=True)
    assert all(
        part in str(caught.value) for part in ("3 places", "at two places", "share memory with each other", "read-only")
    )
    assert shared.sum() == 0

    ff.save(RT, tmp_path / "two", {"x": torch.ones(4), "y": torch.full((4,), 2.0)})
    with pytest.raises(CheckpointError, match="y: donate=True cannot fill it, as it shares memory with x; clone it"):
        ff.load(RT, tmp_path / "two", {"x": shared[:4], "y": shared[2:]}, donate=True)
    assert shared.sum() == 0
    halves = torch.zeros(8)
    ff.load(RT, tmp_path / "two", {"x": halves[:4], "y": halves[4:]}, donate=True)
    assert halves.tolist() == [1.0] * 4 + [2.0] * 4


# ---------------------------------------------------------------- templates that do not fit


def test_all_misfits_are_in_one_error(tmp_path):
    model, opt = trained(RT)
    ff.save(RT, tmp_path / "c", {"model": model, "opt": opt, "w": torch.ones(2), "l": [1, 2], "c": ff.Cursor()})
    like = {"model": opt, "w": torch.ones(3, dtype=torch.float16), "l": [1], "c": 3, "more": 1, "opt": {"state": {}}}
    with pytest.raises(CheckpointError) as caught:
        ff.load(RT, tmp_path / "c", like)
    for part in (
        "6 places",
        "model: the template has a Optimizer, the checkpoint a Model",
        "w: the template has a tensor float16[3], the checkpoint a tensor float32[2]",
        "l: the template has 1 elements, the checkpoint 2",
        "c: the template has a plain value (int), the checkpoint a record Cursor of seed, epoch, index",
        "more: is in the template, not in the checkpoint",
        "opt: the template has a dict, the checkpoint a record Optimizer of state, ",
    ):
        assert part in str(caught.value)


def test_a_slip_is_named_with_what_to_write(tmp_path):
    model = ff.setup_model(RT, nn.Linear(2, 2))
    ff.save(RT, tmp_path / "c", {"model": model, "step": 3})
    with pytest.raises(
        CheckpointError, match="the whole tree: the template has a Model, the checkpoint a dict of model, "
    ):
        ff.load(RT, tmp_path / "c", model)
    with pytest.raises(CheckpointError, match="the path is None, which ff.latest returns"):
        ff.load(RT, ff.latest(tmp_path / "none"), {"model": model})
    for call in (ff.save, ff.load, ff.load_raw):
        with pytest.raises(CheckpointError, match="a path is a string or a pathlib.Path, this is a dict"):
            call(RT, {"model": model}, tmp_path / "c")  # pyright: ignore
    torch.save({"w": torch.ones(2)}, tmp_path / "file.pt")
    (tmp_path / "hub").mkdir()
    for name in ("file.pt", "hub"):
        with pytest.raises(CheckpointError, match=r"what other tools wrote is read by ff.load_raw\(rt"):
            ff.load(RT, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"opt: is in the template, not in the file \(there: w\)"):
        ff.load_raw(RT, tmp_path / "file.pt", {"w": torch.zeros(2), "opt": 1})


def test_a_model_of_another_architecture_is_refused_in_both_directions(tmp_path):
    small, large = (ff.setup_model(RT, nn.Sequential(*[nn.Linear(2, 2) for _ in range(n)])) for n in (1, 2))
    ff.save(RT, tmp_path / "small", {"model": small})
    ff.save(RT, tmp_path / "large", {"model": large})
    with pytest.raises(CheckpointError, match=r"model/params/1.weight: is in the template, not in the checkpoint"):
        ff.load(RT, tmp_path / "small", {"model": large})
    with pytest.raises(CheckpointError, match=r"model/params/1.bias: is in the checkpoint, not in the template"):
        ff.load(RT, tmp_path / "large", {"model": small})
    loaded = ff.load(RT, tmp_path / "large", {"model": small}, remainder=True)
    assert bits(loaded.tree["model"].params["0.weight"]) == bits(large.params["0.weight"])
    assert set(loaded.rest["model"]["params"]) == {"1.weight", "1.bias"}
    assert loaded.missing == ()
    loaded = ff.load(RT, tmp_path / "small", {"model": large}, strict=False)
    assert loaded.missing == ("model/params/1.weight", "model/params/1.bias")
    assert loaded.tree["model"].params["1.bias"] is large.params["1.bias"]
    assert bits(loaded.tree["model"].params["0.bias"]) == bits(small.params["0.bias"])


def test_further_entries_are_the_remainder(tmp_path):
    tree = {"a": 1, "extra": [torch.ones(2), {"deep": 2}], "in": {"b": 3, "c": 4}}
    ff.save(RT, tmp_path / "c", tree)
    like = {"a": 0, "in": {"b": 0}}
    assert ff.load(RT, tmp_path / "c", like) == {"a": 1, "in": {"b": 3}}
    loaded = ff.load(RT, tmp_path / "c", like, remainder=True)
    assert loaded.tree == {"a": 1, "in": {"b": 3}}
    assert loaded.rest["in"] == {"c": 4}
    assert bits(loaded.rest["extra"]) == bits(tree["extra"])
    assert len(loaded.rest) == 2
    assert bits(ff.load(RT, tmp_path / "c", {"extra": None})) == bits({"extra": tree["extra"]})


def test_a_part_is_saved_and_loaded(tmp_path):
    model, opt = trained(RT)
    tree = {"model": model, "opt": opt, "list": [torch.ones(2), torch.zeros(2)], "epoch": 3}
    ff.save(RT, tmp_path / "c", tree)
    fresh = trained(RT, steps=0)
    like = {"model": fresh[0], "opt": fresh[1], "list": [torch.ones(2), torch.ones(2)], "epoch": 0}
    loaded = ff.load(RT, tmp_path / "c", like, only=("model", "list/1"))
    assert bits(loaded["model"]) == bits(model)
    assert loaded["opt"] is fresh[1]
    assert loaded["epoch"] == 0
    assert loaded["list"][0] is like["list"][0]
    assert loaded["list"][1].tolist() == [0, 0]
    weights = ff.load(RT, tmp_path / "c", only="model/params/*.weight")
    assert list(weights["model"]["params"]) == ["0.weight", "1.weight", "2.weight"]
    with pytest.raises(CheckpointError, match="Name the whole list"):
        ff.load(RT, tmp_path / "c", only="list/1")
    with pytest.raises(CheckpointError, match=r"selects nothing.*model/params/0.weight"):
        ff.load(RT, tmp_path / "c", only="modell")

    ff.save(RT, tmp_path / "part", tree, only=lambda path: path.endswith("bias") or path == "epoch")
    entries = [entry.path for entry in ff.inspect_checkpoint(tmp_path / "part").entries]
    assert entries[:3] == ["model/params/0.bias", "model/params/1.bias", "model/params/2.bias"]
    assert entries[-1] == "epoch"
    with pytest.raises(CheckpointError, match="one element of a list"):
        ff.save(RT, tmp_path / "no", tree, only="list/0")
    assert not (tmp_path / "no").exists()


def test_a_part_reads_only_its_own_bytes(tmp_path):
    ff.save(RT, tmp_path / "c", {"a": torch.ones(3), "b": torch.zeros(3)})
    file = tmp_path / "c/data/r00000-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert ff.load(RT, tmp_path / "c", only="a")["a"].tolist() == [1, 1, 1]
    assert ff.load(RT, tmp_path / "c", {"a": torch.zeros(3)})["a"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match=r"r00000-000.safetensors is damaged.*'b'"):
        ff.load(RT, tmp_path / "c")


def test_every_pattern_of_only_selects_something(tmp_path):
    ff.save(RT, tmp_path / "c", {"a": 1, "b": {"x": 2}})
    like = {"a": 0, "b": {"x": 0}, "new": 0}
    assert ff.load(RT, tmp_path / "c", like, only=["a", "b/*"]) == {"a": 1, "b": {"x": 2}, "new": 0}
    assert ff.load(RT, tmp_path / "c", like, only=lambda path: path == "b/x") == {"a": 0, "b": {"x": 2}, "new": 0}
    with pytest.raises(CheckpointError, match="'aa' selects nothing"):
        ff.load(RT, tmp_path / "c", like, only=("a", "aa"))
    with pytest.raises(CheckpointError, match="new: is in the template, not in the checkpoint"):
        ff.load(RT, tmp_path / "c", like, only=("a", "new"))
    with pytest.raises(CheckpointError, match="'aa'.* selects nothing"):
        ff.save(RT, tmp_path / "d", like, only=("a", "aa"))
