"""What the tests of ranks that disagree share: a net, and the function of its gradients."""

import torch

import fabricfn as ff


def square(net, x):
    return net(x).square().mean()


def prepared(rt, size=3):
    torch.manual_seed(0)
    return ff.setup_model(rt, torch.nn.Linear(size, size)), ff.value_and_grad(rt, square), torch.ones(2, size)
