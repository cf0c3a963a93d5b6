"""model_parallel draws what one process draws; and fsdp in groups. Random numbers need processes."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import testing
from fabricfn.sharding import is_sharded, local_of
from fabricfn.testing import cases
from tests.support.model_parallel import (
    NETS,
    SEQUENCE,
    TOKENS,
    Net,
    close,
    cross_entropy,
    double,
    gradients,
    loop,
    made,
    parallel,
)
from tests.support.worlds import world_of

ranks = world_of("threads", 4)
processes = world_of("processes", 4)


@pytest.mark.parametrize("strategy", [parallel(), parallel(plan=SEQUENCE, fsdp=True)], ids=["whole", "sequence, 2-D"])
def test_dropout_is_that_of_one_process_between_layers_and_on_parts(processes, strategy):
    train = testing.training_loop(made(dropout=0.5), cross_entropy, TOKENS, steps=2, lr=0.1)
    (expected, *_) = double(processes, train, "ddp", world_size=2)
    for found in double(processes, train, strategy):
        close(found, expected)


def noises(net, x):
    y = net(x)
    return {
        "rand": torch.rand_like(y),
        "randn": torch.randn_like(y, dtype=torch.float32),
        "randint": torch.randint_like(y, 7),
        "below": torch.randint_like(y, 3, 7),
        "filled": [torch.empty_like(y).normal_(1, 2), torch.empty_like(y).uniform_(1, 2)],
        "exponential": torch.empty_like(y).exponential_(),
        "bernoulli": torch.bernoulli(y.sigmoid()),
        "dropout": F.dropout(y.transpose(0, 1), 0.3),
        "native": torch.native_dropout(y, 0.3, True),
        "next": torch.rand(2),
    }


def drawn(rt):
    model = ff.setup_model(rt, cases.initialised(nn.Sequential(nn.Linear(3, 6)), 2))
    return ff.apply(rt, model, cases.filled((8, 3), torch.float64, 3), method=noises, rng=ff.key(3))


def test_parts_of_random_tensors_are_those_of_the_whole(processes):
    (expected,) = double(processes, drawn, "single", world_size=1)
    for found in double(processes, drawn, parallel(plan={"0": "colwise"}), world_size=2):
        close(found, expected)


def from_factory(rt):
    torch.manual_seed(1)
    model = ff.setup_model(rt, lambda: Net(tied=True))
    return is_sharded(model.params["blocks.0.up.weight"]), ff.gather_params(rt, model)


@pytest.mark.parametrize(("strategy", "size"), [(parallel(), 2), (parallel(fsdp=True), 4)], ids=["peers", "2-D"])
def test_a_factory_gives_the_values_that_one_process_makes(processes, strategy, size):
    ((_, expected),) = double(processes, from_factory, "single", world_size=1)
    for sharded, found in double(processes, from_factory, strategy, world_size=size):
        assert sharded
        close(found, expected, 0.0)


# Shards in groups

GROUPS = {
    "plain": ff.strategies.fsdp(replicate=2),
    "options": ff.strategies.fsdp(
        replicate=2, cpu_offload=True, prefetch=1, ignored_params=("embed.weight", "*.down.*"), gradient_divide_factor=4
    ),
}


@pytest.mark.parametrize("strategy", GROUPS.values(), ids=GROUPS)
def test_fsdp_in_groups_obeys_the_laws(ranks, strategy):
    train = loop(batch_size=11, steps=2)
    testing.check(train, ("equivalence", "donation"), strategies=(strategy,), world_sizes=(4,), ranks=ranks)


def test_fsdp_in_groups_on_gloo(processes):
    (expected,) = double(processes, gradients, "single", NETS[True], world_size=1)
    for found in double(processes, gradients, GROUPS["plain"], NETS[True]):
        close(found, expected)


def where_it_is(rt):
    weight = ff.setup_model(rt, NETS[True]).params["blocks.0.up.weight"]
    return rt.rank, rt.world_size, tuple(local_of(weight).shape), weight.placements, rt.mesh.mesh_dim_names


def test_fsdp_in_groups_cuts_over_a_group_only(ranks):
    found = double(ranks, where_it_is, ff.strategies.fsdp(replicate=2))
    assert found == [(r, 4, (16, 8), (Replicate(), Shard(0)), ("replicate", "shard")) for r in range(4)]
