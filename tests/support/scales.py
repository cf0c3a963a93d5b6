"""What the tests of the loss scale share: one rank with a scale, a net, good and bad batches, equal bits."""

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import testing
from fabricfn.testing import cases
from fabricfn.testing.comparing import snapshot

MIXED = ff.Precision.parse("16-mixed")
INF, NAN = float("inf"), float("nan")
DONATE = pytest.mark.parametrize("donate", [False, True])


def runtime(loss_scale=MIXED.loss_scale, **fields):
    """One rank. Without further fields everything is float32, so that only the scale is looked at."""
    precision = ff.Precision(loss_scale=loss_scale, **fields)
    return ff.Runtime(world=ff.World(), precision=precision, strategy=ff.strategies.single())


def net(seed=0):
    return cases.initialised(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)), seed).float()


def squares(net, x):
    return net(x).float().square().mean()


def batch(seed=0, rows=8):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def poisoned(value=INF):
    """A batch with which loss, gradients and the statistics of BatchNorm are not finite."""
    x = batch(9)
    x[0, 0] = value
    return x


def values(*records):
    """Copies of everything that must keep its bits; the loss scale and the count of calls are looked at apart."""
    return snapshot([
        {"params": dict(one.params), "buffers": dict(one.buffers)} if type(one) is ff.Model
        else {"state": one.state, "shared": dict(one.shared), "hyperparams": [dict(group) for group in one.hyperparams]}
        for one in records
    ])  # fmt: skip


def assert_same(found, expected):
    assert testing.difference(found, expected) is None, testing.difference(found, expected)


def state_of(model):
    return model.loss_scale.scale, model.loss_scale.good_steps
