"""Models cut by fsdp and flat_sharded: computing with them, making them without values, and what is refused."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import fabricfn as ff
from tests.support.fully_sharded import (
    by_method,
    close,
    data,
    expected,
    gradients,
    made,
    mine,
    mse,
    sharded,
    under_either,
    wholes,
)
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

threads, processes = world_of("threads", 4), world_of("processes", 2)
four, two = under_either("threads"), under_either("processes")
ranks = under_either("threads", "processes")


# What it cannot do, and what goes wrong


def refusals(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    right = gradients(rt, model, mse)

    def outside(net, x, y):
        return mse(net, x, y) + net.blocks[1].lin.weight.square().sum()

    def second(net, x, y):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return grad.square().sum()

    def first(net, x, y):
        x = x.clone().requires_grad_()
        out = net(x)
        (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        return (out * grad.sum()).mean()

    def failing(net, x, y):
        return Boom.apply(net(x)).mean()

    def halfway(net, x, y):
        x = net.inp(x)
        for block in net.blocks[:2]:
            x = x + block(x)
        return net.blocks[2](Boom.apply(x)).mean()  # the backward pass is gathering blocks[1] when it fails

    def breaking(net, x, y):
        net.blocks[0](net.inp(x))
        raise ValueError("in the middle")

    for loss_fn, kind, text in (
        (outside, ff.CapabilityError, r"weights of a unit \(blocks.0, blocks.1, blocks.2\).*ff.unsharded"),
        (second, ff.CapabilityError, "backward pass of its own|create_graph=True"),
        (by_method, ff.GradientError, "8 parameters got no gradient: blocks.1.lin.weight"),
        (failing, ZeroDivisionError, "boom"),
        (halfway, ZeroDivisionError, "boom"),
        (breaking, ValueError, "in the middle"),
        *([(first, ff.CapabilityError, "backward pass of its own")] if rt.strategy.name == "fsdp" else []),
    ):
        with pytest.raises(kind, match=text):
            gradients(rt, model, loss_fn)
        close(gradients(rt, model, mse), right, 0)
        with pytest.raises(kind, match=text):
            ff.accumulate(rt, loss_fn)(model, [mine(rt, data())] * 2)
        close(gradients(rt, model, mse), right, 0)
    with pytest.raises(ff.CapabilityError, match="torch.func"):
        torch.func.vmap(lambda x: ff.apply(rt, model, x))(data()[0])


class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError("boom")


def test_what_it_cannot_do_is_refused_and_the_engine_goes_on(ranks):
    ranks.run(refusals)


def leaking(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    kept = []

    def loss_fn(net, x, y):
        kept.append(net(x))
        return mse(net, x, y)

    right = gradients(rt, model, mse)
    close(gradients(rt, model, loss_fn), right, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|a second time"):
        kept[0].sum().backward()
    close(gradients(rt, model, mse), right, 0)


def test_a_graph_that_was_kept_fails_and_spoils_nothing(ranks):
    ranks.run(leaking)


def test_a_graph_that_was_kept_spoils_nothing_under_single():
    model, kept = ff.setup_model(RT64, made()), []

    def loss_fn(net, x, y):
        kept.append(net(x))
        return mse(net, x, y)

    right = gradients(RT64, model, loss_fn)
    kept[0].sum().backward()
    close(gradients(RT64, model, mse), right, 0)


def foreign(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    whole = dataclasses.replace(model, params=ff.gather_params(rt, model))
    with pytest.raises(ff.ModelError, match="a whole tensor, but here every rank holds a shard"):
        ff.apply(rt, whole, data()[0])
    mixed = nn.Sequential(nn.Linear(5, 5).double(), nn.Linear(5, 3))
    if rt.strategy.name == "flat_sharded":
        return
    with pytest.raises(ff.CapabilityError, match=r"one dtype, found float32, float64.*strategy=\"ddp\""):
        ff.setup_model(dataclasses.replace(rt, precision=ff.Precision.parse("bf16-mixed")), mixed)


def test_values_that_do_not_fit_are_refused(four):
    four.run(foreign, world_size=2)


# Computing with it


def computing(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    half = ff.map_params(lambda value: 0.5 * value, model)
    x, _ = data()
    out = [ff.apply(rt, one, x) for one in (model, half, model)]  # no value goes stale
    assert torch.equal(out[0], out[2])
    short = ff.apply(rt, half, x, method="short")
    with torch.no_grad():
        assert torch.equal(ff.apply(rt, half, x), out[1])
    inner = x.clone().requires_grad_()
    result = ff.apply(rt, half, inner)
    ff.apply(rt, model, x)  # other values are bound before the caller goes back
    result.sum().backward()
    with pytest.raises(ff.CapabilityError, match="no further Model"):
        ff.apply(rt, model, half, inner, method=lambda net, other, x: net(x) + other(x))
    both = ff.apply(rt, model, half, x, method=lambda net, other, x: net(x) + other(x))
    return out[0], out[1], short, inner.grad, both


def test_apply_computes_with_any_record_and_gradients_flow_to_inputs(ranks):
    model = ff.setup_model(RT64, made())
    half = ff.map_params(lambda value: 0.5 * value, model)
    x = data()[0].requires_grad_()
    ff.apply(RT64, half, x).sum().backward()
    right = [ff.apply(RT64, model, x), ff.apply(RT64, half, x), ff.apply(RT64, half, x, method="short"), x.grad]
    right.append(right[0] + right[1])
    for found in ranks.run(computing):
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-12)


def numbers(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    _, grads = ff.value_and_grad(rt, mse)(model, *mine(rt, data()))

    def norm(net, *_):
        return sum(slot.square().sum() for slot in net.blocks.parameters())

    for call in (lambda: ff.apply(rt, model, method=norm), lambda: ff.value(rt, norm)(model, *data())):
        with pytest.raises(ff.CapabilityError, match="use"):
            call()
    for send in (ff.all_gather_object, lambda rt, tree: ff.run_once(rt, lambda: tree)):
        with pytest.raises(ff.FabricfnError, match="holds this rank's part"):
            send(rt, {"w": model.params["out.weight"]})
    for copied in (copy.deepcopy(grads), pickle.loads(pickle.dumps(grads))):
        close(wholes(copied), wholes(grads), 0)
    assert repr(grads).startswith("Grads(18 params, ") and len(repr(grads)) < 40


def test_parts_do_not_pose_as_wholes(two):
    two.run(numbers)


def meaning(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    x, y = (part.tensor_split([5])[rt.rank] for part in data())
    return ff.value(rt, lambda net, x, y: ((net(x) - y).square().sum(), y.numel()), weighted=True)(model, x, y)


def test_value_is_the_mean_over_all_data(two):
    right = ff.value(RT64, mse)(ff.setup_model(RT64, made()), *data())
    for found in two.run(meaning):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def mixing(rt):
    rt = sharded(rt, ff.Precision.parse("bf16-mixed"))
    seen = []

    def loss_fn(net, x, y):
        seen.append((net.out.weight.dtype, net(x).dtype))
        return mse(net, x, y)

    model = ff.setup_model(rt, made().float())
    _, grads = ff.value_and_grad(rt, loss_fn)(model, *(part.float() for part in mine(rt, data())))
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    assert {value.dtype for value in model.params.values()} == {torch.float32}
    return wholes(grads)


def test_mixed_precision_gathers_in_the_low_dtype_and_keeps_the_high_one(ranks):
    oracle = expected(mse)
    for found in ranks.run(mixing):
        for name, grad in oracle.items():
            if grad is not None:
                assert found[name].dtype is torch.float32
                torch.testing.assert_close(found[name].double(), grad, rtol=0.05, atol=0.05)


def normalised(rt, gather_dtype):
    rt = sharded(rt, ff.Precision.parse("bf16-mixed"), gather_dtype=gather_dtype)
    model = ff.setup_model(rt, nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1)))
    ff.value_and_grad(rt, lambda net, x: net(x).square().mean())(model, torch.ones(3, 4))


def test_a_normalisation_of_wider_inputs_is_refused_with_what_to_write(four):
    with pytest.raises(ff.CapabilityError, match=r"gather_dtype=torch.float32"):
        four.run(normalised, None, world_size=2)
    four.run(normalised, torch.float32, world_size=2)


def reducing(rt):
    rt = sharded(rt, ff.Precision(reduce_dtype=torch.bfloat16))
    model = ff.setup_model(rt, made().float())
    return wholes(ff.value_and_grad(rt, mse)(model, *(part.float() for part in mine(rt, data())))[1])


def test_gradients_are_reduced_in_the_dtype_that_is_asked_for(two):
    oracle = expected(mse)
    for found in two.run(reducing):
        assert found["inp.weight"].dtype is torch.float32
        gap = max((found[name].double() - grad).abs().max() for name, grad in oracle.items() if grad is not None)
        assert 1e-5 < gap < 0.05, "bfloat16 holds 8 bits"


# Models that are made without values


def drawn():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def empty(rt):
    rt = sharded(rt)
    with torch.device("meta"):
        module = drawn().double()
    torch.manual_seed(rt.rank)
    model = ff.setup_model(rt, module)
    assert all(slot.is_meta for slot in module.parameters())
    assert model.buffers["1.running_var"].tolist() == [1.0] * 6
    _, grads = ff.value_and_grad(rt, mse)(model, *mine(rt, data()))
    assert grads.params["0.weight"] is not None
    return wholes(model)


def test_a_module_on_the_meta_device_gets_its_values_part_by_part(two):
    first, second = two.run(empty)
    close(second, first, 0)
    module = drawn().double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in module:
            part.reset_parameters()
    close(first, dict(module.named_parameters()), 0)


class Cache(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.ones(3), persistent=False)


def nothing(rt):
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(5, 3), Cache())
    with pytest.raises(ff.ModelError, match="1 has no values for angles .*reset_parameters"):
        ff.setup_model(sharded(rt), module)


def half(rt):
    module = nn.Linear(5, 3)
    module.weight = nn.Parameter(module.weight.detach().to("meta"))
    with pytest.raises(ff.ModelError, match=r"Linear has values for bias, but none for weight"):
        ff.setup_model(sharded(rt), module)


@pytest.mark.parametrize("case", [nothing, half])
def test_what_nobody_can_initialise_is_refused(four, case):
    four.run(case, world_size=2)
