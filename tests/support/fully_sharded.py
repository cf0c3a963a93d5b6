"""What the tests of fsdp and flat_sharded share: a net, its gradients whole, and ranks under one of the two."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.sharding import full
from tests.support.runtimes import RT64

DOUBLE = ff.Precision.parse("64-true")


class Block(nn.Module):
    def __init__(self, width=7):
        super().__init__()
        self.lin, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return torch.tanh(self.lin(self.norm(x)))


class Net(nn.Module):
    """Repeated blocks, uneven shards (7 and 3 rows), a scalar, a frozen part, a statistic."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 7), nn.Linear(7, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x) * self.scale * self.fixed

    def short(self, x):
        return self.out(self.blocks[0](self.inp(x))) * self.scale


def built(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double()


NETS = tuple(built(seed) for seed in range(4))  # not in the ranks: threads share the generator


def made(seed=0):
    return copy.deepcopy(NETS[seed])  # `.float()` changes a module in place, and the threads of a world share these


def data(rows=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 5, generator=generator).double(), torch.randn(rows, 3, generator=generator).double()


def mse(net, x, y):
    return (net(x) - y).square().mean()


def mine(rt, tensors):
    return [tensor.chunk(rt.world_size)[rt.rank] for tensor in tensors]


def wholes(record):
    return {name: None if value is None else full(value).detach().clone() for name, value in record.params.items()}


def sharded(rt, precision=DOUBLE, **options):
    """A runtime of the strategy by that name with these options."""
    return dataclasses.replace(rt, strategy=getattr(ff.strategies, rt.strategy.name)(**options), precision=precision)


def gradients(rt, model, loss_fn, *others, **options):
    return wholes(ff.value_and_grad(rt, loss_fn, **options)(model, *mine(rt, data()), *others)[1])


def close(found, expected, tolerance=1e-12):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert type(found[name]) is torch.Tensor
            torch.testing.assert_close(
                found[name], value.detach(), rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


class Ranks:
    """Ranks under one of the two strategies."""

    def __init__(self, ranks, strategy):
        self.ranks, self.strategy, self.world_size = ranks, strategy, ranks.world_size

    def run(self, job, *args, **options):
        return self.ranks.run(job, *args, strategy=self.strategy, **options)


def under_either(*worlds):
    """A fixture: the ranks of each of these fixtures, under each of the two strategies."""
    cases = [(world, strategy) for world in worlds for strategy in ("fsdp", "flat_sharded")]
    ids = ["-".join(case if len(worlds) > 1 else case[1:]) for case in cases]

    @pytest.fixture(scope="module", params=cases, ids=ids)
    def ranks(request):
        world, strategy = request.param
        return Ranks(request.getfixturevalue(world), strategy)

    return ranks


def expected(loss_fn, *others, **options):
    model = ff.setup_model(RT64, made())
    return wholes(ff.value_and_grad(RT64, loss_fn, **options)(model, *data(), *others)[1])


def by_method(net, x, y):
    return (net.short(x) - y).square().mean()
