"""What the tests of gradients share: data, a net that has everything, and a loss that does everything with it."""

import torch
from torch import nn
from torch.nn import functional as F


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A tied weight, a frozen part, batch statistics, a method besides forward, a parameter used by itself."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight
        self.fixed = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def encode(self, x):
        return self.fixed(self.encoder(x)).tanh()

    def forward(self, x):
        self.seen += len(x)
        self.cache = x.detach().mean(0)
        return self.norm(self.decoder(self.encode(x))) * self.scale


def fresh():
    module = Net().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
    return module


def loss_fn(net, x, y):
    """Several forwards, another method, a weight used by itself."""
    return F.mse_loss(net(x), y) + net.encode(x).square().mean() + net(y).mean().square() + net.scale.square()
