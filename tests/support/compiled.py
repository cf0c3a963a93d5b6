"""What the tests of compiled steps share: back ends without a compiler, a net, its step, equality up to rounding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff

BACKEND = "eager"
"""The graph as it was traced, run operation by operation."""
FUNCTIONAL = "aot_eager"
"""The graph in which changes in place are values, as inductor gets it."""
ATOL = 1e-12


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "SGD": (torch.optim.SGD, {}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "dampened": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
}


def one_rank_in_float64():
    """A fixture: the runtime of one process."""

    @pytest.fixture
    def rt():
        return ff.init_runtime(accelerator="cpu", devices=1, precision="64-true")

    return rt


def make_net():
    torch.manual_seed(0)
    # no bias before the normalisation: its gradient is 0 up to rounding, which Adam would make large
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def make_batch(seed, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (4, 2))


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


def assert_others_are_found_out(rt, compiled, model, opt, *batch):
    """Records over the same memory as those that a step gives away."""
    other, other_opt = ff.tree_map(lambda value: value, (model, opt))
    model, opt, *_ = compiled(model, opt, *batch)
    with pytest.raises(ff.DonatedError, match="shares tensors"):
        ff.apply(rt, other, batch[0])
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).sum())(model, batch[0])
    with pytest.raises(ff.DonatedError, match="shares tensors"):
        ff.optimizer_step(rt, model, other_opt, grads)
    ff.optimizer_step(rt, model, opt, grads)
