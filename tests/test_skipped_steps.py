"""Steps that a loss scale leaves out: they change no bit, and clipping hides nothing from them."""

import dataclasses

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.optimizers.skipping import all_finite
from tests.support.scales import (
    DONATE,
    INF,
    MIXED,
    NAN,
    assert_same,
    batch,
    net,
    poisoned,
    runtime,
    squares,
    state_of,
    values,
)


@DONATE
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adadelta, {}),
        (None, None),
    ],
)
def test_a_step_that_is_left_out_changes_no_bit(donate, value, optimizer, options):
    rt = runtime()
    if optimizer is None:  # an (init, update) pair
        optimizer = (lambda params: ff.tree_map(torch.zeros_like, params), lambda grads, state, params: (grads, grads))
    model = ff.setup_model(rt, net())
    opt = ff.setup_optimizer(rt, model, optimizer, **(options or {}))
    grad_fn = ff.value_and_grad(rt, squares)
    model, opt = ff.optimizer_step(rt, model, opt, grad_fn(model, batch())[1], donate=donate)
    before = values(model, opt)
    _, grads = grad_fn(model, poisoned(value))
    assert not all(gradient.isfinite().all() for gradient in grads.params.values())
    after, later = ff.optimizer_step(rt, model, opt, grads, donate=donate)
    assert_same(values(after, later), before)
    assert (later.step, state_of(after)) == (2, (32768.0, 0))
    if donate:
        with pytest.raises(ff.DonatedError):
            ff.apply(rt, model, batch())
        with pytest.raises(ff.DonatedError):
            ff.optimizer_step(rt, after, opt, grads)
        with pytest.raises(ff.DonatedError):
            ff.clip_gradients(rt, grads, max_norm=1.0)
    else:
        assert state_of(model) == (65536.0, 1)
        ff.optimizer_step(rt, after, later, grad_fn(after, batch())[1], donate=True)
        assert_same(values(model, opt), before)  # the result has memory of its own, as after any other step


@DONATE
def test_a_loop_with_bad_batches_is_the_loop_without_them(donate):
    def train(batches):
        rt = runtime()
        model = ff.setup_model(rt, net())
        opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
        grad_fn = ff.value_and_grad(rt, squares)
        for x in batches:
            model, opt = ff.optimizer_step(rt, model, opt, grad_fn(model, x)[1], donate=donate)
        return model, opt

    good = [batch(seed) for seed in range(4)]
    model, opt = train([good[0], poisoned(), good[1], good[2], poisoned(NAN), poisoned(-INF), good[3]])
    same, fewer = train(good)
    assert_same(values(model, opt), values(same, fewer))
    assert (opt.step, fewer.step) == (7, 4)
    assert (state_of(model), state_of(same)) == ((8192.0, 1), (65536.0, 4))


@DONATE
def test_frozen_parameters_and_entries_without_gradient(donate):
    rt = runtime()
    module = net()
    module[0].bias.requires_grad_(False)
    model = ff.setup_model(rt, module)
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net[0](x).square().mean(), allow_unused=True)
    before = values(model, opt)
    _, grads = grad_fn(model, poisoned())
    assert grads.params["2.weight"] is None
    after, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)
    assert_same(values(after, opt), before)
    after, opt = ff.optimizer_step(rt, after, opt, grad_fn(after, batch())[1], donate=donate)
    assert state_of(after) == (32768.0, 1)


def test_a_static_scale_stays_and_leaves_steps_out():
    rt = runtime(128)
    model = ff.setup_model(rt, net())
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, squares)
    seen = []
    for x in (batch(), batch(1), poisoned(), batch(2)):
        model, opt = ff.optimizer_step(rt, model, opt, grad_fn(model, x)[1])
        seen.append(state_of(model))
    assert seen == [(128.0, 1), (128.0, 2), (128.0, 0), (128.0, 1)]
    assert all(value.isfinite().all() for value in model.params.values())


def test_overrides_of_a_step_that_is_left_out_do_not_stay():
    rt = runtime()
    model = ff.setup_model(rt, net())
    opt = ff.setup_optimizer(rt, model, torch.optim.Adadelta, lr=0.1)
    _, grads = ff.value_and_grad(rt, squares)(model, poisoned())
    _, opt = ff.optimizer_step(rt, model, opt, grads, lr=7.0)
    assert opt.hyperparams[0]["lr"] == 0.1


def test_numbers_whose_squares_are_too_large_are_finite():
    rt = runtime()
    model = ff.setup_model(rt, nn.Linear(4, 1, bias=False))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=1e-38)
    grads = ff.Grads(params={"weight": torch.full((1, 4), 1e38)}, ref=model.ref)
    after, _ = ff.optimizer_step(rt, model, opt, grads)
    assert state_of(after) == (65536.0, 1)
    torch.testing.assert_close(after.params["weight"], model.params["weight"] - 1)


def test_gradients_of_several_dtypes():
    rt = runtime()
    module = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 1).half())
    model = ff.setup_model(dataclasses.replace(rt, precision=MIXED), module)
    mixed = {name: value.dtype for name, value in model.params.items()}
    assert set(mixed.values()) == {torch.float64, torch.float16}
    for bad in (None, *mixed):
        params = {name: torch.full_like(value, 6e4) for name, value in model.params.items()}
        if bad is not None:
            params[bad].view(-1)[0] = NAN
        assert all_finite([*params.values()], rt.world) is (bad is None)


def test_sparse_and_empty_gradients_are_looked_at():
    rt = runtime()
    module = nn.ModuleDict({"e": nn.Embedding(5, 2, sparse=True)})
    module.register_parameter("none", nn.Parameter(torch.zeros(0, 3)))
    model = ff.setup_model(rt, module)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, foreach=False)
    for factor, expected in ((1.0, (65536.0, 1)), (INF, (32768.0, 0))):
        grad_fn = ff.value_and_grad(rt, lambda net, index, f=factor: (net["e"](index) * f).sum() + net.none.sum())
        _, grads = grad_fn(model, torch.tensor([1, 1, 3]))
        assert grads.params["e.weight"].is_sparse
        model, opt = ff.optimizer_step(rt, model, opt, grads)
        assert state_of(model) == expected
    assert model.params["e.weight"].isfinite().all()


@DONATE
def test_a_scale_that_cannot_fall_any_further_is_an_error_that_takes_nothing(donate):
    rt = runtime(ff.DynamicScale(init_scale=4.0, min_scale=1.0))
    model = ff.setup_model(rt, net())
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, squares)
    for expected in (2.0, 1.0):
        model, opt = ff.optimizer_step(rt, model, opt, grad_fn(model, poisoned())[1], donate=donate)
        assert model.loss_scale.scale == expected
    grads = grad_fn(model, poisoned())[1]
    with pytest.raises(ff.GradientError, match=r"not finite on rank 0, at a loss scale of only 1: .*detect_anomaly"):
        ff.optimizer_step(rt, model, opt, grads, donate=donate)
    ff.optimizer_step(rt, model, opt, grad_fn(model, batch())[1], donate=donate)


def test_a_closure_is_refused():
    rt = runtime()
    model = ff.setup_model(rt, net())
    opt = ff.setup_optimizer(rt, model, torch.optim.LBFGS)
    grad_fn = ff.value_and_grad(rt, squares)
    with pytest.raises(ff.CapabilityError, match="LBFGS with closure= .*bf16-mixed"):
        ff.optimizer_step(rt, model, opt, closure=lambda model: grad_fn(model, batch()))


# Clipping before the step


@DONATE
@pytest.mark.parametrize("limit", [{"max_norm": 1.0}, {"max_norm": 1.0, "norm_type": "inf"}, {"clip_val": 0.01}])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_clipping_hides_nothing_from_the_loss_scale(donate, limit, value):
    rt = runtime()
    model = ff.setup_model(rt, nn.Linear(4, 1))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).sum())(model, batch())
    grads = ff.tree_map(lambda gradient: gradient.index_fill(-1, torch.tensor(0), value), grads)
    with pytest.raises(ff.GradientError, match="not finite"):
        ff.clip_gradients(rt, grads, **limit, error_if_nonfinite=True)
    grads, norm = ff.clip_gradients(rt, grads, **limit, donate=donate)
    assert not norm.isfinite()
    after, _ = ff.optimizer_step(rt, model, opt, grads)
    assert state_of(after) == (32768.0, 0)
    assert torch.equal(after.params["weight"], model.params["weight"])


def test_clipping_by_value_has_the_same_bits_with_a_loss_scale():
    gradient = torch.tensor([[0.0, -0.0, 1e-30, -5.0], [5.0, 0.5, -0.5, -1e-30]])
    results = []
    for rt in (runtime(), runtime(None)):
        model = ff.setup_model(rt, nn.Linear(4, 2, bias=False))
        grads = ff.Grads(params={"weight": gradient}, ref=model.ref)
        results.append(dict(ff.clip_gradients(rt, grads, clip_val=1.0)[0].params))
    assert_same(*results)
