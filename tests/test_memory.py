"""What is allocated while models are set up and trained, in bytes."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fabricfn as ff
from tests.support.allocations import allocations, made, peak
from tests.support.runtimes import RT
from tests.support.worlds import world_of

processes = world_of("processes", 2)

WIDTH, DEPTH = 640, 4
BLOCK = 4 * (WIDTH * WIDTH + WIDTH)
PARAMETERS = DEPTH * BLOCK
"""Bytes."""
SMALL = 2**16
"""Bytes that are no tensor of parameters: a row of activations, a norm, what a message says of itself."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.fc(x).tanh()


FSDP = ff.strategies.fsdp(units=Block)


def built():
    return nn.Sequential(*(Block() for _ in range(DEPTH)))


def mean_square(net, x):
    return net(x).square().mean()


# Setting up


def set_up(rt, how):
    """(the peak, what is left) of setting up, in bytes."""

    def work():
        if how == "factory":
            return ff.setup_model(rt, built)
        with torch.device("meta" if how == "meta" else rt.device):
            net = built()
        return ff.setup_model(rt, net, donate=how != "copied"), net

    _, sizes = allocations(work)
    return peak(sizes), sum(sizes)


def test_one_process_holds_one_copy_of_what_it_sets_up():
    for how in ("donated", "factory"):
        assert set_up(RT, how) == (PARAMETERS, PARAMETERS)
    assert set_up(RT, "copied") == (2 * PARAMETERS, 2 * PARAMETERS)


def set_up_everywhere(rt, *hows):
    """Of several times, as a tensor that a thread of gloo is the last to let go of counts as held."""
    return {how: tuple(map(min, zip(*(set_up(rt, how) for _ in range(5)), strict=True))) for how in hows}


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_ranks_hold_one_copy_of_what_they_set_up(processes, strategy):
    # torch's reducer makes its buckets here, in which gradients will travel
    expected = 2 * PARAMETERS if strategy == "ddp" else PARAMETERS
    for found in processes.run(set_up_everywhere, "donated", "factory", strategy=strategy):
        assert all(expected <= most < expected + SMALL for most, _ in found.values()), found


def test_a_rank_that_holds_a_shard_never_holds_the_model(processes):
    shard, part = PARAMETERS / 2, BLOCK / 2
    for found in processes.run(set_up_everywhere, "factory", "meta", "donated", strategy=FSDP):
        for how, (most, left) in found.items():
            assert shard <= left < shard + SMALL, (how, found)  # a whole module that was given away is let go
            assert most < (PARAMETERS + shard if how == "donated" else shard + BLOCK + part) + SMALL, (how, found)


# Steps


X = torch.ones(4, WIDTH)


def stepping(rt, optimizer=torch.optim.AdamW, donate=True, **options):
    """(allocations of optimizer_step, of a whole step, clipping included)."""
    model = ff.setup_model(rt, built(), donate=True)
    opt = ff.setup_optimizer(rt, model, optimizer, lr=0.1, **options)
    grad_fn = ff.value_and_grad(rt, mean_square)

    def update(grads):
        nonlocal model, opt
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)

    def step():
        update(ff.clip_gradients(rt, grad_fn(model, X)[1], max_norm=1.0, donate=donate)[0])

    step()
    updating = allocations(functools.partial(update, grad_fn(model, X)[1]))[1]
    return updating, allocations(step)[1]


def by_hand(rt):
    """Allocations of a forward and a backward pass that the user writes, on several ranks under `fully_shard`."""
    net = built()
    if rt.world_size > 1:
        mesh = DeviceMesh.from_group(rt.world.group, "cpu")
        for part in (*net, net):
            fully_shard(part, mesh=mesh)

    def passes():
        mean_square(net, X).backward()
        for param in net.parameters():
            param.grad = None

    passes()
    return allocations(passes)[1]


OPTIMIZERS = (
    (torch.optim.AdamW, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.SGD, {"momentum": 0.9}),
)


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_donated_step_allocates_activations_and_gradients_alone(optimizer, options):
    updating, whole = stepping(RT, optimizer, **options)
    assert updating == []
    hand = by_hand(RT)
    assert made(whole) <= made(hand) + SMALL and peak(whole) <= peak(hand) + SMALL


def test_pure_gradients_are_copied_one_by_one():
    functional = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.functional())
    updating, whole = stepping(functional)
    assert updating == [] and peak(whole) <= peak(by_hand(RT)) + BLOCK + SMALL


def test_on_ranks_messages_come_to_activations_and_gradients(processes):
    hand = by_hand(RT)
    for updating, whole in processes.run(stepping, strategy="flat"):
        assert updating == []
        assert made(whole) <= made(hand) + PARAMETERS + SMALL and peak(whole) <= peak(hand) + SMALL
    hands = processes.run(by_hand, strategy=FSDP)
    ours = processes.run(stepping, strategy=FSDP)
    for (updating, whole), hand in zip(ours, hands, strict=True):
        assert updating == [] and made(whole) <= made(hand) + SMALL


def test_a_pure_step_allocates_what_it_returns():
    updating, whole = stepping(RT, donate=False)
    assert 3 * PARAMETERS <= made(updating) == peak(updating) < 3 * PARAMETERS + SMALL
    assert made(whole) >= 4 * PARAMETERS + made(by_hand(RT))


def test_gradients_are_scaled_and_limited_in_place():
    model = ff.setup_model(RT, built(), donate=True)
    hand = by_hand(RT)
    weighted = ff.value_and_grad(RT, lambda net, x: (net(x).square().sum(), x.numel()), weighted=True)
    weighted(model, X)
    (_, grads), sizes = allocations(functools.partial(weighted, model, X))
    assert made(sizes) <= made(hand) + SMALL and peak(sizes) <= peak(hand) + SMALL
    _, sizes = allocations(lambda: ff.clip_gradients(RT, grads, clip_val=1e-3, donate=True))
    assert made(sizes) <= SMALL
