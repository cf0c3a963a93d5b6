"""Types of the caller: a pair of functions takes values apart and puts them together, on every rank."""

import collections
import dataclasses
import enum

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import fabricfn as ff
from fabricfn.testing import threads
from tests.support.runtimes import RT


class Vocabulary:
    def __init__(self, words, table, inner=None):
        self.words, self.table, self.inner = words, table, inner


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def parts(value):
    return {"words": list(value.words), "table": value.table, "inner": value.inner}


def whole(like, tree):
    assert like is None or type(like) is Vocabulary
    return Vocabulary(tree["words"], tree["table"], tree["inner"])


VOCABULARY = ff.CheckpointType(cls=Vocabulary, to_tree=parts, from_tree=whole, tag="vocabulary-1")
COLOUR = ff.CheckpointType(
    cls=Colour, to_tree=lambda value: {"name": value.name}, from_tree=lambda like, tree: Colour[tree["name"]]
)
TYPES = (VOCABULARY, COLOUR)


def test_values_come_back_whatever_their_size(tmp_path):
    inner = Vocabulary(["x"], torch.ones(1), Colour.BLUE)
    tree = {"v": [Vocabulary(["a", "b"], torch.arange(2.0), inner)], "c": Colour.RED, "cursor": ff.Cursor(epoch=2)}
    ff.save(RT, tmp_path / "c", tree, types=TYPES)
    template = {"v": [Vocabulary([], torch.empty(0))], "c": Colour.BLUE, "cursor": ff.Cursor()}
    for like in (template, {"v": None, "c": None}, None):
        loaded = ff.load(RT, tmp_path / "c", like, types=TYPES)
        found = loaded["v"][0]
        assert (found.words, found.table.tolist(), loaded["c"]) == (["a", "b"], [0.0, 1.0], Colour.RED)
        assert (found.inner.words, found.inner.inner) == (["x"], Colour.BLUE)
    plain = ff.load(RT, tmp_path / "c")
    assert plain["c"] == {"name": "RED"}
    assert plain["v"][0]["inner"]["inner"] == {"name": "BLUE"}
    text = (tmp_path / "c/manifest.json").read_text()
    assert "vocabulary-1" in text
    assert "Vocabulary" not in text
    assert __name__ not in text


def test_without_types_the_message_names_the_way(tmp_path):
    with pytest.raises(ff.CheckpointError, match=r"v: a Vocabulary cannot be stored.*types=\[ff.CheckpointType\(cls="):
        ff.save(RT, tmp_path / "c", {"v": Vocabulary([], torch.ones(1))})
    ff.save(RT, tmp_path / "c", {"v": Vocabulary([], torch.ones(1))}, types=TYPES)
    with pytest.raises(ff.CheckpointError, match=r"v: a Vocabulary cannot be stored.*types="):
        ff.load(RT, tmp_path / "c", {"v": Vocabulary([], torch.ones(1))})


def test_parts_aliases_and_donation(tmp_path):
    shared = torch.ones(1000)
    ff.save(RT, tmp_path / "c", {"v": Vocabulary(["a"], shared), "tied": shared, "n": 3}, types=TYPES)
    assert (tmp_path / "c/data/r00000-000.safetensors").stat().st_size < 5000
    table = torch.zeros(1000)
    like = {"v": Vocabulary(["z"], table), "n": 0}
    loaded = ff.load(RT, tmp_path / "c", like, types=TYPES, donate=True)
    assert loaded["v"].table is table
    assert table.sum() == 1000
    part = ff.load(RT, tmp_path / "c", like, types=TYPES, only="v/words")
    assert (part["v"].words, part["v"].table is table, part["n"]) == (["a"], True, 0)
    kept = ff.load(RT, tmp_path / "c", like, types=TYPES, only="n")
    assert kept["v"] is like["v"]
    moved = ff.load(RT, tmp_path / "c", {"w": like["v"]}, types=TYPES, rename={"v": "w"})
    assert moved["w"].words == ["a"]
    plain = ff.load(RT, tmp_path / "c", types=TYPES)
    assert plain["v"].table is plain["tied"]


def test_types_of_others_and_dataclasses_may_have_their_own_way(tmp_path):
    @dataclasses.dataclass
    class Cached:
        size: int
        lock: object = dataclasses.field(default_factory=object)

    queue = ff.CheckpointType(
        cls=collections.deque,
        to_tree=lambda value: {"items": list(value), "maxlen": value.maxlen},
        from_tree=lambda like, tree: collections.deque(tree["items"], tree["maxlen"]),
    )
    cached = ff.CheckpointType(
        cls=Cached, to_tree=lambda value: {"size": value.size}, from_tree=lambda like, tree: Cached(**tree)
    )
    tree = {"q": collections.deque([1, Cached(4)], 5)}
    ff.save(RT, tmp_path / "c", tree, types=[queue, cached])
    loaded = ff.load(RT, tmp_path / "c", {"q": collections.deque()}, types=[queue, cached])["q"]
    assert (loaded.maxlen, loaded[0], loaded[1].size) == (5, 1, 4)


def other(**changes):
    return dataclasses.replace(VOCABULARY, **changes)


@pytest.mark.parametrize(
    ("types", "text"),
    [
        ([VOCABULARY, other(cls=Colour)], "the tag 'vocabulary-1' of Colour is taken by Vocabulary"),
        ([VOCABULARY, other(tag="x")], "two entries for the class Vocabulary"),
        ([other(tag="Model")], "the tag 'Model' of Vocabulary is taken by Model"),
        ([other(cls=dict)], "a checkpoint holds every dict as it is"),
        ([other(cls=ff.Model)], "a checkpoint holds every Model as it is"),
        ([Vocabulary], "this is a type"),
    ],
)
def test_types_that_contradict_each_other_are_refused(tmp_path, types, text):
    ff.save(RT, tmp_path / "c", {"a": 1})
    with pytest.raises(ff.errors.ConfigurationError, match=text):
        ff.save(RT, tmp_path / "d", {"a": 1}, types=types)
    with pytest.raises(ff.errors.ConfigurationError, match=text):
        ff.load(RT, tmp_path / "c", types=types)


def fail(*args):
    raise KeyError("oh")


def try_types(rt, path, case):
    """What every rank is told."""
    good = {"v": Vocabulary(["a"], torch.ones(2))}
    change = {
        "list": {"to_tree": lambda value: [1]},
        "to_tree": {"to_tree": fail if rt.rank else parts},
        "from_tree": {"from_tree": fail if rt.rank else whole},
        "key": {"to_tree": lambda value: {1.5: 2}},
        "leaf": {"to_tree": lambda value: {"x": {1}}},
    }[case]
    changed = [dataclasses.replace(VOCABULARY, **change)]
    try:
        if case == "from_tree":
            ff.save(rt, path, good, types=TYPES)
            ff.load(rt, path, good, types=changed)
        else:
            ff.save(rt, path, good, types=changed)
    except ff.FabricfnError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("list", "v: to_tree of the type 'vocabulary-1' (this is a Vocabulary) returned a list; it returns a dict"),
        (
            "to_tree",
            "rank 1: CheckpointError: v: to_tree of the type 'vocabulary-1' (this is a Vocabulary) raised KeyErr",
        ),
        ("from_tree", "rank 1: CheckpointError: v: from_tree of the type 'vocabulary-1' raised KeyError: 'oh'"),
        ("key", "v has the key 1.5"),
        ("leaf", "v/x: a set cannot be stored"),
    ],
)
def test_functions_that_fail_are_errors_on_every_rank(tmp_path, case, text):
    with threads(2) as world:
        assert all(text in message for message in world.run(try_types, tmp_path / "c", case))


def sharded(rt, value):
    mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
    return distribute_tensor(value, mesh, (Shard(0),), src_data_rank=None)


def reload_shards(rt, path, donate):
    ff.save(rt, path, {"v": Vocabulary(["a"], sharded(rt, torch.arange(6.0)))}, types=TYPES)
    like = {"v": Vocabulary([], sharded(rt, torch.zeros(6)))}
    found = ff.load(rt, path, like, types=TYPES, donate=donate)["v"].table
    return found._spec == like["v"].table._spec, (found is like["v"].table) == donate, found.to_local().tolist()


@pytest.mark.parametrize("donate", [False, True])
def test_sharded_tensors_in_them_stay_sharded(tmp_path, donate):
    with threads(2) as world:
        found = world.run(reload_shards, tmp_path / "c", donate)
    assert found == [(True, True, [0, 1, 2]), (True, True, [3, 4, 5])]
    assert ff.load(RT, tmp_path / "c", types=TYPES)["v"].table.tolist() == [0, 1, 2, 3, 4, 5]
