"""What the tests of random numbers share: the global generators as they were, and a net with dropout."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fabricfn as ff


def generators_put_back():
    """A fixture of every test: it leaves the global generators of this process as they were."""

    @pytest.fixture(autouse=True)
    def put_back():
        before = ff.random_state()
        yield
        ff.set_random_state(before)

    return put_back


def draws(num=5):
    """The next numbers of every global generator, of each kind that keeps some in hand."""
    return (
        torch.rand(num).tolist(),
        torch.randn(3).tolist(),
        np.random.random(num).tolist(),
        np.random.standard_normal(3).tolist(),
        [random.random() for _ in range(num)],
        random.gauss(0, 1),
    )


def dropout_net(checkpointed=None):
    """A net whose two masks a loss can see; the middle is recomputed when `checkpointed` is "reentrant" or "not"."""
    torch.manual_seed(3)
    return Dropped(checkpointed).double()


class Dropped(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 1)
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x):
        x = nn.functional.dropout(self.first(x), 0.5, self.training)
        if self.checkpointed is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.checkpointed == "reentrant")
        return self.last(x)


def data(rows=8, seed=0):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# functional refuses reentrant checkpoints by a CapabilityError, whatever the key: tests/test_hard_losses.py.
CHECKPOINTS = [
    *(("single", "reentrant"), ("single", "not"), ("ddp", "reentrant"), ("ddp", "not")),
    ("functional", "not"),
]
