"""Clipping: the numbers of torch.nn.utils, on records."""

import dataclasses
import math
from types import MappingProxyType

import optree
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import fabricfn as ff
from fabricfn.errors import ConfigurationError, DonatedError, GradientError
from tests.support.runtimes import RT64

SHAPES = {"a": (3, 4), "b": (5,), "c": (), "d": (2, 2)}
REF = ff.setup_model(RT64, nn.Linear(2, 2)).ref


def make(seed=0, scale=3.0, missing=(), buffers=None):
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: None if name in missing else scale * torch.randn(shape, dtype=torch.float64, generator=generator)
        for name, shape in SHAPES.items()
    }
    return ff.Grads(params=MappingProxyType(params), ref=REF, new_buffers=buffers)


def as_torch(grads):
    params = []
    for grad in grads.params.values():
        if grad is not None:
            params.append(nn.Parameter(torch.zeros_like(grad)))
            params[-1].grad = grad.clone()
    return params


def same(grads, params):
    found = [grad for grad in grads.params.values() if grad is not None]
    for mine, param in zip(found, params, strict=True):
        assert torch.equal(mine, param.grad)


@pytest.mark.parametrize("norm_type", [2.0, 1, 3.5, "inf", math.inf, 0.5])
@pytest.mark.parametrize("max_norm", [0.7, 1e6, 0])
@pytest.mark.parametrize("donate", [False, True])
def test_by_norm_as_torch(norm_type, max_norm, donate):
    grads = make(missing=("b",))
    params = as_torch(grads)
    expected = nn.utils.clip_grad_norm_(params, max_norm, norm_type=norm_type)
    clipped, norm = ff.clip_gradients(RT64, grads, max_norm=max_norm, norm_type=norm_type, donate=donate)
    assert norm.shape == ()
    assert torch.equal(norm, expected)
    assert clipped.params["b"] is None
    same(clipped, params)


@pytest.mark.parametrize("donate", [False, True])
def test_by_value_as_torch(donate):
    grads = make()
    params = as_torch(grads)
    norm_before = nn.utils.get_total_norm([param.grad for param in params])
    nn.utils.clip_grad_value_(params, 0.5)
    clipped, norm = ff.clip_gradients(RT64, grads, clip_val=0.5, donate=donate)
    same(clipped, params)
    assert torch.equal(norm, norm_before)


@settings(max_examples=50)
@given(st.integers(0, 2**30), st.floats(1e-3, 1e3), st.floats(0.1, 10), st.sampled_from([1.0, 2.0, 4.0, "inf"]))
def test_the_norm_afterwards_is_within_the_limit(seed, scale, max_norm, norm_type):
    grads = make(seed, scale)
    clipped, norm = ff.clip_gradients(RT64, grads, max_norm=max_norm, norm_type=norm_type)
    _, after = ff.clip_gradients(RT64, clipped, max_norm=max_norm, norm_type=norm_type)
    assert after <= max_norm * (1 + 1e-12)
    if norm < max_norm * 0.999:
        assert torch.allclose(after, norm)


def test_inputs_stay_as_they_are_and_buffers_ride_along():
    buffers = MappingProxyType({"mean": torch.ones(2)})
    grads = make(buffers=buffers)
    before = optree.tree_map(torch.clone, grads)
    clipped, _ = ff.clip_gradients(RT64, grads, max_norm=0.1)
    assert clipped.new_buffers is buffers
    assert clipped.ref is grads.ref
    for old, new in zip(before.params.values(), grads.params.values(), strict=True):
        assert torch.equal(old, new)
    ff.clip_gradients(RT64, grads, clip_val=0.1)
    for old, new in zip(before.params.values(), grads.params.values(), strict=True):
        assert torch.equal(old, new)


def test_one_norm_over_a_tree_of_gradients():
    tree = {"gen": make(1), "disc": [make(2)]}
    params = as_torch(tree["disc"][0]) + as_torch(tree["gen"])
    expected = nn.utils.clip_grad_norm_(params, 1.0)
    clipped, norm = ff.clip_gradients(RT64, tree, max_norm=1.0)
    torch.testing.assert_close(norm, expected)
    assert set(clipped) == {"gen", "disc"}
    total = sum(float(grad.square().sum()) for grad in optree.tree_leaves(clipped))
    assert total == pytest.approx(1.0, abs=1e-5)


def test_donated_gradients_are_spent():
    grads = make()
    tensors = dict(grads.params)
    clipped, _ = ff.clip_gradients(RT64, grads, max_norm=1.0, donate=True)
    assert all(clipped.params[name] is tensor for name, tensor in tensors.items())
    for use in (
        lambda: ff.clip_gradients(RT64, grads, max_norm=1.0),
        lambda: optree.tree_map(torch.clone, grads),
        lambda: ff.clip_gradients(RT64, dataclasses.replace(grads), max_norm=1.0),
    ):
        with pytest.raises(DonatedError, match=r"test_clipping\.py:\d+"):
            use()
    again, _ = ff.clip_gradients(RT64, clipped, max_norm=1.0, donate=True)
    ff.clip_gradients(RT64, again, max_norm=1.0)


def test_gradients_that_share_tensors_find_out_in_both_directions():
    grads = make(missing=("c",))
    alias = ff.tree_map(lambda tensor: tensor, grads)
    ff.clip_gradients(RT64, grads, max_norm=1.0, donate=True)
    with pytest.raises(DonatedError, match="shares tensors"):
        ff.clip_gradients(RT64, alias, max_norm=1.0)
    grads = make()
    alias = ff.tree_map(lambda tensor: tensor, grads)
    copied = ff.tree_map(torch.clone, grads)
    clipped, _ = ff.clip_gradients(RT64, alias, clip_val=1.0, donate=True)
    with pytest.raises(DonatedError, match="shares tensors"):
        ff.clip_gradients(RT64, grads, max_norm=1.0)
    ff.clip_gradients(RT64, copied, max_norm=1.0)
    ff.clip_gradients(RT64, ff.clip_gradients(RT64, clipped, max_norm=1.0, donate=True)[0], max_norm=1.0)


@pytest.mark.parametrize("limit", [{"max_norm": 0.1}, {"clip_val": 0.1}])
def test_gradients_in_one_memory_are_scaled_once(limit):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos, self.seg = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self):
            return self.pos.unsqueeze(0) + self.seg.unsqueeze(0)

    model = ff.setup_model(RT64, Sum().double())
    _, grads = ff.value_and_grad(RT64, lambda net: net().square().sum())(model)
    shared = torch.full((4,), 3.0, dtype=torch.float64)
    views = {"pos": shared, "seg": shared.unsqueeze(0)[0]}  # as AccumulateGrad keeps them
    overlapping = {"pos": shared, "seg": shared[1:]}
    for params in (dict(grads.params), views, overlapping):
        record = dataclasses.replace(grads, params=MappingProxyType(params), lease=type(grads.lease)())
        pure, norm = ff.clip_gradients(RT64, record, **limit)
        donated, donated_norm = ff.clip_gradients(RT64, record, **limit, donate=True)
        assert torch.equal(norm, donated_norm)
        for name, grad in pure.params.items():
            assert torch.equal(donated.params[name], grad)
        with pytest.raises(DonatedError, match=r"test_clipping\.py:\d+"):
            ff.clip_gradients(RT64, record, **limit)


def test_the_same_gradients_twice():
    grads = make()
    pure, _ = ff.clip_gradients(RT64, (grads, grads), max_norm=0.1)
    donated, _ = ff.clip_gradients(RT64, (grads, grads), max_norm=0.1, donate=True)
    for one, two in zip(optree.tree_leaves(pure), optree.tree_leaves(donated), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(DonatedError):
        ff.clip_gradients(RT64, grads, max_norm=0.1)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("limit", [{"max_norm": 0.1}, {"clip_val": 0.1}])
def test_a_sparse_gradient_is_refused_by_name(limit, donate):
    model = ff.setup_model(RT64, nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)).double())
    _, grads = ff.value_and_grad(RT64, lambda net, i: net(i).square().sum())(model, torch.tensor([1, 2]))
    with pytest.raises(GradientError, match=r"0\.weight is torch\.sparse_coo"):
        ff.clip_gradients(RT64, grads, **limit, donate=donate)
    dense = ff.tree_map(lambda grad: grad.to_dense() if grad.is_sparse else grad, grads)
    ff.clip_gradients(RT64, dense, **limit, donate=donate)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_gradients_are_named_on_request(bad):
    grads = make()
    grads.params["b"][2] = bad
    clipped, norm = ff.clip_gradients(RT64, grads, max_norm=1.0)
    assert not torch.isfinite(norm)
    with pytest.raises(GradientError, match=r"rank 0.*in b\)"):
        ff.clip_gradients(RT64, grads, max_norm=1.0, error_if_nonfinite=True, donate=True)
    ff.clip_gradients(RT64, grads, max_norm=1.0)  # nothing was given away
    huge = optree.tree_map(lambda grad: grad.float() * 0 + 1e38, make())
    with pytest.raises(GradientError, match="every number is"):
        ff.clip_gradients(RT64, huge, max_norm=1.0, error_if_nonfinite=True)
    ff.clip_gradients(RT64, make(), max_norm=1.0, error_if_nonfinite=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_norm": 1.0, "clip_val": 1.0},
        {"max_norm": -1.0},
        {"clip_val": -0.5},
        {"max_norm": math.nan},
        {"max_norm": 1.0, "norm_type": 0},
        {"max_norm": 1.0, "norm_type": "two"},
    ],
)
def test_limits_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigurationError):
        ff.clip_gradients(RT64, make(), **options)


def test_no_gradient_at_all():
    clipped, norm = ff.clip_gradients(RT64, make(missing=tuple(SHAPES)), max_norm=1.0)
    assert float(norm) == 0
    assert set(clipped.params.values()) == {None}


def test_something_else_than_gradients_is_refused():
    with pytest.raises(ConfigurationError, match="Grads"):
        ff.clip_gradients(RT64, {"w": torch.ones(2)}, max_norm=1.0)


def test_clipping_and_stepping_donated_is_clipping_and_stepping():
    model = ff.setup_model(RT64, nn.Linear(3, 2).double())
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
    x = torch.randn(4, 3, dtype=torch.float64)
    results = []
    for donate in (False, True):
        start = optree.tree_map(torch.clone, model)
        _, grads = ff.value_and_grad(RT64, lambda net, x: net(x).square().sum())(start, x)
        grads, _ = ff.clip_gradients(RT64, grads, max_norm=0.5, donate=donate)
        results.append(ff.optimizer_step(RT64, start, optree.tree_map(torch.clone, opt), grads, donate=donate)[0])
    for one, two in zip(*(result.params.values() for result in results), strict=True):
        assert torch.equal(one, two)
