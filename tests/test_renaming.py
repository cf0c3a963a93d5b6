"""Loading under other names: a renamed checkpoint is one that was saved so, to the bit and in the bytes read."""

import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import fabricfn as ff
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.support.checkpoints import bits
from tests.support.runtimes import RT


class Net(nn.Module):
    def __init__(self, body, head):
        super().__init__()
        setattr(self, body, nn.Linear(3, 4))
        setattr(self, head, nn.Linear(4, 2))
        self.names = body, head

    def forward(self, x):
        body, head = (getattr(self, name) for name in self.names)
        return head(body(x))


def stepped(rt, body, head, steps, state=None):
    """Adam's slots appear with the first step."""
    if state is None:
        torch.manual_seed(0)
        model = ff.setup_model(rt, Net(body, head))
        state = model, ff.setup_optimizer(rt, model, torch.optim.Adam, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())
    for _ in range(steps):
        _, grads = grad_fn(state[0], torch.ones(5, 3, dtype=rt.precision.param_dtype))
        state = ff.optimizer_step(rt, *state, grads)
    return state


RENAMED_LAYER = {"model/params/encoder.*": "model/params/backbone.*", "opt/state/encoder.*": "opt/state/backbone.*"}


@pytest.mark.parametrize("rename", [RENAMED_LAYER, lambda path: path.replace("encoder.", "backbone."),
                                    {"*/encoder.*": "*/backbone.*"}])  # fmt: skip
@pytest.mark.parametrize("donate", [False, True])
def test_a_layer_that_was_renamed_goes_on_to_the_bit(tmp_path, rename, donate):
    model, opt = stepped(RT, "encoder", "head", 2)
    ff.save(RT, tmp_path / "c", {"model": model, "opt": opt})
    fresh = stepped(RT, "backbone", "head", 0)
    like = {"model": fresh[0], "opt": fresh[1]}
    loaded = ff.load(RT, tmp_path / "c", like, rename=rename, donate=donate)
    after = stepped(RT, "", "", 2, (loaded["model"], loaded["opt"]))
    straight = stepped(RT, "encoder", "head", 4)
    assert list(after[0].params) == ["backbone.weight", "backbone.bias", "head.weight", "head.bias"]
    assert bits(list(after[0].params.values())) == bits(list(straight[0].params.values()))


def test_a_part_of_a_pretraining_checkpoint_goes_into_a_classifier(tmp_path):
    pretrained, _ = stepped(RT, "encoder", "decoder", 1)
    classifier, _ = stepped(RT, "backbone", "classes", 0)
    ff.save(RT, tmp_path / "c", {"pretrained": pretrained, "big": torch.ones(1000)})
    rename = {"pretrained/params/encoder.*": "model/params/backbone.*"}
    only = ("model/params/backbone.*",)
    like = {"model": classifier, "epoch": 3}
    loaded = ff.load(RT, tmp_path / "c", like, rename=rename, only=only)
    params = loaded["model"].params
    assert bits(params["backbone.weight"]) == bits(pretrained.params["encoder.weight"])
    assert params["classes.weight"] is classifier.params["classes.weight"]
    assert loaded["epoch"] == 3
    with pytest.raises(
        CheckpointError, match=r"model/params/classes.weight: is in the template, not in the checkpoint"
    ):
        ff.load(RT, tmp_path / "c", like, rename=rename)
    found = ff.load(RT, tmp_path / "c", like, rename=rename, strict=False)
    assert "model/params/classes.bias" in found.missing
    assert set(found.rest) == {"pretrained", "big"}
    assert set(found.rest["pretrained"]["params"]) == {"decoder.weight", "decoder.bias"}


def test_a_plain_state_dict_becomes_a_model(tmp_path):
    """The new containers are what the template has there; integers and slashes in keys stay."""
    model, _ = stepped(RT, "body", "head", 1)
    ff.save(RT, tmp_path / "c", {**model.params, "x": {"a/b": {7: 1.5}}, "l": [1, 2]})
    fresh, _ = stepped(RT, "body", "head", 0)
    like = {"net": {"deep": fresh}, "y": {"a/b": {7: 0.0}}, "l": [0, 0]}
    rename = {"*.weight": "net/deep/params/*.weight", "*.bias": "net/deep/params/*.bias", "x": "y"}
    loaded = ff.load(RT, tmp_path / "c", like, rename=rename, only=("net/deep/params", "y", "l"))
    assert bits(loaded["net"]["deep"].params) == bits(model.params)
    assert (loaded["y"], loaded["l"]) == (like["y"] | {"a/b": {7: 1.5}}, [1, 2])
    assert list(ff.load(RT, tmp_path / "c", rename=rename)["net"]["deep"]["params"]) == list(model.params)
    by_function = ff.load(RT, tmp_path / "c", only="y", rename=lambda path: path.replace("x/", "y/"))
    assert by_function == {"y": {"a/b": {7: 1.5}}}
    swapped = ff.load(RT, tmp_path / "c", {"l": [0, 0]}, rename={"l/0": "l/1", "l/1": "l/0"})
    assert swapped == {"l": [2, 1]}
    moved = {"l": [0, 0, 0.0]}
    assert ff.load(RT, tmp_path / "c", moved, rename={"x/a/b/7": "l/2"}) == {"l": [1, 2, 1.5]}


def test_a_bare_state_dict_becomes_a_model_by_one_pattern(tmp_path):
    model, _ = stepped(RT, "body", "head", 1)
    ff.save(RT, tmp_path / "c", ff.to_module(RT, model).state_dict())
    fresh, _ = stepped(RT, "body", "head", 0)
    loaded = ff.load(RT, tmp_path / "c", {"model": fresh}, rename={"*": "model/params/*"}, only="model/params")
    assert bits(loaded["model"].params) == bits(model.params)


def test_what_bears_the_new_name_gives_way(tmp_path):
    """The average that was kept beside the model is loaded as the model, with nothing of the model's own."""
    (model, _), (ema, _) = stepped(RT, "a", "b", 1), stepped(RT, "a", "b", 3)
    ff.save(RT, tmp_path / "c", {"model": model, "ema": ff.eval_mode(ema)})
    loaded = ff.load(RT, tmp_path / "c", {"model": model}, rename={"ema": "model"})
    assert bits(loaded["model"].params) == bits(ema.params)
    assert loaded["model"].training == frozenset()
    both = ff.load(RT, tmp_path / "c", {"model": model, "ema": ema}, rename={"ema": "model", "model": "ema"})
    assert bits(both["ema"].params) == bits(model.params)
    assert bits(both["model"].params) == bits(ema.params)


@pytest.mark.parametrize(
    ("rename", "text"),
    [
        ({"modell": "net"}, r"'modell' fits no entry of the checkpoint; these are a/x, a/y, b, l/0, l/1"),
        ({"a/*": "b/*", "a/x": "z"}, r"a/x would become b/x \(by 'a/\*'\) and z \(by 'a/x'\)"),
        ({"a/x": "z", "a/y": "z"}, r"a/x and a/y would both become z"),
        ({"a/x": "b/x", "b": "b"}, r"a/x would become b/x, inside of b, which is no container"),
        ({"a/*": "b"}, r"both are paths with the same number of \*"),
        ({"a/x": ""}, r"both are paths"),
        ({"l/0": "z"}, r"leaves the list l with the places 1; lists have no holes"),
        ({"a": 3}, r"maps paths to paths"),
        (lambda path: None, r"returned None for 'a/x'"),
        (lambda path: path[9], r"raised IndexError for 'a/x'"),
        (lambda path: "same", r"a/x and a/y would both become same"),
    ],
)  # fmt: skip
def test_renames_that_cannot_be_done_are_named(tmp_path, rename, text):
    ff.save(RT, tmp_path / "c", {"a": {"x": 1, "y": 2}, "b": 3, "l": [4, 5]})
    with pytest.raises(CheckpointError, match=text):
        ff.load(RT, tmp_path / "c", rename=rename)


PARTS = st.sampled_from(["a", "b", "a.b", "0", "c"])
TREES = st.recursive(
    st.integers(), lambda inner: st.one_of(st.dictionaries(PARTS, inner, max_size=3), st.lists(inner, max_size=2)),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(PARTS, TREES, min_size=1, max_size=4), st.permutations(["a", "b", "a.b", "0", "c"]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_renamed_checkpoint_is_one_that_was_saved_so(tmp_path, tree, names):
    """Law: load(rename=r) of save(x) is load of save(r(x))."""
    new = dict(zip(["a", "b", "a.b", "0", "c"], names, strict=True))
    expected = {new[key]: value for key, value in tree.items()}
    ff.save(RT, tmp_path / "c", tree)
    rename = {key: new[key] for key in tree}
    assert ff.load(RT, tmp_path / "c", rename=rename) == expected
    assert ff.load(RT, tmp_path / "c", expected, rename=rename) == expected
    shutil.rmtree(tmp_path / "c")


def bytes_read(monkeypatch, load):
    """What `load` reads of the data files, by position."""
    found = [0]

    def counted(fd, buffers, offset):
        count = real(fd, buffers, offset)
        found[0] += count
        return count

    real = os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        load()
    return found[0]


def test_a_renamed_part_reads_only_its_own_bytes(tmp_path, monkeypatch):
    ff.save(RT, tmp_path / "c", {"old": torch.ones(1000), "big": torch.ones(50_000), "more": [torch.ones(9000)]})
    like = {"new": torch.zeros(1000), "big": torch.zeros(50_000)}

    def load():
        found = ff.load(RT, tmp_path / "c", like, rename={"old": "new"}, only="new")
        assert found["new"].sum() == 1000
        assert found["big"] is like["big"]

    assert bytes_read(monkeypatch, load) == 4000


def sharded(rt, value):
    mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
    return distribute_tensor(value, mesh, (Shard(0),), src_data_rank=None)


def load_shards(rt, path):
    ff.save(rt, path, {"old": sharded(rt, torch.arange(4000.0)), "big": torch.ones(50_000)})
    like = {"new": sharded(rt, torch.zeros(4000))}
    loaded = ff.load(rt, path, like, rename={"old": "new"}, donate=True)
    return loaded["new"] is like["new"], loaded["new"].to_local().sum().item(), loaded["new"]._spec == like["new"]._spec


def test_renamed_shards_are_read_by_their_ranks(tmp_path, monkeypatch):
    expected = [torch.arange(2000.0).sum().item(), torch.arange(2000.0, 4000).sum().item()]
    with threads(2) as world:
        found = []
        read = bytes_read(monkeypatch, lambda: found.extend(world.run(load_shards, tmp_path / "c")))
    assert found == [(True, sum, True) for sum in expected]
    assert read == 16_000
