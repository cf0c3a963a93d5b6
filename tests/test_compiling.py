"""`compile_step`: a compiled step means what the step means, up to rounding."""

import copy
import dataclasses
import inspect
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff

BACKEND = "aot_eager"
"""Traces and functionalizes, as for inductor, and leaves out what takes seconds."""
ATOL = 1e-12


def make_net():
    torch.manual_seed(0)
    # no bias before the normalisation: its gradient is 0 up to rounding, which Adam would make large
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def make_batch(seed, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (4, 2))


@pytest.fixture
def rt():
    return ff.init_runtime(accelerator="cpu", devices=1, precision="64-true")


def mse(net, x, y):
    return F.mse_loss(net(x), y)


def make_step(rt, donate=False, loss_fn=mse):
    grad_fn = ff.value_and_grad(rt, loss_fn)

    def step(model, opt, x, y, lr, rng=None):
        loss, grads = grad_fn(model, x, y, rng=rng)
        grads, norm = ff.clip_gradients(rt, grads, max_norm=0.5)
        model, opt = ff.optimizer_step(rt, model, opt, grads, lr=lr, donate=donate)
        return model, opt, {"loss": loss, "norm": norm, "step": opt.step}

    return step


def tensors_of(*records):
    found = []
    for record in records:
        if isinstance(record, ff.Optimizer):
            found += [value for row in record.state.values() for value in row.values()]
        else:
            found += [*record.params.values(), *record.buffers.values()]
    return found


def assert_close(left, right):
    left, right = tensors_of(*left), tensors_of(*right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ATOL)


def copies(*records):
    return [ff.tree_map(torch.clone, record) for record in records]


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "SGD": (torch.optim.SGD, {}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "dampened": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("donate", [False, True])
def test_a_compiled_step_is_the_eager_step(rt, name, donate):
    cls, options = OPTIMIZERS[name]
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, cls, lr=0.1, **options)
    eager, mine = copies(model, opt), copies(model, opt)
    step = make_step(rt, donate)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    for number in range(5):
        batch = [*make_batch(number)]
        changing = {"lr": 0.1 / (number + 1), "rng": ff.fold_in(ff.key(1), number)}
        *eager, told = step(*eager, *batch, **changing)
        *mine, mine_told = compiled(*mine, *batch, **changing)
        assert_close(eager, mine)
        assert mine_told["step"] == told["step"] == mine[1].step == number + 1
        for key in ("loss", "norm"):
            torch.testing.assert_close(told[key], mine_told[key], rtol=0, atol=ATOL)
    # a momentum that does not begin with zeros is there after the first step only
    assert compiled.traces == (2 if name == "dampened" else 1)
    assert mine[1].hyperparams == eager[1].hyperparams


def uneven(net, x, y):
    rows = len(x)
    return F.mse_loss(net(x), y, reduction="sum") / 2, rows


def run_on_ranks(rt, net, data, weighted):
    """Each rank has its rows of the whole batch; under `weighted` rank 0 has more, in micro-batches."""
    grad_fn = ff.accumulate(rt, uneven, weighted=True) if weighted else ff.value_and_grad(rt, mse, buffers="mean")

    def step(model, opt, batch):
        loss, grads = grad_fn(model, batch) if weighted else grad_fn(model, *batch)
        grads, _ = ff.clip_gradients(rt, grads, max_norm=0.5)
        return *ff.optimizer_step(rt, model, opt, grads, donate=True), loss

    model = ff.setup_model(rt, net)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9)
    step = ff.compile_step(rt, step, backend=BACKEND)
    cut = 5 if weighted else 4
    rows = slice(0, 8) if rt.world_size == 1 else slice(0, cut) if rt.rank == 0 else slice(cut, 8)
    for x, y in data:
        mine = (x[rows], y[rows])
        parts = [tuple(pair) for pair in zip(*(one.tensor_split(2) for one in mine), strict=True)]
        model, opt, loss = step(model, opt, parts if weighted else mine)
    return [*model.params.values()], loss if weighted else None


@pytest.fixture(scope="module")
def threads():
    with ff.testing.threads(2) as world:
        yield world


@pytest.mark.parametrize("weighted", [False, True])
def test_functional_on_two_ranks_is_single_on_the_whole_batch(threads, weighted):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    data = [tuple(make_batch(number)) for number in range(3)]

    def on(size, strategy):
        return threads.run(
            run_on_ranks, net, data, weighted, world_size=size, strategy=strategy, precision="64-true"
        )

    (whole,), both = on(1, "single"), on(2, "functional")
    for mine in both:
        for one, other in zip(whole[0], mine[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=ATOL)
        if weighted:
            torch.testing.assert_close(whole[1], mine[1], rtol=0, atol=ATOL)
