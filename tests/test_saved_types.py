"""What a saved tree may hold: dataclasses, named tuples and mappings come back; other objects are refused by name."""

import collections
import dataclasses
import enum
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.errors import CheckpointError
from tests.support.checkpoints import bits
from tests.support.runtimes import RT


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
