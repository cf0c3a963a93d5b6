"""reduce="canonical" of buffers, and its refusals: each rank raises, and nothing hangs."""

import functools

import pytest
import torch
from torch import nn

import fabricfn as ff
from tests.support.canonical import ROWS, batch, mean_square, mine, same, seeded, small, sums
from tests.support.runtimes import RT
from tests.support.worlds import world_of

ranks = world_of("threads", 4)


# Buffers


def normed():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=seeded(3)))
    return module


def with_statistics(rt, buffers, evaluated=False, weighted=False):
    model = ff.setup_model(rt, normed())
    model = ff.eval_mode(model) if evaluated else model
    loss_fn = sums if weighted else mean_square
    grad_fn = ff.accumulate(rt, loss_fn, reduce="canonical", buffers=buffers, weighted=weighted)
    x = list(batch(48, torch.float32).split(4))
    _, grads = grad_fn(model, mine(rt, x))
    return dict(grads.params), grads.new_buffers, x


@ROWS
def test_the_mean_of_the_buffers_is_the_same_on_every_world(ranks, strategy):
    ((expected, buffers, x),) = ranks.run(with_statistics, "mean", world_size=1)
    for size in (2, 3, 4):
        for found, others, _ in ranks.run(with_statistics, "mean", world_size=size, strategy=strategy):
            assert all(same(found[name], expected[name]) for name in expected)
            assert all(same(others[name], buffers[name]) for name in buffers)
    hidden = [normed()[0](part) for part in x]
    mean = sum(part.mean(0) for part in hidden) / len(hidden)
    torch.testing.assert_close(buffers["1.running_mean"], 0.1 * mean.detach())
    assert buffers["1.num_batches_tracked"].item() == 1
    _, others, _ = ranks.run(with_statistics, "mean", False, True, world_size=2)[0]
    assert same(others["1.running_mean"], buffers["1.running_mean"]), "weights are for the loss"


def test_buffers_that_change_are_refused_unless_somebody_says_what_to_do(ranks):
    for size in (1, 2):
        with pytest.raises(ff.CapabilityError, match=r'1\.running_mean, .*buffers="mean".*GroupNorm or LayerNorm'):
            ranks.run(with_statistics, "rank0", world_size=size)
        with pytest.raises(ff.ConfigurationError, match='buffers="mean"'):
            ranks.run(with_statistics, "local", world_size=size)
        assert ranks.run(with_statistics, "rank0", True, world_size=size)[0][1] is None


def test_counters_that_differ_are_refused_on_every_rank(ranks):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.seen += len(x)
            return (self.weight * x).sum()

    def run(rt, sizes):
        model = ff.setup_model(rt, Counting())
        grad_fn = ff.accumulate(rt, lambda net, x: net(x), reduce="canonical", buffers="mean")
        return grad_fn(model, [torch.ones(size, 3) for size in mine(rt, sizes)])[1]

    assert ranks.run(run, [2, 2, 2, 2], world_size=2)[1].new_buffers["seen"].item() == 2
    for sizes in ([2, 2, 2, 3], [2, 2, 3, 3]):
        assert ranks.run(refused, run, sizes, world_size=2) == [True, True]


def refused(rt, run, sizes):
    with pytest.raises(ff.CapabilityError, match="the buffers seen hold no floating numbers"):
        run(rt, sizes)
    return True


# Refusals: each rank raises, and nothing hangs


def test_no_micro_batch_at_all_is_an_error(ranks):
    def run(rt):
        ff.accumulate(rt, sums, weighted=True, reduce="canonical")(ff.setup_model(rt, small()), [])

    with pytest.raises(ff.ConfigurationError, match="every rank needs at least one"):
        ranks.run(run, world_size=1, precision=64)


def unused_somewhere(rt):
    """Layer 2 is used by one micro-batch of the last rank only, or by none."""
    model = ff.setup_model(rt, small())

    def loss_fn(net, x, whole):
        return (net(x) if whole else net[0](x)).square().mean()

    def items(whole):
        return [(part, whole and rt.rank == 1 and i == 2) for i, part in enumerate(batch().split(6))]

    grad_fn = ff.accumulate(rt, loss_fn, reduce="canonical")
    _, grads = grad_fn(model, items(True))
    assert grads.params["2.weight"].abs().sum() > 0
    with pytest.raises(ff.GradientError, match=r"2 parameters got no gradient: 2\.weight, 2\.bias"):
        grad_fn(model, items(False))
    _, grads = ff.accumulate(rt, loss_fn, reduce="canonical", allow_unused=True)(model, items(False))
    assert grads.params["2.weight"] is None and grads.params["0.weight"] is not None
    return True


@ROWS
def test_unused_means_by_no_micro_batch_of_any_rank(ranks, strategy):
    assert ranks.run(unused_somewhere, world_size=2, precision=64, strategy=strategy) == [True, True]


def test_sparse_gradients_are_refused_on_every_rank(ranks):
    def run(rt):
        model = ff.setup_model(rt, nn.Embedding(5, 3, sparse=rt.rank == 1))
        grad_fn = ff.accumulate(rt, lambda net, i: net(i).sum(), reduce="canonical")
        with pytest.raises(ff.CapabilityError, match=r"weight are sparse.*sparse=False"):
            grad_fn(model, [torch.tensor([rt.rank])] * 2)
        return True

    assert ranks.run(run, world_size=2) == [True, True]


def zero_weights(rt):
    model = ff.setup_model(rt, small())
    with pytest.raises(ff.GradientError, match="sum to zero"):
        ff.accumulate(rt, lambda net, x: (net(x).sum(), 0), weighted=True, reduce="canonical")(model, [batch()])
    return True


def test_weights_that_sum_to_zero_are_an_error(ranks):
    assert ranks.run(zero_weights, world_size=2, precision=64) == [True, True]


def other_strategies():
    functional = ff.strategies.functional()
    made = {name: getattr(functional, name) for name in ("attach", "forward", "backward", "gradients")}
    return {
        "fsdp": ff.strategies.fsdp(),
        "of the user's own": ff.Strategy(name="mine", **made),
        "static graph": ff.strategies.ddp(static_graph=True),
        "hook": ff.strategies.ddp(comm_hook=lambda state, bucket: None),
    }


@pytest.mark.parametrize("strategy", other_strategies().values(), ids=other_strategies())
def test_strategies_that_do_not_know_it_refuse_it_at_once(ranks, strategy):
    with pytest.raises(ff.CapabilityError, match=r'reduce="canonical".*strategy="ddp".*reduce="mean"'):
        ranks.run(functools.partial(ff.accumulate, loss_fn=sums, reduce="canonical"), strategy=strategy, world_size=2)


def test_an_unknown_reduction_is_an_error():
    with pytest.raises(ff.ConfigurationError, match='reduce=\'sum\' is unknown; there are "mean" and "canonical"'):
        ff.accumulate(RT, sums, reduce="sum")


def test_an_exception_in_the_loss_leaves_nothing_behind(ranks):
    def run(rt):
        model = ff.setup_model(rt, small())

        def fails(gradient):
            raise KeyError("here")

        def breaks(net, x):
            hidden = net[0](x)
            if len(x) == 3:
                hidden.register_hook(fails)  # in the backward pass, when the last layer has its gradients already
            return net[2](net[1](hidden)).square().mean()

        grad_fn = ff.accumulate(rt, breaks, reduce="canonical")
        with pytest.raises(KeyError):
            grad_fn(model, [batch(4), batch(4), batch(3)])
        return dict(grad_fn(model, [batch(4)])[1].params)

    for strategy in ("ddp", "functional"):
        for found in ranks.run(run, world_size=2, precision=64, strategy=strategy):
            plain = small()
            plain(batch(4)).square().mean().backward()
            for name, param in plain.named_parameters():
                torch.testing.assert_close(found[name], param.grad, rtol=0, atol=1e-13)
