"""The strategies fsdp, on torch's real `fully_shard`, and flat_sharded: any loss has the gradients of `single`."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import fabricfn as ff
from fabricfn.sharding import local_of
from tests.support.fully_sharded import (
    Net,
    Ranks,
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
two = under_either("processes")
ranks = under_either("threads", "processes")


# What a model is


def what_it_is(rt):
    rt = sharded(rt)
    module = made(seed=rt.rank)  # every rank gets the values of rank 0
    before = [slot.detach().clone() for slot in module.parameters()]
    model = ff.setup_model(rt, module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    assert all(torch.equal(wholes(model)[name], slot) for name, slot in made(seed=0).named_parameters())
    assert type(model.params["scale"]) is torch.Tensor
    cut = {name: value for name, value in model.params.items() if name != "scale"}
    for name, value in cut.items():
        assert type(value) is DTensor and value.placements == (Shard(0),), name
    rows = local_of(model.params["out.weight"]).shape[0]
    assert rows == (3 - rt.rank * -(-3 // rt.world_size) if rt.world_size == 2 and rt.rank else rows)
    total = sum(local_of(value).numel() for value in cut.values())
    plain = ff.to_module(rt, model)
    assert type(plain) is Net and torch.equal(plain.out.weight, made(seed=0).out.weight)
    assert plain.training and not plain.fixed.requires_grad and plain.out.weight.requires_grad
    assert ff.gather_params(rt, model, dst=0).keys() == (model.params.keys() if rt.rank == 0 else set())
    return total


def test_every_rank_holds_a_part_and_rank_0_decides(ranks):
    totals = ranks.run(what_it_is)
    assert sum(totals) == sum(slot.numel() for slot in made().parameters()) - 1
    assert max(totals) < sum(totals)


# The gradients


def several(rt, options):
    rt = sharded(rt, **options)
    model = ff.setup_model(rt, made())
    half = ff.map_params(lambda value: 0.5 * value, model)

    def penalised(net, x, y):
        with ff.unsharded(rt, net.blocks[1]):
            penalty = net.blocks[1].lin.weight.square().sum()
        return mse(net, x, y) + penalty

    return {
        "plain": gradients(rt, model, mse),
        "method": gradients(rt, model, by_method, allow_unused=True),
        "twice": gradients(rt, model, twice),
        "checkpoint": gradients(rt, model, checkpointed),
        "reentrant": gradients(rt, model, reentrant),
        "teacher": gradients(rt, model, taught, half),
        "other values": gradients(rt, half, mse),
        "penalty": gradients(rt, model, penalised),
        "plain again": gradients(rt, model, mse),
    }


def twice(net, x, y):
    h = net.inp(x)
    for _ in range(3):
        h = net.blocks[0](h)
    return mse(net, x, y) + h.mean()


def passes(net, x, y, **options):
    h = net.inp(x)
    for block in net.blocks:
        h = h + checkpoint(block, h, **options)
    return (net.out(h) * net.scale - y).square().mean()


def checkpointed(net, x, y):
    return passes(net, x, y, use_reentrant=False)


def reentrant(net, x, y):
    return passes(net, x, y, use_reentrant=True)


def taught(net, x, y, teacher):
    return mse(net, x, y) + (net(x) - teacher(x)).square().mean()


@pytest.mark.parametrize(
    "options", [{}, {"units": None}, {"units": nn.Linear}], ids=["auto", "one unit", "every linear"]
)
def test_any_loss_gives_the_gradients_of_single(ranks, options):
    compare_with_single(ranks, options)


@pytest.mark.parametrize("kept", [False, 2], ids=["kept", "kept by pairs"])
def test_so_it_does_where_units_are_kept(processes, threads, kept):
    for ranks in (processes, threads):
        compare_with_single(Ranks(ranks, "fsdp"), {"reshard_after_forward": kept})


def compare_with_single(ranks, options):
    model = ff.setup_model(RT64, made())
    half = ff.map_params(lambda value: 0.5 * value, model)

    def penalised(net, x, y):
        return mse(net, x, y) + net.blocks[1].lin.weight.square().sum()

    oracle = {
        "plain": expected(mse),
        "method": expected(by_method, allow_unused=True),
        "twice": expected(twice),
        "checkpoint": expected(checkpointed),
        "reentrant": expected(reentrant),
        "teacher": expected(taught, half),
        "other values": wholes(ff.value_and_grad(RT64, mse)(half, *data())[1]),
        "penalty": expected(penalised),
    }
    oracle["plain again"] = oracle["plain"]
    for size in {2, ranks.world_size}:
        for found in ranks.run(several, options, world_size=size):
            for case, grads in oracle.items():
                close(found[case], grads)


def own(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    grad_fn = ff.value_and_grad(rt, mse)
    first = grad_fn(model, *mine(rt, data()))[1]
    kept = {name: None if grad is None else local_of(grad).clone() for name, grad in first.params.items()}
    before = {name: local_of(value).clone() for name, value in model.params.items()}
    second = grad_fn(model, *mine(rt, data()))[1]
    for name, grad in kept.items():
        if grad is not None:
            assert torch.equal(local_of(first.params[name]), grad), name  # no later call writes there
            assert torch.equal(local_of(second.params[name]), grad), name  # the same bits
        assert torch.equal(local_of(model.params[name]), before[name]), name
    assert second.new_buffers["seen"] == 1 and model.buffers["seen"] == 0


def test_gradients_are_pure_and_own_their_memory(ranks):
    ranks.run(own)


def accumulated(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    x, y = mine(rt, data(24))
    third = len(x) // 3
    equal = list(zip(x.split(third), y.split(third), strict=True))
    uneven = list(zip(x.split([1, len(x) - 1]), y.split([1, len(x) - 1]), strict=True))

    def summed(net, x, y):
        return (net(x) - y).square().sum(), y.numel()

    return (
        wholes(ff.accumulate(rt, mse)(model, equal)[1]),
        wholes(ff.accumulate(rt, summed, weighted=True)(model, uneven)[1]),
        wholes(ff.value_and_grad(rt, mse)(model, x, y)[1]),
    )


def test_micro_batches_are_one_batch(ranks):
    oracle = wholes(ff.value_and_grad(RT64, mse)(ff.setup_model(RT64, made()), *data(24))[1])
    for found in ranks.run(accumulated):
        for grads in found:
            close(grads, oracle)


def uneven(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    batch = mine(rt, data())
    with pytest.raises(ff.ConfigurationError, match=rf"equally many; they have \[1, 2\] \(rank {rt.rank} has"):
        ff.accumulate(rt, mse)(model, [batch] * (rt.rank + 1))
    ff.accumulate(rt, mse)(model, [batch] * 2)


def test_other_numbers_of_micro_batches_are_refused_on_every_rank(two):
    two.run(uneven)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))

    def forward(self, x):
        return x * (self.a.unsqueeze(0) + self.b.unsqueeze(0)).sum(0)  # autograd gives both one gradient


def twins(rt):
    rt = sharded(rt)
    x, y = mine(rt, data(24))
    _, grads = ff.accumulate(rt, lambda net, x: net(x).sum())(ff.setup_model(rt, Sum()), [(x,), (x,), (y[:, :1],)])
    return wholes(grads)


def test_gradients_that_share_memory_are_added_up_once(two):
    for found in two.run(twins):
        x, y = data(24)
        parts = [part.sum(0) / 3 for part in (x, x)] + [y[:, :1].sum() / 3]
        right = sum(parts) / 2
        close(found, {"a": right, "b": right})


# torch


def test_the_private_fields_of_torch_are_where_they_were(group):
    """When a new torch moves one of these, this says which; `strategies/torch_fsdp.py` is the only file to change."""
    from torch.distributed.device_mesh import init_device_mesh

    net = nn.Sequential(nn.Linear(4, 4))
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    net._set_unshard_async_op(True)
    state = net._get_fsdp_state()
    assert state._fsdp_param_groups[0].unshard_async_op, "FSDPModule._set_unshard_async_op"
    assert state._is_root is None, "FSDPState._is_root is None before the first forward"
    net(torch.ones(2, 4)).sum().backward()
    assert state._is_root is True, "FSDPState._is_root is True after it"
    assert state._training_state.name == "IDLE", "FSDPState._training_state"
    (params,) = [one.fsdp_params for one in state._fsdp_param_groups]
    assert state._fsdp_param_groups[0]._training_state.name == "IDLE", "FSDPParamGroup._training_state"
    param = params[0]
    assert param.sharded_param is net[0].weight, "FSDPParam.sharded_param is the module's own parameter"
    assert param._sharded_param_data.dim() == 1, "FSDPParam._sharded_param_data is flat"
    assert param._sharded_param_data.data_ptr() == param.sharded_param._local_tensor.data_ptr(), "they share memory"
    assert param.sharded_size == param.padded_sharded_param_size == torch.Size([4, 4]), "FSDPParam's sizes"
    assert param._sharding_spec.placements == (Shard(0),), "FSDPParam._sharding_spec"
    assert param.fsdp_placement.dim == 0, "FSDPParam.fsdp_placement"
    assert param.unsharded_accumulated_grad is None, "FSDPParam.unsharded_accumulated_grad"
    assert param._unsharded_param.shape == (4, 4) and param._unsharded_param.grad is None, "FSDPParam._unsharded_param"
    other, bias = torch.full((4, 4), 2.0), params[1].sharded_param.full_tensor()
    param._sharded_param_data = other.view(-1)
    param.sharded_param._local_tensor = other
    out = net(torch.ones(1, 4)).sum()
    assert abs(out - 32 - bias.sum()) < 1e-4, "gathered from _sharded_param_data"
