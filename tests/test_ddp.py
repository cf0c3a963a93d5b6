"""ddp, functional and flat on gloo ranks: the cases in which torch's reducer, driven naively, is silently wrong."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fabricfn as ff
from fabricfn import sharding
from fabricfn.strategies import ddp, flat
from tests.worlds import world_of

DISTRIBUTED = {name: make for name, make in ff.strategies.NAMES.items() if make().max_ranks is None}
DISTRIBUTED["find_unused"] = lambda: ddp(find_unused_parameters=True)
DISTRIBUTED["flat, many buckets"] = lambda: flat(bucket_cap_mb=0.0001)


ranks = world_of("processes", 3)


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
    rt = ff.Runtime(world=ff.World(), precision=ff.Precision.parse(64), strategy=ff.strategies.single())
    model = ff.setup_model(rt, mlp() if module is None else module)
    return ff.value_and_grad(rt, loss_fn)(model, batch(rt) if x is None else x)


def partly_used(rt):
    model = ff.setup_model(rt, mlp())
    with pytest.raises(ff.GradientError, match=r"4 parameters got no gradient: 1\.weight, 1\.bias, 2\.weight"):
        ff.value_and_grad(rt, lambda net, x: net[0](x).mean())(model, batch(rt))
    for _ in range(2):
        assert_close(ff.value_and_grad(rt, squares)(model, batch(rt))[1], single_grads()[1])
    return True


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_parameters_without_gradient_are_an_error_at_once_and_the_next_call_is_right(ranks, strategy):
    assert_all(ranks.run(partly_used, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2))


def unused_somewhere(rt):
    """Layer 1 is used on rank 1 only, layer 2 nowhere."""
    model = ff.setup_model(rt, mlp())
    grad_fn = ff.value_and_grad(rt, allow_unused=True, loss_fn=rank_dependent(rt))
    for _ in range(2):
        _, grads = grad_fn(model, batch(rt))
    assert grads.params["2.weight"] is None
    module = mlp()
    ((rank_loss(0, module, batch_of(0)) + rank_loss(1, module, batch_of(1))) / 2).backward()
    torch.testing.assert_close(grads.params["0.weight"], module[0].weight.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(grads.params["1.weight"], module[1].weight.grad, rtol=0, atol=1e-12)
    return True


def batch_of(rank):
    return torch.randn(12, 4, generator=seeded(1), dtype=torch.float64).tensor_split(2)[rank]


def rank_loss(rank, net, x):
    return (net[1](net[0](x)) if rank == 1 else net[0](x)).square().mean()


def rank_dependent(rt):
    return lambda net, x: rank_loss(rt.rank, net, x)


@pytest.mark.parametrize("strategy", ["functional", "find_unused", "flat", "flat, many buckets"])
def test_unused_parameters_are_none_only_where_no_rank_used_them(ranks, strategy):
    assert_all(ranks.run(unused_somewhere, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2))


def refuses_unused(rt):
    ff.value_and_grad(rt, squares, allow_unused=True)


def test_allow_unused_under_plain_ddp_names_the_option(ranks):
    with pytest.raises(ff.CapabilityError, match="find_unused_parameters=True"):
        ranks.run(refuses_unused, strategy="ddp", world_size=2)


def static_graph(rt):
    model = ff.setup_model(rt, mlp())
    micro = ff.accumulate(rt, squares)
    parts = list(batch(rt).tensor_split(2))
    expected = single_grads()[1]
    for _ in range(3):
        assert_close(micro(model, parts)[1], expected)
    with pytest.raises(ff.CapabilityError, match="one loss function per model"):
        ff.value_and_grad(rt, lambda net, x: net[0](x).mean())(model, batch(rt))
    return True


def test_a_static_graph_accumulates_and_refuses_a_second_loss(ranks):
    assert_all(ranks.run(static_graph, strategy=ddp(static_graph=True), precision=64, world_size=2))


def bits(rt):
    """The gradients of one call, after different histories."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(12)]
    module, x = nn.Sequential(*layers), torch.randn(30, 64).tensor_split(3)[rt.rank]

    def grads(model, loss=squares):
        return list(ff.value_and_grad(rt, loss)(model, x)[1].params.values())

    model, other = ff.setup_model(rt, module), ff.setup_model(rt, module)
    first, second = grads(model), grads(model)
    grads(other, lambda net, x: net(x).abs().mean() + net[3](x).mean())
    third = grads(other)
    return all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


@pytest.mark.parametrize("options", [{}, {"bucket_cap_mb": 0.02}, {"find_unused_parameters": True}])
def test_three_ranks_give_the_same_bits_whatever_ran_before(ranks, options):
    assert_all(ranks.run(bits, strategy=ddp(**options)))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("in backward")


def failing(rt):
    model = ff.setup_model(rt, mlp())

    def in_forward(net, x):
        net(x)
        raise KeyError("in forward")

    def in_backward(net, x):
        return net[2](net[1](Fails.apply(net[0](x)))).mean()

    for bad, kind in ((in_forward, KeyError), (in_backward, ValueError)):
        with pytest.raises(kind):
            ff.value_and_grad(rt, bad)(model, batch(rt))
        for _ in range(2):
            assert_close(ff.value_and_grad(rt, squares)(model, batch(rt))[1], single_grads()[1])
    return True


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_exceptions_leave_a_whole_engine(ranks, strategy):
    assert_all(ranks.run(failing, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2))


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


def bucket_views(rt):
    model = ff.setup_model(rt, mlp())
    _, first = ff.value_and_grad(rt, squares)(model, batch(rt))
    kept = {name: grad.clone() for name, grad in first.params.items()}
    ff.value_and_grad(rt, lambda net, x: net(x).abs().sum())(model, batch(rt))
    return all(torch.equal(kept[name], grad) for name, grad in first.params.items())


def test_gradients_never_alias_the_reducers_buckets(ranks):
    assert_all(ranks.run(bucket_views, strategy=ddp(gradient_as_bucket_view=True), precision=64, world_size=2))


def counting_hook(counts, bucket):
    counts.append(bucket.index())
    return default_hooks.allreduce_hook(None, bucket)


def synchronisations(rt):
    counts = []
    strategy = ddp(comm_hook=counting_hook, comm_state=counts)
    rt = ff.Runtime(world=rt.world, precision=rt.precision, strategy=strategy)
    model = ff.setup_model(rt, mlp())
    _, grads = ff.accumulate(rt, squares)(model, batch(rt).tensor_split(3))
    assert_close(grads, single_grads()[1])
    return len(counts) == 1


def test_accumulation_synchronises_once_and_a_hook_of_torch_is_used(ranks):
    assert_all(ranks.run(synchronisations, precision=64, world_size=2))


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
    one = ff.Runtime(world=ff.World(), precision=ff.Precision.parse(64), strategy=ff.strategies.single())
    expected = adversaries(one)
    for found in ranks.run(adversaries, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def own_values(rt):
    model = ff.setup_model(rt, mlp(seed=rt.rank))
    return ff.gather_params(rt, model)


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_all_ranks_start_from_rank_0s_values(ranks, strategy):
    for found in ranks.run(own_values, strategy=DISTRIBUTED[strategy](), precision=64):
        torch.testing.assert_close(found, {n: p.detach() for n, p in mlp(seed=0).named_parameters()}, rtol=0, atol=0)


def other_module(rt):
    ff.setup_model(rt, mlp(out=1 + rt.rank))


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_ranks_with_different_modules_are_an_error(ranks, strategy):
    with pytest.raises(ff.MismatchError, match=r"rank 1 set up another module than rank 0.*2\.weight"):
        ranks.run(other_module, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2)


def frozen(rt):
    model = ff.setup_model(rt, mlp().requires_grad_(False))
    head = ff.setup_model(rt, nn.Linear(4, 1))
    _, grads = ff.value_and_grad(rt, lambda head, body, x: head(body(x)).mean())(head, model, batch(rt))
    return grads.params["weight"] is not None


def test_a_wholly_frozen_model_can_be_set_up(ranks):
    assert_all(ranks.run(frozen, strategy="ddp", precision=64, world_size=2))


def test_options_are_torchs_and_unknown_ones_are_named():
    with pytest.raises(ff.ConfigurationError, match=r"no option bucket_size; there are .*bucket_cap_mb"):
        ddp(bucket_size=3)
    with pytest.raises(ff.ConfigurationError, match="broadcast_buffers"):
        ddp(broadcast_buffers=True)


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
    one = ff.Runtime(world=ff.World(), precision=ff.Precision.parse(64), strategy=ff.strategies.single())
    model = ff.setup_model(one, nn.Linear(4, 1))
    (_, expected), _ = ff.accumulate(
        one, lambda net, x: (net(x).mean(), torch.rand(3)), has_aux=True
    )(model, [torch.ones(1, 4)] * 6, rng=ff.key(0))  # fmt: skip
    assert torch.equal(drawn, torch.stack(expected))


def garbage(rt):
    import gc
    import weakref

    model = ff.setup_model(rt, mlp())
    grad_fn = ff.value_and_grad(rt, squares)
    x = batch(rt)
    seen = weakref.ref(x)
    gc.disable()
    grad_fn(model, x)
    del x
    alive = seen() is not None
    gc.enable()
    return not alive


@pytest.mark.parametrize("strategy", DISTRIBUTED)
def test_a_batch_does_not_wait_for_the_garbage_collector(ranks, strategy):
    assert_all(ranks.run(garbage, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2))


def inner_backward(rt):
    def loss_fn(net, x):
        hidden = checkpoint(net[0], x.requires_grad_(), use_reentrant=True)  # net[0] is used inside and outside of it
        return net[2](net[1](net[0](hidden))).square().mean()

    model = ff.setup_model(rt, mlp())
    expected = single_grads(loss_fn)[1]
    for _ in range(2):
        assert_close(ff.value_and_grad(rt, loss_fn)(model, batch(rt))[1], expected)
    sparse = ff.setup_model(rt, nn.Embedding(4, 2, sparse=True))
    with pytest.raises(ff.CapabilityError, match='strategy="ddp"'):
        ff.value_and_grad(rt, lambda net, x: net(x).sum())(sparse, torch.tensor([1]))
    return True


@pytest.mark.parametrize("strategy", ["flat", "flat, many buckets"])
def test_flat_buckets_wait_for_gradients_that_come_twice_and_refuse_sparse_ones(ranks, strategy):
    assert_all(ranks.run(inner_backward, strategy=DISTRIBUTED[strategy](), precision=64, world_size=2))
