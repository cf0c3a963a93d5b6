"""What the tests of optimizers share: a net, steps of ours and of plain torch, and equality to the bit."""

import dataclasses
from types import MappingProxyType

import optree
import torch
from torch import nn

import fabricfn as ff
from tests.support.runtimes import RT64


def loss_fn(net, x):
    return net(x).square().mean()


def inputs(step):
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def net(seed=0, width=4, depth=2):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)]).double()
    for param in module.parameters():
        nn.init.normal_(param, generator=generator)
    return module


def grads_of(model, step=0):
    return ff.value_and_grad(RT64, loss_fn)(model, inputs(step))[1]


def by_hand(optimizer, module, steps=4, first=0):
    """Plain torch, on gradients that were computed likewise."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_fn(module, inputs(step)).backward()
        optimizer.step()
    return [param.detach() for param in module.parameters()]


def functionally(model, opt, steps=4, donate=False, first=0):
    for step in range(first, first + steps):
        model, opt = ff.optimizer_step(RT64, model, opt, grads_of(model, step), donate=donate)
    return model, opt


def same(model, expected, atol=0.0):
    for (name, found), wanted in zip(model.params.items(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def snapshot(*trees):
    return [leaf.clone() for leaf in optree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def assert_intact(before, *trees):
    for old, new in zip(before, snapshot(*trees), strict=True):
        assert torch.equal(old, new)


def with_none(grads, *names):
    params = {name: None if name in names else grad for name, grad in grads.params.items()}
    return dataclasses.replace(grads, params=MappingProxyType(params), lease=type(grads.lease)())
