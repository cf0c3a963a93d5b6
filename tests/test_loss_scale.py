"""The loss scale of fp16 on one rank: against torch's own GradScaler; on CPU, in real float16."""

import dataclasses

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import fabricfn as ff
from fabricfn.testing import cases
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
from tests.support.worlds import few

# The oracle: torch.amp.GradScaler

SETTINGS = st.builds(
    ff.DynamicScale,
    init_scale=st.sampled_from([1.0, 1024.0, 65536.0, 1000.0, 2.0**127]),
    growth_factor=st.sampled_from([2.0, 4.0, 1.5]),
    backoff_factor=st.sampled_from([0.5, 0.25, 0.9]),
    growth_interval=st.integers(1, 4),
    min_scale=st.just(1e-30),
)


def torch_scaler(scaling):
    names = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")
    scaler = torch.amp.GradScaler("cpu", **{name: getattr(scaling, name) for name in names})
    scaler.scale(torch.zeros(()))  # it makes its tensors when it is first used
    return scaler


@given(
    scaling=SETTINGS, numbers=st.lists(st.sampled_from([0.5, -1.0, INF, -INF, NAN]), max_size=14), donate=st.booleans()
)
@few(60)
def test_steps_and_scales_are_those_of_torch(scaling, numbers, donate):
    rt = runtime(scaling)
    model = ff.setup_model(rt, nn.Linear(3, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    module = ff.to_module(rt, model)
    stock, scaler = torch.optim.AdamW(module.parameters(), lr=0.1), torch_scaler(scaling)
    for number in numbers:
        gradients = {name: torch.ones_like(value) for name, value in model.params.items()}
        gradients["weight"][1, 2] = number
        for name, parameter in module.named_parameters():
            parameter.grad = gradients[name].double().mul(scaler.get_scale()).float()
        scaler.step(stock)
        scaler.update()
        model, opt = ff.optimizer_step(rt, model, opt, ff.Grads(params=gradients, ref=model.ref), donate=donate)
        assert model.loss_scale.scale == pytest.approx(scaler.get_scale(), rel=1e-5)
        assert model.loss_scale.good_steps == scaler._get_growth_tracker()
    assert opt.step == len(numbers)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(model.params[name], parameter.data, rtol=1e-5, atol=1e-6)


@given(sizes=st.lists(st.sampled_from([1.0, 30.0, 3e3, 6e4, 1e6]), min_size=1, max_size=12))
@few(25)
def test_a_whole_loop_in_float16_is_that_of_torch(sizes):
    """Overflows come from the arithmetic itself here: large inputs, at whatever scale has been reached."""
    scaling = ff.DynamicScale(growth_interval=2)
    rt = dataclasses.replace(runtime(), precision=dataclasses.replace(MIXED, loss_scale=scaling))
    model = ff.setup_model(rt, cases.initialised(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), 1).float())
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=1e-3, momentum=0.9)
    module = ff.to_module(rt, model)
    stock, scaler = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9), torch_scaler(scaling)
    grad_fn = ff.value_and_grad(rt, squares)
    for step, size in enumerate(sizes):
        x = batch(step) * size
        stock.zero_grad()
        with torch.autocast("cpu", torch.float16):
            expected = squares(module, x)
        scaler.scale(expected).backward()
        scaler.unscale_(stock)
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        scaler.step(stock)
        scaler.update()
        loss, grads = grad_fn(model, x)
        grads, found = ff.clip_gradients(rt, grads, max_norm=1.0)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
        torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
        torch.testing.assert_close(found, norm, equal_nan=True)
        assert state_of(model) == (scaler.get_scale(), scaler._get_growth_tracker())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(model.params[name], parameter.data, rtol=1e-5, atol=1e-6)


def test_small_gradients_survive_in_float16():
    """What the scale is for: 1e-9 is zero in float16, and so would be every gradient behind it."""

    def loss_fn(net, x):
        return (net(x).float() * 1e-9).sum()

    found = {}
    for scale in (None, MIXED.loss_scale):
        rt = dataclasses.replace(runtime(), precision=dataclasses.replace(MIXED, loss_scale=scale))
        model = ff.setup_model(rt, nn.Linear(4, 1))
        found[scale] = ff.value_and_grad(rt, loss_fn)(model, torch.ones(1, 4))[1].params["weight"]
    assert not found[None].any()
    torch.testing.assert_close(found[MIXED.loss_scale], torch.full((1, 4), 1e-9), rtol=1e-3, atol=0)


# The gradients are true


def test_the_loss_function_meets_the_scale_only_in_the_backward_pass():
    seen = []

    def loss_fn(net, x):
        out = net(x).sum()
        out.register_hook(seen.append)
        return out

    rt = runtime(512.0)
    model = ff.setup_model(rt, nn.Linear(4, 1))
    loss, grads = ff.value_and_grad(rt, loss_fn)(model, batch())
    assert seen[0].item() == 512
    assert (
        loss.item()
        == ff.apply(rt, model, batch()).sum().item()
        == ff.value(rt, lambda net, x: net(x).sum())(model, batch()).item()
    )
    torch.testing.assert_close(grads.params["weight"], batch().sum(0, keepdim=True))


def test_nothing_of_it_without_a_loss_scale():
    rt = runtime(None)
    model = ff.setup_model(rt, net())
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    _, grads = ff.value_and_grad(rt, squares)(model, poisoned())
    after, opt = ff.optimizer_step(rt, model, opt, grads)
    assert model.loss_scale is grads.loss_scale is after.loss_scale is None
    assert after.params["0.weight"].isnan().any()


# Several models, several optimizers


def two(rt, scales=(65536.0, 1024.0)):
    models = {name: ff.setup_model(rt, net(seed)) for seed, name in enumerate("ab")}
    return {
        name: dataclasses.replace(model, loss_scale=ff.LossScale(scale=scale, good_steps=5))
        for (name, model), scale in zip(models.items(), scales, strict=True)
    }


def joint(seen=None):
    def loss_fn(nets, x):
        out = squares(nets["a"], x) + squares(nets["b"], x)
        if seen is not None:
            out.register_hook(lambda gradient: seen.append(gradient.item()))
        return out

    return loss_fn


@pytest.mark.parametrize("bad", [False, True])
def test_two_models_in_one_loss_use_the_smaller_scale_and_share_the_verdict(bad):
    rt, seen = runtime(), []
    models = two(rt)
    opt = ff.setup_optimizer(rt, models, torch.optim.SGD, lr=0.1)
    _, grads = ff.value_and_grad(rt, joint(seen))(models, batch())
    if bad:
        grads["b"] = ff.tree_map(lambda gradient: gradient * INF, grads["b"])
    after, _ = ff.optimizer_step(rt, models, opt, grads)
    assert seen == [1024.0]
    if bad:
        assert (state_of(after["a"]), state_of(after["b"])) == ((32768.0, 0), (512.0, 0))
        assert_same(values(*after.values()), values(*models.values()))
    else:  # the larger scale was not tried, so it does not come nearer to growing
        assert (state_of(after["a"]), state_of(after["b"])) == ((65536.0, 0), (1024.0, 6))


def test_a_scale_that_is_never_tried_never_grows():
    rt = runtime(ff.DynamicScale(growth_interval=1))
    models = two(rt)
    opt = ff.setup_optimizer(rt, models, torch.optim.SGD, lr=1e-3)
    grad_fn = ff.value_and_grad(rt, joint())
    for _ in range(3):
        models, opt = ff.optimizer_step(rt, models, opt, grad_fn(models, batch())[1])
    assert (models["a"].loss_scale.scale, models["b"].loss_scale.scale) == (65536.0, 8192.0)


@DONATE
def test_two_models_with_optimizers_of_their_own_do_not_disturb_one_another(donate):
    """A GAN's step: each net has a loss of its own, in which the other one is a constant."""
    rt = runtime()

    def alone(name, batches):
        model = two(rt)[name]
        opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
        for x in batches:
            model, opt = ff.optimizer_step(rt, model, opt, ff.value_and_grad(rt, squares)(model, x)[1], donate=donate)
        return model, opt

    plan = {"a": [batch(), poisoned(), batch(1), batch(2)], "b": [batch(3), batch(4), poisoned(), poisoned(NAN)]}
    models = two(rt)
    opts = {name: ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1) for name, model in models.items()}
    grad_fn = ff.value_and_grad(rt, lambda net, other, x: squares(net, x) + 0 * squares(other, batch()))
    for pair in zip(*plan.values(), strict=True):
        for name, other, x in zip("ab", "ba", pair, strict=True):
            _, grads = grad_fn(models[name], models[other], x)
            models[name], opts[name] = ff.optimizer_step(rt, models[name], opts[name], grads, donate=donate)
    for name in "ab":
        model, opt = alone(name, plan[name])
        assert_same(values(models[name], opts[name]), values(model, opt))
        assert models[name].loss_scale == model.loss_scale
    assert (state_of(models["a"]), state_of(models["b"])) == ((32768.0, 2), (256.0, 0))


@pytest.mark.parametrize(("x", "expected"), [(batch(), (65536.0, 1)), (poisoned(), (32768.0, 0))])
def test_two_optimizers_that_share_gradients_move_the_scale_once(x, expected):
    rt = runtime()
    model = ff.setup_model(rt, net())
    matrices = ff.setup_optimizer(rt, model, torch.optim.SGD, params="*.weight", lr=0.1)
    rest = ff.setup_optimizer(rt, model, torch.optim.AdamW, params="*.bias", lr=0.1)
    _, grads = ff.value_and_grad(rt, squares)(model, x)
    grads, _ = ff.clip_gradients(rt, grads, max_norm=1.0)
    after, _ = ff.optimizer_step(rt, model, matrices, grads)
    after, _ = ff.optimizer_step(rt, after, rest, ff.tree_map(lambda gradient: gradient * 1.0, grads))
    assert state_of(after) == expected


@DONATE
def test_a_model_of_another_precision_starts_with_the_first_scale(donate):
    model = ff.setup_model(runtime(None), net())
    rt = runtime()
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    _, grads = ff.value_and_grad(rt, squares)(model, batch())
    after, opt = ff.optimizer_step(rt, model, opt, grads)
    assert state_of(after) == (65536.0, 1)
    plain = runtime(None)
    _, grads = ff.value_and_grad(plain, squares)(after, batch())
    later, _ = ff.optimizer_step(plain, after, opt, grads, donate=donate)
    assert later.loss_scale == after.loss_scale
