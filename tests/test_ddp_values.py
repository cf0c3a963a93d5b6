"""Gradients and statistics over gloo ranks are those of one process: unequal ranks, several models, shared memory."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import sharding
from fabricfn.strategies import ddp
from tests.support.reducers import DISTRIBUTED, assert_all, assert_close, batch, mlp, seeded, single_grads, squares
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

ranks = world_of("processes", 3)


def statistics(rt, buffers):
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    _, grads = ff.value_and_grad(rt, squares, buffers=buffers)(model, batch(rt))
    return grads.new_buffers["1.running_mean"], grads.new_buffers["1.num_batches_tracked"]


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_batch_statistics_are_equal_on_all_ranks(ranks, strategy):
    results = {
        how: ranks.run(statistics, how, strategy=DISTRIBUTED[strategy](), precision=64)
        for how in ("local", "rank0", "mean")
    }
    local = [mean for mean, _ in results["local"]]
    assert not torch.equal(local[0], local[1])
    for mean, count in results["rank0"]:
        assert torch.equal(mean, local[0]) and count == 1
    for mean, count in results["mean"]:
        torch.testing.assert_close(mean, sum(local) / 3)
        assert torch.equal(mean, results["mean"][0][0]) and count == 1


def weighted(rt):
    """Ranks with 1, 4 and 7 rows, cut into unequal numbers of unequal micro-batches."""
    whole = torch.randn(12, 4, generator=seeded(1), dtype=torch.float64)
    mine = whole.split([1, 4, 7])[rt.rank]

    def summed(net, x):
        return net(x).square().sum(), x.numel()

    model = ff.setup_model(rt, mlp())
    loss, grads = single_grads()
    for found in (
        ff.value_and_grad(rt, summed, weighted=True)(model, mine),
        ff.accumulate(rt, summed, weighted=True)(model, [mine] if rt.strategy.shard else mine.split(2)),
    ):
        torch.testing.assert_close(found[0], loss, rtol=0, atol=1e-12)
        assert_close(found[1], grads)
    torch.testing.assert_close(ff.value(rt, summed, weighted=True)(model, mine), loss, rtol=0, atol=1e-12)
    return True


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_weighted_means_over_uneven_ranks_are_exact(ranks, strategy):
    assert_all(ranks.run(weighted, strategy=DISTRIBUTED[strategy](), precision=64))


def second_order(rt):
    def maml(net, x):
        params = dict(net.named_parameters())
        inner = functional_call(net, params, (x,)).square().mean()
        steps = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(params.items(), steps, strict=True)}
        return functional_call(net, fast, (x,)).square().mean()

    model = ff.setup_model(rt, mlp())
    if rt.strategy.shard:
        with pytest.raises(ff.CapabilityError, match=rf"{rt.strategy.name}\(units=None\)"):
            ff.value_and_grad(rt, maml)(model, batch(rt))
        rt = dataclasses.replace(rt, strategy=getattr(ff.strategies, rt.strategy.name)(units=None))
        model = ff.setup_model(rt, mlp())
    _, grads = ff.value_and_grad(rt, maml)(model, batch(rt))
    module = mlp()
    (sum(maml(module, part) for part in batch_of_all(rt.world_size)) / rt.world_size).backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(sharding.whole(grads.params[name]), param.grad, rtol=0, atol=1e-11)
    return True


def batch_of_all(world_size):
    return torch.randn(12, 4, generator=seeded(1), dtype=torch.float64).tensor_split(world_size)


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_maml(ranks, strategy):
    assert_all(ranks.run(second_order, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2))


def adversaries(rt):
    gen, disc = ff.setup_model(rt, mlp(seed=1)), ff.setup_model(rt, mlp(out=1, seed=2))
    opts = [ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.05) for model in (gen, disc)]

    def d_loss(disc, gen, z):
        return F.softplus(disc(gen(z))).mean() + F.softplus(-disc(z)).mean()

    def g_loss(gen, disc, z):
        return F.softplus(-disc(gen(z))).mean()

    ema = gen
    for _ in range(3):
        _, grads = ff.value_and_grad(rt, d_loss)(disc, gen, batch(rt))
        disc, opts[1] = ff.optimizer_step(rt, disc, opts[1], grads, donate=True)
        _, grads = ff.value_and_grad(rt, g_loss)(gen, disc, batch(rt))
        gen, opts[0] = ff.optimizer_step(rt, gen, opts[0], grads)
        ema = ff.map_params(lambda a, b: 0.5 * a + 0.5 * b, ema, gen)
        (_, aux), grads = ff.value_and_grad(  # the teacher is another record of the student's engine
            rt, lambda net, teacher, x: ((net(x) - teacher(x)).square().mean(), teacher(x)), has_aux=True
        )(gen, ema, batch(rt))
        gen, opts[0] = ff.optimizer_step(rt, gen, opts[0], grads, donate=True)
        assert torch.equal(aux, ff.apply(rt, ema, batch(rt)))
    return [value for model in (gen, disc, ema) for value in ff.gather_params(rt, model).values()]


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_dcgan_and_ema_distillation_agree_with_one_process(ranks, strategy):
    expected = adversaries(RT64)
    for found in ranks.run(adversaries, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


class Experts(nn.Module):
    """Two experts with statistics; a rank uses the one of its number."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2))

    def forward(self, x, which):
        return self.experts[which](x)


def unequal_statistics(rt):
    model = ff.setup_model(rt, Experts())
    loss = ff.value_and_grad(rt, lambda net, x: net(x, rt.rank).square().mean(), allow_unused=True)
    _, grads = loss(model, batch(rt))
    zero = ff.setup_model(rt, nn.Sequential(nn.BatchNorm1d(4)))  # on rank 0 the mean stays as it was: zero
    _, quiet = ff.value_and_grad(rt, squares)(zero, batch(rt) * rt.rank)
    return dict(grads.new_buffers), dict(quiet.new_buffers)


@pytest.mark.parametrize("strategy", ["functional", "find_unused", "flat", "flat, many buckets"])
def test_statistics_that_change_on_some_ranks_only_are_not_mixed_up(ranks, strategy):
    (a, quiet_a), (b, quiet_b) = ranks.run(
        unequal_statistics, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2
    )
    assert len(a) == 6
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(quiet_a, quiet_b, rtol=0, atol=0)
    assert not a["experts.1.1.running_mean"].any() and a["experts.0.1.running_mean"].any()  # rank 0's, by name
    assert quiet_a["0.running_var"].eq(0.9).all() and not quiet_a["0.running_mean"].any()


class Shared(nn.Module):
    """Autograd hands out two views of one gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * (self.a.unsqueeze(0) + self.b.unsqueeze(0))


def shared_gradients(rt):
    model, x = ff.setup_model(rt, Shared()), batch(rt)
    module, whole = Shared().double(), torch.cat(batch_of_all(rt.world_size))
    module(whole).square().mean().backward()

    def summed(net, x):
        return net(x).square().sum(), x.numel()

    for found in (
        ff.value_and_grad(rt, summed, weighted=True)(model, x),
        ff.accumulate(rt, squares)(model, x.tensor_split(2)),
        ff.accumulate(rt, summed, weighted=True)(model, x.split(1)),
    ):
        for name, param in module.named_parameters():
            torch.testing.assert_close(sharding.whole(found[1].params[name]), param.grad, rtol=0, atol=1e-12)
    return True


@pytest.mark.parametrize("strategy", [*DISTRIBUTED, "bucket views", "static"])
def test_gradients_that_share_memory_are_not_changed_twice(ranks, strategy):
    more = {"bucket views": ddp(gradient_as_bucket_view=True), "static": ddp(static_graph=True)}
    strategy = more.get(strategy) or DISTRIBUTED[strategy]()
    if strategy.name == "ddp" and strategy is more["static"]:
        with pytest.raises(ff.CapabilityError, match="one loss function"):  # three losses, one graph
            ranks.run(shared_gradients, strategy=strategy, precision=64, world_size=2)
        return
    assert_all(ranks.run(shared_gradients, strategy=strategy, precision=64, world_size=2))


def uneven_counts(rt):
    """Rank 0 has one micro-batch, rank 1 two, rank 2 three: the mean is over the ranks' means."""
    model = ff.setup_model(rt, mlp())
    micro = torch.randn(6, 5, 4, generator=seeded(1), dtype=torch.float64)
    mine = micro.split([1, 2, 3])[rt.rank]
    _, grads = ff.accumulate(rt, squares)(model, mine)
    module = mlp()
    (sum(sum(squares(module, one) for one in part) / len(part) for part in micro.split([1, 2, 3])) / 3).backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(grads.params[name], param.grad, rtol=0, atol=1e-12)

    def masks(net, x):
        return net(x).mean(), torch.rand(3)

    (_, drawn), _ = ff.accumulate(rt, masks, has_aux=True)(model, mine, rng=ff.key(0))
    assert bool(ff.gather_params(rt, model, dst=1)) is (rt.rank == 1)
    return torch.stack(drawn)


@pytest.mark.parametrize(
    "strategy", [name for name in DISTRIBUTED if not DISTRIBUTED[name]().shard]
)  # test_fsdp: refused
def test_ranks_with_other_numbers_of_micro_batches(ranks, strategy):
    drawn = torch.cat(ranks.run(uneven_counts, strategy=DISTRIBUTED[strategy](), precision=64))
    model = ff.setup_model(RT64, nn.Linear(4, 1))
    (_, expected), _ = ff.accumulate(
        RT64, lambda net, x: (net(x).mean(), torch.rand(3)), has_aux=True
    )(model, [torch.ones(1, 4)] * 6, rng=ff.key(0))  # fmt: skip
    assert torch.equal(drawn, torch.stack(expected))
