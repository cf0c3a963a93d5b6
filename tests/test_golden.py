"""A checkpoint that was written in 2026 loads for ever, bit for bit; one of a newer format is refused by name."""

import dataclasses
import hashlib
import importlib.util
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fabricfn as ff
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.support.runtimes import RT

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")

FOLDER = Path(__file__).parent / "golden"
V1 = FOLDER / "v1"

spec = importlib.util.spec_from_file_location("make_v1", FOLDER / "make_v1.py")
formulas = importlib.util.module_from_spec(spec)
sys.modules["make_v1"] = formulas
spec.loader.exec_module(formulas)


def same(found, expected):
    """The same classes, structure and bits."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        row = [value.contiguous().as_strided((value.numel(),), (1,)).view(torch.uint8) for value in (found, expected)]
        assert torch.equal(*row)
    elif isinstance(expected, np.ndarray | np.generic):
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    elif dataclasses.is_dataclass(expected):
        same(vars(found), vars(expected))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, float):
        assert found.hex() == expected.hex()
        assert math.copysign(1, found) == math.copysign(1, expected)
    else:
        assert found == expected


def blank(tree):
    """The same structure with other values."""
    return ff.tree_map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def test_the_files_are_those_of_2026():
    """Whoever changes the format keeps them, and adds a folder for the new version."""
    digest = hashlib.sha256()
    for file in ("manifest.json", "data/r00000-000.safetensors", "data/r00001-000.safetensors"):
        digest.update((V1 / file).read_bytes())
    assert digest.hexdigest() == "35a6cd3a8a6c40e069acdd8b7a7f70ec38be1545647ca5e13b6845c5eb2cf406"
    assert ff.verify_checkpoint(V1).world_size == 2


@pytest.mark.parametrize("part", list(formulas.plain_part()))
def test_every_kind_of_value_comes_back(part):
    expected = formulas.plain_part()[part]
    like = formulas.plain_part()[part]
    same(ff.load(RT, V1, {part: blank(like)}, only=part)[part], expected)


def test_plain_containers_come_back_without_a_template():
    tree = ff.load(RT, V1)
    expected = formulas.plain_part()
    for part in ("dtypes", "shapes", "alias", "numpy", "plain", "keyed"):
        same(tree[part], expected[part])
    assert tree["alias"]["one"] is tree["alias"]["two"][0]
    assert tree["pair"]["second"] == 3
    for name in ("rows", "columns", "copy"):
        assert torch.equal(tree["sharded"][name], torch.arange(15.0).reshape(5, 3) / 4)


def test_records_come_back():
    class Blank(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 2)
            self.register_buffer("seen", torch.tensor(0))

    model = ff.setup_model(RT, Blank())
    groups = {"*bias": {"eps": 1.0}}
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=5.0, groups=groups)
    scaled = dataclasses.replace(model, loss_scale=ff.LossScale(scale=1.0))
    x = torch.zeros(1, 3)
    grads = ff.value_and_grad(RT, lambda net, x: net.lin(x).sum())(model, x)[1]
    like = {"model": ff.eval_mode(model), "scaled": scaled, "grads": grads, "opt": opt, "cursor": ff.Cursor(),
            "key": ff.key(0)}  # fmt: skip
    found = ff.load(RT, V1, {"records": like})["records"]
    for name in ("model", "scaled"):
        same(dict(found[name].params), {"lin.weight": torch.arange(6.0).reshape(2, 3) / 4,
                                        "lin.bias": torch.tensor([-0.0, -0.25])})  # fmt: skip
        same(dict(found[name].buffers), {"seen": torch.tensor(9)})
        assert found[name].training == {"", "lin"}
    assert found["scaled"].loss_scale == ff.LossScale(scale=1024.0, good_steps=3)
    x = torch.tensor([1.0, 2.0, 4.0])
    weight, bias = x.expand(2, 3), torch.ones(2)
    same(dict(found["grads"].params), {"lin.weight": weight.contiguous(), "lin.bias": bias})
    moments = {"lin.weight": (weight / 2, weight * weight / 2), "lin.bias": (bias / 2, bias / 2)}
    for name, (first, second) in moments.items():
        row = found["opt"].state[name]
        same([row["step"], row["exp_avg"], row["exp_avg_sq"]], [torch.tensor(1.0), first, second])
    assert found["opt"].step == 1
    assert [(group["lr"], group["betas"], group["eps"]) for group in found["opt"].hyperparams] == [
        (0.0, (0.5, 0.5), 1e-3), (0.0, (0.5, 0.5), 1e-8),
    ]  # fmt: skip
    assert found["cursor"] == ff.Cursor(seed=3, epoch=4, index=5)
    assert found["key"] == ff.Key(bits=1885866437747336470)


def load_cut(rt):
    mesh = DeviceMesh.from_group(rt.world.group, "cpu")
    whole = torch.arange(15.0).reshape(5, 3) / 4
    for name in ("rows", "columns", "copy"):
        for kind in (Shard(0), Shard(1), Replicate()):
            like = distribute_tensor(torch.zeros(5, 3), mesh, [kind], src_data_rank=None)
            found = ff.load(rt, V1, {"sharded": {name: like}})["sharded"][name]
            expected = distribute_tensor(whole, mesh, [kind], src_data_rank=None)
            assert torch.equal(found.to_local(), expected.to_local())


def test_what_two_ranks_cut_comes_back_in_any_cut():
    with threads(3) as world:
        world.run(load_cut)


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_version_is_refused_by_name(tmp_path, version):
    shutil.copytree(V1, tmp_path / "v")
    path = tmp_path / "v" / "manifest.json"
    text = {2: b"2", 0: b"0", "1": b'"1"', None: b"null"}[version]
    body = path.read_bytes().rpartition(b',\n"sha256"')[0].replace(b'"version":1', b'"version":' + text, 1)
    path.write_bytes(body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode())
    for call in (lambda: ff.load(RT, tmp_path / "v"), lambda: ff.verify_checkpoint(tmp_path / "v")):
        with pytest.raises(CheckpointError, match=rf"format version {version!r}, this fabricfn reads version 1.*newer"):
            call()
