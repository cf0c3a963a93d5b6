"""ddp, functional and flat on gloo ranks: the cases in which torch's reducer, driven naively, is silently wrong."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.checkpoint import checkpoint

import fabricfn as ff
from fabricfn.strategies import ddp
from tests.support.reducers import DISTRIBUTED, assert_all, assert_close, batch, mlp, seeded, single_grads, squares
from tests.support.worlds import world_of

ranks = world_of("processes", 3)


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
