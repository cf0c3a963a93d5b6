"""Loading: what the template decides, parts, other names; all misfits in one error."""

import collections
import dataclasses
import enum
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import fabricfn as ff
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.checkpoints import bits, trained

RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())


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


def test_what_cannot_be_stored_is_named_with_what_to_write(tmp_path):
    loop = []
    loop.append(loop)
    cases = {
        "module": (nn.Linear(1, 1), r"module.state_dict\(\)"),
        "set": ({1}, r"sorted\(value\)"),
        "path": (Path("x"), r"str\(path\)"),
        "sparse": (torch.eye(2).to_sparse(), r"to_dense"),
        "meta": (torch.ones(1, device="meta"), "no values"),
        "generator": (torch.Generator(), "get_state"),
        "text": (np.array(["a"]), "numpy"),
        "swapped": (np.arange(3, dtype=">f4"), "astype"),
        "key": ({1.5: 2}, r"str\(key\)"),
        "loop": (loop, "deeper than"),
    }
    for name, (value, advice) in cases.items():
        with pytest.raises(CheckpointError, match=rf"in/{name}(?s:.*){advice}"):
            ff.save(RT, tmp_path / "c", {"in": {name: value}})
    with pytest.raises(CheckpointError, match=r"(?s)x/module: .*x/set: "):
        ff.save(RT, tmp_path / "c", {"x": {"module": cases["module"][0], "ok": 1, "set": {1}}})
    assert os.listdir(tmp_path) == []


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


# ---------------------------------------------------------------- what a tree may hold


class Meter:
    pass


@dataclasses.dataclass
class Derived:
    """Its fields are not those that it was made of."""

    scale: dataclasses.InitVar[float]
    weights: torch.Tensor
    total: float = dataclasses.field(init=False, default=0.0)
    squares: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self, scale):
        self.weights = self.weights * scale
        self.squares = self.weights**2


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    inner: object
    key: ff.Key

    def __post_init__(self):
        object.__setattr__(self, "inner", [self.inner])  # twice would be wrong


class Named(collections.namedtuple("Named", "first second")):
    __slots__ = ()

    def __new__(cls, both):
        return super().__new__(cls, both, both)


def test_dataclasses_and_named_tuples_come_back_field_for_field(tmp_path):
    derived = Derived(2.0, torch.arange(3.0))
    derived.total = 7.5
    tree = {"d": derived, "f": Frozen(Frozen(derived, ff.key(1)), ff.key(2)), "n": Named(torch.ones(2))}
    ff.save(RT, tmp_path / "c", tree)
    like = {
        "d": Derived(1.0, torch.zeros(3)),
        "f": Frozen(Frozen(Derived(1.0, torch.zeros(3)), ff.key(0)), ff.key(0)),
        "n": Named(torch.zeros(2)),
    }
    before = bits(like)
    loaded = ff.load(RT, tmp_path / "c", like)
    assert bits(loaded) == bits(tree)
    assert bits(like) == before
    assert loaded["d"].total == 7.5
    assert loaded["f"].inner[0].key == ff.key(1)
    filled = ff.load(RT, tmp_path / "c", like, donate=True)
    assert bits(filled) == bits(tree)
    assert filled["d"].squares is like["d"].squares


def test_mappings_keep_their_class(tmp_path):
    tree = {
        "ordered": collections.OrderedDict(a=1, b=torch.ones(1)),
        "default": collections.defaultdict(list, {3: [1]}),
        "counter": collections.Counter(a=2, b=1),
        "frozen": types.MappingProxyType({"x": None}),
    }
    ff.save(RT, tmp_path / "c", tree)
    like = {
        "ordered": collections.OrderedDict(a=0, b=torch.zeros(1)),
        "default": collections.defaultdict(list, {3: [0]}),
        "counter": collections.Counter(a=5, b=5),
        "frozen": types.MappingProxyType({"x": None}),
    }
    loaded = ff.load(RT, tmp_path / "c", like)
    assert bits(loaded) == bits(tree)
    assert loaded["default"]["new"] == []


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (Colour.RED, r"a Colour cannot be stored. Write value.name"),
        (Path("x"), r"Write str\(path\)"),
        (torch.Size([2]), r"tuple\(value\)"),
        (collections.deque([1]), r"CheckpointType\(cls="),
        (Meter(), r"CheckpointType\(cls="),
    ],
)
def test_other_objects_are_refused_by_name(tmp_path, value, advice):
    with pytest.raises(CheckpointError, match=rf"a/0: .*{advice}"):
        ff.save(RT, tmp_path / "c", {"a": [value]})


# ---------------------------------------------------------------- other names


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
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
