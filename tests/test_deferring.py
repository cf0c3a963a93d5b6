"""A factory that runs without memory gives the very numbers of the factory, and no rank ever holds them all."""

import copy
import ctypes
import functools
import gc
import math

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import deferring, sharding, testing
from fabricfn.strategies import fsdp
from tests.support.worlds import world_of

CPU = torch.device("cpu")


class Zoo(nn.Module):
    """Initialisation as people write it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=3)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norms = nn.ModuleList(copy.deepcopy(nn.BatchNorm1d(8)) for _ in range(2))
        self.rnn = nn.LSTM(8, 4)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)] + torch.arange(2.0).tolist()
        self.scales = nn.ParameterList(nn.Parameter(torch.full((4,), rate)) for rate in rates)
        self.gain = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.mixed = nn.Parameter(torch.eye(8) + torch.tensor([[0.5] * 8]) * torch.randn(8, 8))
        position = torch.arange(6).unsqueeze(1)
        table = torch.zeros(6, 8)
        table[:, 0::2] = torch.sin(position * torch.exp(torch.arange(0, 8, 2) * (-math.log(1e4) / 8)))
        self.register_buffer("table", table)
        self.register_buffer("mask", torch.ones(4, 4).tril().bool(), persistent=False)
        self.plain = torch.rand(3) + sum(torch.rand(3).double().numpy())
        self.kept = [torch.randperm(5)]
        self.apply(self.init)
        nn.init.orthogonal_(self.mixed)
        with torch.no_grad():
            self.head.weight[torch.rand(11) > 0.5] *= 2.0
            self.gain.copy_(torch.poisson(torch.full((2,), 3.0)))
            if self.gain.sum() > 0:
                self.gain.add_(self.embed.weight[1, :2])

    def init(self, module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(generator=torch.Generator().manual_seed(4))


def state(module):
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items()} | {"plain": module.plain, "kept": module.kept}


def test_the_tape_has_the_bits_of_the_factory():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected, after = Zoo(), torch.rand(3)
        torch.manual_seed(5)
        module, tape = deferring.made(Zoo, CPU)
        assert torch.equal(torch.rand(3), after), "the generator goes on as if the module had been made"
    found = state(module)
    assert [name for name, slot in module.named_parameters() if not slot.is_meta] == ["gain"], "it came with values"
    assert list(found) == list(state(expected))
    for name, value in state(expected).items():
        mine = found[name]
        if isinstance(mine, torch.Tensor) and mine.is_meta:  # one at a time, in any order
            (mine,) = tape.values([mine])
        assert testing.difference(mine, value) is None, name
    assert module.head.weight is module.embed.weight


def test_values_that_nobody_can_make_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3).copy_(CONSTANT))

    with torch.random.fork_rng():
        module, tape = deferring.made(Odd, CPU)
        CONSTANT.add_(1)
        with pytest.raises(ff.ModelError, match="has changed since"):
            tape.values([module.weight])
        with pytest.raises(ff.ModelError, match="cannot be repeated"):
            tape.values([torch.empty(2, device="meta")])

    def fails():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        deferring.made(fails, CPU)
    assert "ff.init_module(rt, factory)" in caught.value.__notes__[0]


CONSTANT = torch.arange(3.0)


def from_factory(rt, deferred):
    torch.manual_seed(7 + rt.rank)  # rank 0 decides
    model = ff.setup_model(rt, Zoo if deferred else ff.init_module(rt, Zoo))
    after = torch.rand(2)
    cut = {name: sharding.is_sharded(value) for name, value in model.params.items()}
    _, grads = ff.value_and_grad(rt, lambda net: net.head(net.embed.weight).square().mean(), allow_unused=True)(model)
    net = ff.to_module(rt, model)
    return state(net), after, cut, {name: value is None for name, value in grads.params.items()}


processes = world_of("processes", 2)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_factory_gives_the_same_model_under_fsdp(processes, precision):
    options = {"strategy": fsdp(units=None), "precision": precision}
    whole, parts = (processes.run(from_factory, deferred, **options) for deferred in (False, True))
    for found, expected in zip(parts, whole, strict=True):
        assert testing.difference(found, expected) is None
    first, second = ({name: value for name, value in part[0].items() if "." in name} for part in parts)
    assert testing.difference(first, second) is None


WIDTH, DEPTH = 1200, 24


def tower():
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)])


def peak():
    """The most memory that this process has held since `forget`, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget():
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def memory_of(rt, deferred):
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back, and holes are not counted
    ff.setup_model(rt, functools.partial(nn.Linear, 8, 8))  # what is loaded once
    forget()
    before = peak()
    model = ff.setup_model(rt, tower if deferred else ff.init_module(rt, tower))
    assert sum(value.to_local().numel() for value in model.params.values()) == WIDTH * WIDTH * DEPTH / rt.world_size
    return (peak() - before) / (4 * WIDTH * WIDTH * DEPTH)


def test_no_rank_ever_holds_the_whole_model(processes):
    shares = processes.run(memory_of, True, strategy=fsdp())
    assert max(shares) < 0.8, shares  # one half, and a few parts of 1/24
    whole = processes.run(memory_of, False, strategy=fsdp())
    assert min(whole) > 1.2, whole
