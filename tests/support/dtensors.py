"""What the tests of sharded values share: a model and gradients in parts, and its training. The oracle is `single`."""

import dataclasses
from types import MappingProxyType

import torch
from torch import nn, optim
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fabricfn as ff
from fabricfn.sharding import full, is_sharded
from tests.support.runtimes import RT, RT64

# 3 rows on 4 ranks: an empty part; "one" lies on one rank; "plain" is not sharded at all
SHAPES = {"w": (3, 4), "plain": (2, 2), "tall": (37, 5), "one": (1,), "deep": (2, 5, 2)}


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        for name, value in numbers(0, dtype).items():
            setattr(self, name, nn.Parameter(value))


def numbers(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def line(rt):
    return DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))


def split(mesh, values):
    """Each tensor placed: the last along its second dimension, one not at all; on a 2-D mesh replicated and sharded."""
    out = {}
    for name, value in values.items():
        at = [*[Replicate()] * (mesh.ndim - 1), Shard(1 if name == "deep" else 0)]
        out[name] = (
            value if name == "plain" or value is None else distribute_tensor(value, mesh, at, src_data_rank=None)
        )
    return out


def setup(mesh=None, dtype=torch.float64):
    model = ff.setup_model(RT64 if dtype == torch.float64 else RT, Net(dtype))
    return model if mesh is None else dataclasses.replace(model, params=split(mesh, model.params))


def grads_of(model, values, mesh=None):
    placed = values if mesh is None else split(mesh, values)
    return ff.Grads(params=MappingProxyType(placed), ref=model.ref)


def train(opt, options, mesh=None, dtype=torch.float64, donate=False, steps=4):
    """Values and state after some steps, the last but one without a gradient for "w", the last with another rate."""
    model = setup(mesh, dtype)
    state = ff.setup_optimizer(RT64, model, opt, **options)
    for step in range(steps):
        values = numbers(step + 1, dtype)
        if step == 2:
            values["w"] = None
        overrides = {"lr": 0.05} if step == 3 and "lr" in (state.hyperparams or [{}])[0] else {}
        grads = grads_of(model, values, mesh)
        model, state = ff.optimizer_step(RT64, model, state, grads, donate=donate, **overrides)
    for name, value in model.params.items():
        assert is_sharded(value) is (mesh is not None and name != "plain")
    return model.params, state


def whole(tree):
    return ff.tree_map(lambda leaf: full(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def assert_equal(found, expected, exact=True):
    found, expected = whole(dict(found)), dict(expected)
    assert set(found) == set(expected)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    if not exact and all(value.dtype == torch.float64 for value in ff.tree_map(lambda x: x, list(expected.values()))):
        tolerance = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(found, expected, **tolerance)


EXACT = {
    "adamw": (optim.AdamW, {"fused": False, "lr": 0.1}),
    "sgd": (optim.SGD, {"fused": False, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "plain sgd": (optim.SGD, {"lr": 0.1}),
    "rmsprop": (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "nadam": (optim.NAdam, {}),
    "radam": (optim.RAdam, {"weight_decay": 0.1}),
    "adamax": (optim.Adamax, {}),
    "adadelta": (optim.Adadelta, {}),
    "asgd": (optim.ASGD, {}),
    "rprop": (optim.Rprop, {}),
    "two groups": (optim.NAdam, {"groups": {"*e*": {"weight_decay": 0.1}}}),
    "a part": (optim.RMSprop, {"params": ["w", "plain"]}),
}
FUSED = {
    "adamw": (optim.AdamW, {"lr": 0.1}),
    "adam": (optim.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "two groups": (optim.AdamW, {"groups": {"*e*": {"weight_decay": 0.3}}}),
    "a part": (optim.AdamW, {"params": "[wt]*"}),
}


def trains_as_single(rt, opt, options, dtype, exact):
    expected, state = train(opt, options, None, dtype)
    shown = whole(state.state)
    for donate in (False, True):
        params, mine = train(opt, options, line(rt), dtype, donate)
        assert_equal(params, expected, exact)
        assert {name: set(row) for name, row in mine.state.items()} == {n: set(r) for n, r in shown.items()}
        for name, row in mine.state.items():
            for slot, value in row.items():
                counter = slot in ("step", "mu_product", "eta", "mu")
                assert is_sharded(value) is (name != "plain" and not counter), (name, slot)
            assert_equal(row, shown[name], exact)
    return True
