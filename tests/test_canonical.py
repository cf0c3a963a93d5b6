"""reduce="canonical": the same bits, however many ranks share the micro-batches of a global batch."""

import gc
import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import fabricfn as ff
from fabricfn import flat
from tests.support.canonical import DISTRIBUTED, ROWS, batch, mean_square, mine, same, seeded, small, sums
from tests.support.worlds import few, world_of

ranks = world_of("threads", 4)
LARGE = flat.buckets.LARGE // 4 + 1001
"""More float32 numbers than travel to every rank."""


# Random gradients, in threads


class Vectors(nn.Module):
    """Its gradients are whatever the loss is given."""

    def __init__(self, *sizes):
        super().__init__()
        self.vectors = nn.ParameterList([torch.zeros(size) for size in sizes])


def dots(net, *vectors):
    return sum((param * vector).sum() for param, vector in zip(net.vectors, vectors, strict=True)) + vectors[0][0] / 3


def rows(n, seed, *sizes):
    """n micro-batches of vectors whose numbers differ by orders of magnitude, so that each order of adding shows."""
    generator = seeded(seed)

    def vector(size):
        return torch.randn(size, generator=generator) * 10 ** (4 * torch.rand(size, generator=generator))

    return [tuple(vector(size) for size in sizes) for _ in range(n)]


def reduced(rt, items, reduce="canonical", weights=None):
    model = ff.setup_model(rt, Vectors(*(len(vector) for vector in items[0])))
    if weights is None:
        grad_fn = ff.accumulate(rt, dots, reduce=reduce)
    else:
        items = [(weight, *item) for weight, item in zip(weights, items, strict=True)]
        grad_fn = ff.accumulate(rt, lambda net, w, *v: (dots(net, *v), w), reduce=reduce, weighted=True)
    loss, grads = grad_fn(model, mine(rt, items))
    return [loss, *grads.params.values()]


@ROWS
@given(data=st.data())
@few(25)
def test_the_bits_depend_on_the_sequence_of_micro_batches_alone(ranks, strategy, data):
    size = data.draw(st.integers(1, 4), "ranks")
    count = data.draw(st.integers(1, 13), "micro-batches a rank")
    items = rows(size * count, data.draw(st.integers(0, 1000), "seed"), 3, 20)
    weights = data.draw(st.none() | st.just([0.1 * (1 + i % 5) for i in range(len(items))]), "weights")
    (expected,) = ranks.run(reduced, items, "canonical", weights, world_size=1)
    for found in ranks.run(reduced, items, "canonical", weights, world_size=size, strategy=strategy):
        assert all(map(same, found, expected))


@pytest.mark.parametrize(("number", "size"), [(8, 2), (6, 2), (8, 4), (12, 4), (6, 3), (9, 3)])
def test_large_gradients_too(ranks, number, size):
    """They are swapped where the tree splits evenly between ranks, otherwise added up in parts."""
    items = rows(number, 0, LARGE, 5)
    (expected,) = ranks.run(reduced, items, world_size=1)
    for found in ranks.run(reduced, items, world_size=size):
        assert all(map(same, found, expected))
        assert all(len(grad.untyped_storage()) < 4 * (len(grad) + 8) for grad in found[1:]), "memory of its own"


def test_the_default_reduction_gives_other_bits(ranks):
    """So what is tested here can fail."""
    items = rows(8, 0, 64)
    found = [ranks.run(reduced, items, "mean", world_size=size)[0][1] for size in (1, 2, 4)]
    assert not same(found[0], found[1]) and not same(found[1], found[2])


def test_a_gradient_that_some_micro_batches_lack_is_zero_there_and_its_sign_is_the_same(ranks):
    """-0.0 + 0.0 is 0.0, but -0.0 alone is -0.0."""

    def partly(net, use, vector):
        loss = (net.vectors[0] * vector).sum()
        return loss + (net.vectors[1] * vector).sum() if use else loss

    def run(rt, uses):
        model = ff.setup_model(rt, Vectors(3, 3))
        grad_fn = ff.accumulate(rt, partly, reduce="canonical")
        items = [(use, torch.tensor([-0.0, 1.0, 1e-8])) for use in uses]
        return list(grad_fn(model, mine(rt, items))[1].params.values())

    for uses in itertools.product((False, True), repeat=4):
        if any(uses):
            (expected,) = ranks.run(run, uses, world_size=1)
            for size, strategy in ((2, "ddp"), (2, "functional"), (4, "ddp")):
                for found in ranks.run(run, uses, world_size=size, strategy=strategy):
                    assert all(map(same, found, expected)), (uses, size)


# What a loss function may do


def compared(rt):
    """Against the default reduction, weights and unequal micro-batches, several models and a frozen part included."""
    frozen = small(2)
    frozen[0].requires_grad_(False)
    models = {"a": ff.setup_model(rt, small(1)), "b": ff.setup_model(rt, frozen)}

    def both(nets, x):
        total = nets["a"](x).square().sum() + nets["b"](x + nets["a"](x)[:, :1]).abs().sum()
        return (total, len(x)), {"rows": len(x)}

    x = list(batch().split([1, 5, 1, 1, 2, 4, 2, 1, 1, 1, 3, 2]))
    results = {}
    for reduce in ("mean", "canonical"):
        grad_fn = ff.accumulate(rt, both, weighted=True, has_aux=True, reduce=reduce)
        (loss, aux), grads = grad_fn(models, mine(rt, x))
        assert [one["rows"] for one in aux] == [len(one) for one in mine(rt, x)]
        assert grads["b"].params["0.weight"] is None and grads["a"].params["0.weight"] is not None
        results[reduce] = [loss, *(grad for one in "ab" for grad in grads[one].params.values() if grad is not None)]
    for found, expected in zip(results["canonical"], results["mean"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    plain = [ff.accumulate(rt, mean_square, reduce=reduce) for reduce in ("mean", "canonical")]
    y = list(batch().split(2))[rt.rank * 3 : rt.rank * 3 + 3]
    one, two = (grad_fn(models["a"], iter(y))[1].params for grad_fn in plain)
    torch.testing.assert_close(dict(two), dict(one), rtol=1e-12, atol=1e-12)
    return results["canonical"]


@ROWS
def test_it_is_the_mean_that_the_default_reduction_gives(ranks, strategy):
    (expected,) = ranks.run(compared, world_size=1, precision=64, strategy="single")
    for size in (1, 2, 3, 4):
        for found in ranks.run(compared, world_size=size, precision=64, strategy=strategy):
            assert all(map(same, found, expected))


def test_gradients_that_share_memory_are_separated(ranks):
    """Autograd hands out two views of one tensor here."""

    def run(rt, reduce):
        model = ff.setup_model(rt, Vectors(3, 3))

        def loss_fn(net, x):
            return ((net.vectors[0].unsqueeze(0) + net.vectors[1].unsqueeze(0)) * x).sum()

        _, grads = ff.accumulate(rt, loss_fn, reduce=reduce)(model, [torch.full((1, 3), 2.0**i) for i in range(4)])
        return [grads.params[name].clone() for name in grads.params]

    for strategy in ("single", "functional"):
        ((canonical,), (plain,)) = (
            ranks.run(run, reduce, world_size=1, strategy=strategy) for reduce in ("canonical", "mean")
        )
        assert torch.equal(canonical[0], torch.full((3,), 15 / 4)) and all(map(torch.equal, canonical, plain))


def test_16_bit_sums_are_held_in_32_bits(ranks):
    def run(rt):
        model = ff.setup_model(rt, Vectors(1))
        grad_fn = ff.accumulate(rt, lambda net, x: (net.vectors[0] * x.to(torch.bfloat16)).sum(), reduce="canonical")
        items = [torch.tensor([256.0]) if rt.rank == 0 and not i else torch.tensor([1.0]) for i in range(4)]
        return grad_fn(model, items)[1].params["vectors.0"]

    for found in ranks.run(run, world_size=2, precision="bf16-true"):
        assert same(found, torch.tensor([263 / 8], dtype=torch.bfloat16))


def test_layouts_do_not_depend_on_the_world(ranks):
    """Norms add up in the order of the memory, so a channels_last gradient comes back alike everywhere."""

    def run(rt):
        module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for param in module.parameters():
                param.copy_(torch.randn(param.shape, generator=seeded(0)))
        model = ff.setup_model(rt, module)
        x = torch.randn(8, 3, 6, 6, generator=seeded(1)).to(memory_format=torch.channels_last)
        grad_fn = ff.accumulate(rt, lambda net, x: net(x).square().mean(), reduce="canonical")
        _, grads = grad_fn(model, mine(rt, list(x.split(1))))
        return [*grads.params.values(), ff.clip_gradients(rt, grads, max_norm=1e-3)[1]], grads.params["weight"].stride()

    ((expected, strides),) = ranks.run(run, world_size=1)
    for found, others in ranks.run(run, world_size=4):
        assert all(map(same, found, expected)) and others == strides


def test_models_stay_as_they_are_and_calls_are_pure(ranks):
    def run(rt):
        model = ff.setup_model(rt, small())
        before = {name: value.clone() for name, value in model.params.items()}
        grad_fn = ff.accumulate(rt, sums, weighted=True, reduce="canonical")
        plain = ff.value_and_grad(rt, sums, weighted=True)
        parts = list(batch().split(3))
        expected = plain(model, batch())[1].params
        first = grad_fn(model, parts)[1].params
        kept = {name: grad.clone() for name, grad in first.items()}
        again = grad_fn(model, parts)[1].params
        assert all(torch.equal(plain(model, batch())[1].params[name], expected[name]) for name in expected)
        with torch.no_grad():
            last = grad_fn(model, parts)[1].params
            assert not torch.is_grad_enabled()
        assert all(torch.equal(model.params[name], before[name]) for name in before)
        return all(
            torch.equal(first[name], kept[name]) and torch.equal(again[name], kept[name])
            and torch.equal(last[name], kept[name])
            for name in kept
        )  # fmt: skip

    for strategy in DISTRIBUTED.values():
        assert ranks.run(run, world_size=2, precision=64, strategy=strategy) == [True, True]


def test_log2_sums_are_alive(ranks):
    """Tensors of the parameter's shape, seen from inside of the loss function."""

    def run(rt, number):
        module, most = Vectors(4321), []

        def loss_fn(net, x):
            tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
            alive = [one for one in tensors if one.shape == (4321,)]
            most.append(len({one.data_ptr() for one in alive}))
            return (net.vectors[0] * x).sum()

        model = ff.setup_model(rt, module)
        ff.accumulate(rt, loss_fn, reduce="canonical")(model, [torch.ones(())] * number)
        return [count - most[0] for count in most]

    (found,) = ranks.run(run, 32, world_size=1, strategy="single")
    assert found == [leaf.bit_count() for leaf in range(32)]


HALF = ff.Precision(compute_dtype=torch.float16, autocast=True, loss_scale=ff.DynamicScale(init_scale=1024.0))


def test_a_loss_scale_is_taken_out_again_in_the_same_bits(ranks):
    def run(rt, reduce="canonical"):
        model = ff.setup_model(rt, small(dtype=torch.float32))
        grad_fn = ff.accumulate(rt, mean_square, reduce=reduce)
        loss, grads = grad_fn(model, mine(rt, list(batch(24, torch.float32).split(2))))
        return [loss, *grads.params.values()]

    (expected,) = ranks.run(run, world_size=1, precision=HALF)
    (plain,) = ranks.run(run, "mean", world_size=1, precision=HALF)
    for found, other in zip(expected, plain, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-4)
    for size, strategy in ((2, "ddp"), (3, "functional")):
        for found in ranks.run(run, world_size=size, strategy=strategy, precision=HALF):
            assert all(map(same, found, expected))


@ROWS
def test_sums_are_held_in_the_dtype_that_the_precision_names(ranks, strategy):
    items = rows(6, 0, 64)
    precise = ff.Precision(reduce_dtype=torch.float64)
    (expected,) = ranks.run(reduced, items, world_size=1, precision=precise)
    torch.testing.assert_close(expected[1], (sum(v.double() for (v,) in items) / 6).float(), rtol=1e-7, atol=0)
    (short,) = ranks.run(reduced, items, world_size=1)
    assert not same(short[1], expected[1])
    for found in ranks.run(reduced, items, world_size=3, precision=precise, strategy=strategy):
        assert all(map(same, found, expected))
