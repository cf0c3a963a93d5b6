"""What the tests of tools share: a net with batch statistics, and its data."""

import torch
from torch import nn


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()


NET = net()  # not in the ranks: threads share the generator
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
