"""What the tests of the canonical reduction share: strategies that know it, nets, and equality to the bit."""

import pytest
import torch
from torch import nn

import fabricfn as ff

DISTRIBUTED = {
    "functional": ff.strategies.functional(),
    "ddp": ff.strategies.ddp(),
    "ddp, bucket views": ff.strategies.ddp(gradient_as_bucket_view=True),
    "ddp, unused": ff.strategies.ddp(find_unused_parameters=True),
}
ROWS = pytest.mark.parametrize("strategy", DISTRIBUTED.values(), ids=DISTRIBUTED)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same(found, expected):
    """Bit for bit: 0.0 and -0.0 differ."""
    return found.dtype == expected.dtype and found.shape == expected.shape and bits_of(found) == bits_of(expected)


def bits_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def mine(rt, items):
    """The micro-batches of this rank: a contiguous part of the global batch."""
    count, rest = divmod(len(items), rt.world_size)
    assert not rest
    return items[rt.rank * count : (rt.rank + 1) * count]


def small(seed=0, dtype=torch.float64):
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    generator = seeded(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=dtype))
    return module


def batch(n=24, dtype=torch.float64):
    return torch.randn(n, 4, generator=seeded(1), dtype=dtype)


def sums(net, x):
    return net(x).square().sum(), len(x)


def mean_square(net, x):
    return net(x).square().mean()
