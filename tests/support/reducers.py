"""What the tests of gradients over ranks share: strategies that average them, a net, and what `single` gives."""

import torch
from torch import nn

import fabricfn as ff
from fabricfn import sharding
from fabricfn.strategies import ddp, flat
from tests.support.runtimes import RT64

DISTRIBUTED = {name: make for name, make in ff.strategies.NAMES.items() if make().max_ranks is None}
DISTRIBUTED["find_unused"] = lambda: ddp(find_unused_parameters=True)
DISTRIBUTED["flat, many buckets"] = lambda: flat(bucket_cap_mb=0.0001)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mlp(depth=3, out=4, seed=0, dtype=torch.float64):
    module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth - 1)], nn.Linear(4, out)).to(dtype)
    generator = seeded(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(0.5 * torch.randn(param.shape, generator=generator, dtype=dtype))
    return module


def batch(rt, rows=12, dtype=torch.float64):
    """This rank's contiguous slice of the global batch."""
    whole = torch.randn(rows, 4, generator=seeded(1), dtype=dtype)
    return whole.tensor_split(rt.world_size)[rt.rank]


def squares(net, x):
    return net(x).square().mean()


def assert_close(found, expected):
    wholes = {name: None if grad is None else sharding.whole(grad) for name, grad in found.params.items()}
    torch.testing.assert_close(wholes, dict(expected.params), rtol=0, atol=1e-12)


def assert_all(results):
    assert all(result is True for result in results), results


def single_grads(loss_fn=squares, module=None, x=None):
    model = ff.setup_model(RT64, mlp() if module is None else module)
    return ff.value_and_grad(RT64, loss_fn)(model, batch(RT64) if x is None else x)
