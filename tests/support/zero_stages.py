"""What the tests of DeepSpeed share: rows of options, a net that has everything, and what its losses give."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fabricfn as ff
from fabricfn import testing
from fabricfn.sharding import whole
from fabricfn.testing import cases

SINGLE, TOLERANCE = "32-true", 3e-6  # float32, sums in another order
ROWS = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "config": {"zero_optimization": {"stage3_param_persistence_threshold": 4}}},
    "stage 2, offload": {"stage": 2, "offload_optimizer": "cpu"},
    "stage 3, offload": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
}
EVERY = pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)


class Net(nn.Module):
    """Tied weights, a frozen one, a scalar, a buffer, shapes that two ranks do not divide."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(3, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(2))
        self.out = nn.Linear(7, 3, bias=False)
        self.back = nn.Linear(3, 7, bias=False)
        self.back.weight = nn.Parameter(self.back.weight.detach().clone())
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.fixed = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.seen += 1
        h = self.inp(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h + self.back(x)) * self.scale + self.fixed


def made(seed=0):
    return cases.initialised(Net(), seed).float()


def data(rows=12):
    return cases.filled((rows, 3), torch.float32, 1), cases.filled((rows, 3), torch.float32, 2)


def mine(rt):
    return [tensor.chunk(rt.world_size)[rt.rank] for tensor in data()]


def mse(net, x, y):
    return (net(x) - y).square().mean()


def taught(net, x, y, teacher):
    return mse(net, x, y) + (net(x) - teacher(x)).square().mean()


def through(net, x, y, judge):
    return mse(net, x, y) + judge(net(x)).square().mean()


def twice(net, x, y):
    return mse(net, x, y) + net.inp(x).mean() + net.out.weight.square().sum()


def checkpointed(net, x, y):
    h = net.inp(x)
    for block in net.blocks:
        h = h + checkpoint(block, h, use_reentrant=False)
    return (net.out(h + net.back(x)) * net.scale + net.fixed - y).square().mean()


def pair(nets, x, y):
    return mse(nets["a"], x, y) + (nets["a"](x) - nets["b"](x)).square().mean()


def wholes(grads):
    return {name: None if grad is None else whole(grad) for name, grad in grads.params.items()}


def close(found, expected):
    worst = testing.difference(found, expected, TOLERANCE)
    assert worst is None, worst


def strategy(options):
    return ff.strategies.deepspeed(**options)


def several(rt):
    model, other = ff.setup_model(rt, made()), ff.setup_model(rt, made(5))
    half = ff.map_params(lambda value: 0.5 * value, model)

    def gradients(models, loss_fn, *others):
        loss, grads = ff.value_and_grad(rt, loss_fn)(models, *mine(rt), *others)
        if isinstance(models, dict):
            return ff.all_reduce(rt, loss), {name: wholes(grads[name]) for name in models}
        return ff.all_reduce(rt, loss), wholes(grads)

    def norm(limit):
        _, grads = ff.value_and_grad(rt, mse)(model, *mine(rt))
        grads, norm = ff.clip_gradients(rt, grads, max_norm=limit)
        return norm, wholes(grads)

    return {
        "plain": gradients(model, mse),
        "teacher": gradients(model, taught, half),
        "another teacher": gradients(model, taught, other),
        "a frozen judge": gradients(model, through, other),
        "direct and twice": gradients(model, twice),
        "checkpointed": gradients(model, checkpointed),
        "other values": gradients(half, mse),
        "two models": gradients({"a": model, "b": other}, pair),
        "two records": gradients({"a": model, "b": half}, pair),
        "accumulated": halves(rt, model),
        "clipped": norm(0.1),
        "apply": ff.apply(rt, half, data()[0]),
        "value": ff.value(rt, lambda net, x, y: (mse(net, x, y) * len(x), len(x)), weighted=True)(model, *mine(rt)),
        "input": inputs(rt, model),
        "module": dict(ff.to_module(rt, half).state_dict()),
        "plain again": gradients(model, mse),
    }


def halves(rt, model):
    """Two micro-batches of one size: the mean of their means."""
    x, y = mine(rt)
    return wholes(ff.accumulate(rt, mse)(model, zip(x.chunk(2), y.chunk(2), strict=True))[1])


def inputs(rt, model):
    x = data()[0].requires_grad_()
    return torch.autograd.grad(ff.apply(rt, model, x).sum(), x)[0]
