"""The strategy model_parallel: layers cut over neighbouring ranks, and over the data axis; against `single`."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import testing
from fabricfn.sharding import local_of
from fabricfn.testing import cases
from tests.support.model_parallel import (
    NETS,
    ROWS,
    SEQUENCE,
    Mlp,
    close,
    cross_entropy,
    double,
    ff_full,
    gradients,
    loop,
    mine,
    parallel,
)
from tests.support.worlds import few, world_of

ranks = world_of("threads", 4)


# The laws


@pytest.mark.parametrize("strategy", [*ROWS.values(), parallel(plan=SEQUENCE), parallel(plan=SEQUENCE, fsdp=True)])
def test_equivalence(ranks, strategy):
    train = loop(batch_size=11, steps=2)
    testing.check_equivalence(train, accumulation=(2,), strategies=(strategy,), world_sizes=(4,), ranks=ranks)


def test_any_number_of_peers(ranks):
    net = cases.initialised(Mlp(3, 8, bias=True), 5)
    x, y = cases.filled((13, 3), torch.float64, 1), cases.filled((13, 3), torch.float64, 2)
    train = testing.training_loop(net, cases.mean_square, (x, y), steps=3, lr=0.1, momentum=0.9)
    plan = {"up": "colwise", "down": "rowwise"}
    laws = ("purity", "equivalence", "donation", "accumulation", "resume")
    testing.check(train, laws, strategies=(parallel(2, plan),), world_sizes=(2,), ranks=ranks)
    for strategy, size in ((parallel(4, plan), 4), (parallel(1, plan), 1), (parallel(1, plan, fsdp=True), 2)):
        testing.check_equivalence(train, accumulation=(2,), strategies=(strategy,), world_sizes=(size,), ranks=ranks)


def test_pure_and_resumed(ranks):
    testing.check(loop(steps=2), ("purity", "resume"), strategies=(parallel(fsdp=True),), world_sizes=(4,), ranks=ranks)


@pytest.mark.parametrize("strategy", ROWS.values(), ids=ROWS)
def test_clipping_gives_the_norm_and_the_gradients_of_single(ranks, strategy):
    tied = strategy is not ROWS["2-D with fsdp"]
    (expected,) = double(ranks, gradients, "single", NETS[tied], world_size=1)
    for found in double(ranks, gradients, strategy, NETS[tied]):
        close(found, expected)


@given(
    words=st.sampled_from([("colwise", "rowwise"), ("colwise_gathered", "rowwise"), ("colwise", "replicate")]),
    width=st.integers(1, 3),
    hidden=st.integers(1, 4),
    bias=st.booleans(),
    fsdp=st.booleans(),
    number=cases.accumulations(3),
)
@few(5)
def test_equivalence_for_any_sizes(ranks, words, width, hidden, bias, fsdp, number):
    net = cases.initialised(Mlp(width, 2 * hidden, bias), width + hidden)
    x, y = cases.filled((13, 3), torch.float64, 1), cases.filled((13, width), torch.float64, 2)
    train = testing.training_loop(net, cases.mean_square, (x, y), lr=0.1, momentum=0.9, steps=2)
    strategy = parallel(plan={"up": words[0], "down": words[1]}, fsdp=fsdp)
    testing.check_equivalence(train, accumulation=(number,), strategies=(strategy,), world_sizes=(4,), ranks=ranks)


# Values


def around(rt):
    model = ff.setup_model(rt, NETS[True])
    ema = ff.map_params(lambda value: value * 0.5, model)
    weight = model.params["blocks.0.up.weight"]
    module = ff.to_module(rt, ema)

    def distil(net, teacher, tokens):
        return F.mse_loss(net(tokens), teacher(tokens).detach())

    loss, grads = ff.value_and_grad(rt, distil)(model, ema, mine(rt))
    return {
        "applied": ff.all_gather(rt, ff.apply(rt, ema, mine(rt))),
        "plain": ff.all_gather(rt, module(mine(rt)).detach()),
        "value": ff.all_reduce(rt, ff.value(rt, cross_entropy)(model, mine(rt))),
        "loss": ff.all_reduce(rt, loss),
        "grads": {name: ff_full(grad) for name, grad in grads.params.items()},
        "local": tuple(local_of(weight).shape),
        "placed": tuple(getattr(weight, "placements", ())),
    }


@pytest.mark.parametrize("strategy", ROWS.values(), ids=ROWS)
def test_apply_teachers_averages_and_plain_modules(ranks, strategy):
    single = ranks.run(around, strategy="ddp", world_size=2, precision="64-true")[0]
    for found in double(ranks, around, strategy):
        placed, local = found.pop("placed"), found.pop("local")
        assert (placed, local) == (
            ((Replicate(), Shard(0)), (16, 8))
            if strategy is ROWS["tensor parallel"]
            else ((Shard(1), Shard(0)), (16, 4))
        )
        close(found["applied"], found["plain"])
        close(found, {name: value for name, value in single.items() if name in found})


def unsharded(rt, net):
    model = ff.setup_model(rt, net)

    def loss_fn(net, tokens):
        with ff.unsharded(rt, net.blocks[0]):
            penalty = sum(p.square().sum() for p in net.blocks[0].parameters())
        return cross_entropy(net, tokens) + penalty

    _, grads = ff.value_and_grad(rt, loss_fn)(model, mine(rt))
    return {name: ff_full(grad) for name, grad in grads.params.items()}


@pytest.mark.parametrize("strategy", ROWS.values(), ids=ROWS)
def test_whole_weights_inside_a_loss(ranks, strategy):
    (expected,) = double(ranks, unsharded, "single", NETS[True], world_size=1)
    for found in double(ranks, unsharded, strategy, NETS[True]):
        close(found, expected)


def own_plan(net, mesh):
    for block in net.blocks:
        styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, styles)
    return net


STYLES = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}


@pytest.mark.parametrize("plan", [own_plan, STYLES], ids=["function", "torch's styles"])
def test_a_plan_in_torchs_own_words(ranks, plan):
    (expected,) = double(ranks, gradients, "single", NETS[False], world_size=1)
    for found in double(ranks, gradients, parallel(plan=plan), NETS[False]):
        close(found, expected)
