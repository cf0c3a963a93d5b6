"""Errors that users of value_and_grad, accumulate and apply meet."""

import pytest
import torch
from torch import nn

import fabricfn as ff
from tests.support.gradients import data, fresh, loss_fn


def test_tensors_on_two_devices_are_named(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    elsewhere = {"x": torch.ones(2, 4, device="meta"), "n": torch.ones(2)}

    def loss(net, batch, extra=None):
        return net(batch["x"]).mean()

    for call in (ff.value_and_grad(rt, loss), ff.value(rt, loss)):
        with pytest.raises(
            ff.ModelError, match=r"the model is on cpu.*: argument 0/x on meta\. Move them with ff\.to_d"
        ):
            call(model, elsewhere)
    with pytest.raises(ff.ModelError, match="argument 0 on meta, extra on meta"):
        ff.value_and_grad(rt, lambda net, x, *, extra: net(x).mean() + extra)(
            model, elsewhere["x"], extra=torch.ones((), device="meta")
        )
    with pytest.raises(ff.ModelError, match="argument 0 on meta"):
        ff.apply(rt, model, elsewhere["x"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ff.apply(rt, model, torch.ones(2, 5))


def test_a_loss_must_be_a_scalar_and_depend_on_the_model(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.GradientError, match=r"scalar tensor, found one of shape \(6, 1\)"):
        ff.value_and_grad(rt, lambda net: net(data(6, 4)))(model)
    with pytest.raises(ff.GradientError, match=r"found float\. Return the loss itself, without \.item"):
        ff.value_and_grad(rt, lambda net: 1.0)(model)
    with pytest.raises(ff.GradientError, match="does not depend on any trainable parameter"):
        ff.value_and_grad(rt, lambda net: data(6, 4).mean())(model)
    with pytest.raises(ff.GradientError, match=r"must return \(loss, aux\)"):
        ff.value_and_grad(rt, lambda net: net(data(6, 4)).mean(), has_aux=True)(model)


def test_unused_parameters_are_named_or_allowed(rt):
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    def part(net):
        return net[0](data(6, 4)).mean()

    with pytest.raises(ff.GradientError, match=r"2 parameters got no gradient: 1\.weight, 1\.bias"):
        ff.value_and_grad(rt, part)(model)
    if rt.strategy.name == "ddp":  # with find_unused_parameters it can; see test_ddp.py
        with pytest.raises(ff.CapabilityError):
            ff.value_and_grad(rt, part, allow_unused=True)
        return
    _, grads = ff.value_and_grad(rt, part, allow_unused=True)(model)
    assert grads.params["1.weight"] is None and grads.params["0.weight"] is not None
    ff.value_and_grad(rt, lambda net: net(data(6, 4)).mean())(model)


def test_gradients_are_for_models_only(rt):
    with pytest.raises(ff.ConfigurationError, match=r"found Linear.*setup_model"):
        ff.value_and_grad(rt, lambda net: net)(nn.Linear(1, 1))
    with pytest.raises(ff.ConfigurationError, match="no micro-batch"):
        ff.accumulate(rt, loss_fn)(ff.setup_model(rt, fresh()), [])
    with pytest.raises(ff.ConfigurationError, match='"rank0", "mean" and "local"'):
        ff.value_and_grad(rt, loss_fn, buffers="max")


def test_weights_that_sum_to_zero_are_refused(rt):
    with pytest.raises(ff.GradientError, match="sum to zero"):
        ff.value_and_grad(rt, lambda net, x: (net(x).sum(), 0), weighted=True)(
            ff.setup_model(rt, nn.Linear(4, 1)), data(2, 4)
        )


def test_a_step_with_another_models_gradients_is_refused(rt):
    model, other = ff.setup_model(rt, nn.Linear(4, 1)), ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).mean())(other, data(2, 4))
    with pytest.raises(ff.GradientError, match="belong to another model"):
        ff.optimizer_step(rt, model, opt, grads)
    with pytest.raises(ff.ConfigurationError, match=r"found Grads\. Write optimizer_step\(rt, models, opt, grads\)"):
        ff.optimizer_step(rt, model, grads, opt)


def test_a_weight_that_requires_grad_is_refused(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.GradientError, match="must not require grad"):
        ff.value_and_grad(rt, lambda net, x: (net(x).sum(), net.weight.sum()), weighted=True)(model, data(2, 4))


def test_complex_losses_are_refused(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.GradientError, match="complex"):
        ff.value_and_grad(rt, lambda net, x: net(x).sum() * 1j)(model, data(2, 4))


def test_a_seed_is_no_key(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.ConfigurationError, match=r"found int.*ff\.key\(seed\)"):
        ff.value_and_grad(rt, lambda net, x: net(x).mean())(model, data(2, 4), rng=1)
    with pytest.raises(ff.ConfigurationError, match=r"found int"):
        ff.apply(rt, model, data(2, 4), rng=1)
