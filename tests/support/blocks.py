"""What the tests of strategies' options share: nets, data, and values made whole."""

import torch
from torch import nn

from fabricfn import sharding


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.fc(x).tanh() * self.gain


class Net(nn.Module):
    """`last=False` leaves the last block out."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.out = nn.Linear(6, 3)

    def forward(self, x, last=True):
        x = self.inp(x)
        for block in self.blocks[: None if last else 2]:
            x = block(x)
        return self.out(x)


def built(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net().double()
    net.blocks[1].fc.weight.requires_grad_(False)
    return net


NET = built()  # not in the ranks: threads share the generator
X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def squares(net, x, **options):
    return net(x, **options).square().mean()


def rows(rt):
    return X.tensor_split(rt.world_size)[rt.rank]


def wholes(params):
    return {name: None if value is None else sharding.whole(value) for name, value in params.items()}


PASSES = []


class Norm(nn.Module):
    """Its result depends on a buffer that it changes, as under a power iteration."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        PASSES.append(torch.is_grad_enabled())
        self.scale = self.scale * 1.5
        self.norm.weight.shape  # noqa: B018  # a read outside of a child's forward
        return x + self.norm(self.fc(x)).tanh() * self.scale


def normed():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 6), Norm(), Norm(), nn.Linear(6, 3)).double()


NORMED = normed()
