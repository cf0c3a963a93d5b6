"""Numbers of a compiled step that change from call to call: rates, the count of steps, random draws."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fabricfn as ff
from tests.support.compiled import (
    ATOL,
    BACKEND,
    assert_close,
    copies,
    make_batch,
    make_net,
    make_step,
    mse,
    one_rank_in_float64,
)

rt = one_rank_in_float64()


def test_numbers_that_change_are_not_traced_again(rt):
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1, groups={"*.bias": {"weight_decay": 0.0}})
    grad_fn = ff.value_and_grad(rt, mse)

    def step(model, opt, x, y, betas):
        loss, grads = grad_fn(ff.eval_mode(model), x, y)
        return ff.optimizer_step(rt, model, opt, grads, betas=(betas, 0.99), donate=True)

    inner = ff.compile_step(rt, step, backend=BACKEND)
    compiled = ff.compile_step(rt, inner, backend=BACKEND)
    eager, mine = copies(model, opt), copies(model, opt)
    for number in range(4):
        batch = [*make_batch(number)]
        rate = (float, np.float64)[number % 2](0.1 / (number + 1))
        eager, mine = (
            (one, dataclasses.replace(opt, hyperparams=tuple({**group, "lr": rate} for group in opt.hyperparams)))
            for one, opt in (eager, mine)
        )
        eager, mine = step(*eager, *batch, 0.9 - rate), compiled(*mine, *batch, 0.9 - rate)
        assert_close(eager, mine)
        assert mine[1].hyperparams == eager[1].hyperparams
        assert mine[1].hyperparams[0]["lr"] == rate
    assert (compiled.traces, inner.traces) == (1, 0), "a step within a step is a part of it"


@pytest.mark.parametrize("made", ["arithmetic", "torch", "lambda"])
def test_a_step_computes_with_the_count_of_steps(rt, made):
    lr_scheduler = torch.optim.lr_scheduler
    options = {"max_lr": 0.1, "total_steps": 8} if made == "torch" else {"lr_lambda": lambda step: min(1.0, step / 3)}
    schedule = ff.schedule_from_torch(
        lr_scheduler.OneCycleLR if made == "torch" else lr_scheduler.LambdaLR, 0.1, **options
    )
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1, groups={"*.bias": {"weight_decay": 0.0}})
    grad_fn = ff.value_and_grad(rt, lambda net, x, y, weight: mse(net, x, y) * weight)
    outside = ff.key(3)

    def step(model, opt, x, y, key):
        count = -(2 * (opt.step + 1) % 7 // 1 - 3)
        key, other = ff.fold_in(key, opt.step), ff.fold_in(outside, 1 + opt.step)
        _, grads = grad_fn(model, x, y, 1 / (1 + opt.step), rng=key)
        loss, more = grad_fn(model, x, y, torch.clamp(x[0, 0].abs(), max=opt.step + 0.5) ** opt.step, rng=other)
        grads = ff.tree_map(torch.add, grads, more)
        rates = {"lr": [0.1 * 0.5**opt.step, 0.1]} if made == "arithmetic" else schedule(opt.step)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True, **rates)
        return model, opt, loss, x.long() * opt.step, {"count": count, "key": key, "step": opt.step, **rates}

    compiled = ff.compile_step(rt, step, backend=BACKEND)
    eager, mine = copies(model, opt), copies(model, opt)
    for number in range(5):
        batch = [*make_batch(number)]
        *eager, loss, integers, told = step(*eager, *batch, ff.key(1))
        *mine, my_loss, my_integers, mine_told = compiled(*mine, *batch, ff.key(1))
        assert_close(eager, mine)
        torch.testing.assert_close(loss, my_loss, rtol=0, atol=ATOL)
        torch.testing.assert_close(integers, my_integers)
        assert mine_told == told and told["step"] == number + 1
    assert compiled.traces == 1


def test_a_whole_number_that_becomes_a_fraction_is_an_error(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).mean())

    def step(model, opt, x):
        model, opt = ff.optimizer_step(rt, model, opt, grad_fn(model, x)[1], lr=1)
        return model, opt, x * 2 ** (2 - opt.step), x * 2.0 ** (2 - opt.step)

    compiled = ff.compile_step(rt, step, backend=BACKEND)
    x, _ = make_batch(0)
    for factor in (2, 1):
        model, opt, *found = compiled(model, opt, x)
        assert all(torch.equal(one, factor * x) for one in found)
    with pytest.raises(ff.CapabilityError, match=r"is 0\.5 now, and was an int"):
        compiled(model, opt, x)


def test_random_operations_draw_the_same_numbers(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)

    def noisy(net, x, y):
        x = x + torch.randn_like(x) + torch.rand(4, dtype=torch.float64)
        keep = torch.empty(8, 1, dtype=torch.float64).bernoulli_(0.5) + torch.randint(3, (8, 1))
        return F.mse_loss(F.dropout(net(x)) * keep, y) + torch.native_dropout(x, 0.5, True)[0].sum()

    step = make_step(rt, loss_fn=noisy)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    for rng in (None, ff.key(1), ff.key(2)):
        batch = [*make_batch(0)]
        torch.manual_seed(0)
        expected = step(model, opt, *batch, 0.1, rng)
        after = torch.rand(1)
        torch.manual_seed(0)
        found = compiled(model, opt, *batch, 0.1, rng)
        assert_close(expected[:2], found[:2])
        assert torch.equal(after, torch.rand(1)), "the global generator is where the eager step leaves it"
    assert compiled.traces == 2, "one without a key, one with one"


@pytest.mark.parametrize("reentrant", [False, None])
def test_what_is_recomputed_meets_the_same_masks(rt, reentrant):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    model = ff.setup_model(rt, net, activation_checkpointing=nn.Linear if reentrant is None else None)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)

    def loss_fn(net, x, y):
        return mse(net, x, y) + checkpoint(lambda x: F.dropout(net(x)), x, use_reentrant=False).square().mean()

    step = make_step(rt, loss_fn=loss_fn)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    for number in range(2):
        batch = [*make_batch(number)]
        expected = step(model, opt, *batch, 0.1, ff.key(number))
        assert_close(expected[:2], compiled(model, opt, *batch, 0.1, ff.key(number))[:2])
