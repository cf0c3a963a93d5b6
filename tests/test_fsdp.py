"""The strategies fsdp, on torch's real `fully_shard`, and flat_sharded: against `single`, by threads and processes."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import fabricfn as ff
from fabricfn.sharding import full, local_of
from tests.worlds import world_of

DOUBLE = ff.Precision.parse("64-true")


class Block(nn.Module):
    def __init__(self, width=7):
        super().__init__()
        self.lin, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return torch.tanh(self.lin(self.norm(x)))


class Net(nn.Module):
    """Repeated blocks, uneven shards (7 and 3 rows), a scalar, a frozen part, a statistic."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(5, 7), nn.Linear(7, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x) * self.scale * self.fixed

    def short(self, x):
        return self.out(self.blocks[0](self.inp(x))) * self.scale


def built(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double()


NETS = tuple(built(seed) for seed in range(4))  # not in the ranks: threads share the generator


def made(seed=0):
    return copy.deepcopy(NETS[seed])  # `.float()` changes a module in place, and the threads of a world share these


def data(rows=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 5, generator=generator).double(), torch.randn(rows, 3, generator=generator).double()


def mse(net, x, y):
    return (net(x) - y).square().mean()


def mine(rt, tensors):
    return [tensor.chunk(rt.world_size)[rt.rank] for tensor in tensors]


def wholes(record):
    return {name: None if value is None else full(value).detach().clone() for name, value in record.params.items()}


def sharded(rt, precision=DOUBLE, **options):
    """A runtime of the strategy by that name with these options."""
    return dataclasses.replace(rt, strategy=getattr(ff.strategies, rt.strategy.name)(**options), precision=precision)


def gradients(rt, model, loss_fn, *others, **options):
    return wholes(ff.value_and_grad(rt, loss_fn, **options)(model, *mine(rt, data()), *others)[1])


def close(found, expected, tolerance=1e-12):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert type(found[name]) is torch.Tensor
            torch.testing.assert_close(
                found[name], value.detach(), rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


class Ranks:
    """Ranks under one of the two strategies."""

    def __init__(self, ranks, strategy):
        self.ranks, self.strategy, self.world_size = ranks, strategy, ranks.world_size

    def run(self, job, *args, **options):
        return self.ranks.run(job, *args, strategy=self.strategy, **options)


four_threads = world_of("threads", 4)
two_processes = world_of("processes", 2)


@pytest.fixture(scope="module", params=["fsdp", "flat_sharded"])
def strategy(request):
    return request.param


@pytest.fixture(scope="module")
def threads(four_threads, strategy):
    return Ranks(four_threads, strategy)


@pytest.fixture(scope="module")
def processes(two_processes, strategy):
    return Ranks(two_processes, strategy)


@pytest.fixture(scope="module", params=["threads", "processes"])
def ranks(request, four_threads, two_processes, strategy):
    return Ranks(four_threads if request.param == "threads" else two_processes, strategy)


@pytest.fixture
def alone():
    return ff.Runtime(world=ff.World(), precision=DOUBLE, strategy=ff.strategies.single())


def expected(alone, loss_fn, *others, **options):
    model = ff.setup_model(alone, made())
    return wholes(ff.value_and_grad(alone, loss_fn, **options)(model, *data(), *others)[1])


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


def by_method(net, x, y):
    return (net.short(x) - y).square().mean()


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
def test_any_loss_gives_the_gradients_of_single(ranks, alone, options):
    compare_with_single(ranks, alone, options)


@pytest.mark.parametrize("kept", [False, 2], ids=["kept", "kept by pairs"])
def test_so_it_does_where_units_are_kept(two_processes, four_threads, alone, kept):
    for ranks in (two_processes, four_threads):
        compare_with_single(Ranks(ranks, "fsdp"), alone, {"reshard_after_forward": kept})


def compare_with_single(ranks, alone, options):
    model = ff.setup_model(alone, made())
    half = ff.map_params(lambda value: 0.5 * value, model)

    def penalised(net, x, y):
        return mse(net, x, y) + net.blocks[1].lin.weight.square().sum()

    oracle = {
        "plain": expected(alone, mse),
        "method": expected(alone, by_method, allow_unused=True),
        "twice": expected(alone, twice),
        "checkpoint": expected(alone, checkpointed),
        "reentrant": expected(alone, reentrant),
        "teacher": expected(alone, taught, half),
        "other values": wholes(ff.value_and_grad(alone, mse)(half, *data())[1]),
        "penalty": expected(alone, penalised),
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


def batches_of(rt, sizes):
    x, y = mine(rt, data(24))
    return list(zip(x.split(sizes[: len(sizes)]), y.split(sizes), strict=True))


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


def test_micro_batches_are_one_batch(ranks, alone):
    oracle = wholes(ff.value_and_grad(alone, mse)(ff.setup_model(alone, made()), *data(24))[1])
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


def test_other_numbers_of_micro_batches_are_refused_on_every_rank(processes):
    processes.run(uneven)


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


def test_gradients_that_share_memory_are_added_up_once(processes, alone):
    for found in processes.run(twins):
        x, y = data(24)
        parts = [part.sum(0) / 3 for part in (x, x)] + [y[:, :1].sum() / 3]
        right = sum(parts) / 2
        close(found, {"a": right, "b": right})


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


def test_a_graph_that_was_kept_spoils_nothing_under_single(alone):
    model, kept = ff.setup_model(alone, made()), []

    def loss_fn(net, x, y):
        kept.append(net(x))
        return mse(net, x, y)

    right = gradients(alone, model, loss_fn)
    kept[0].sum().backward()
    close(gradients(alone, model, mse), right, 0)


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


def test_values_that_do_not_fit_are_refused(threads):
    threads.run(foreign, world_size=2)


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


def test_apply_computes_with_any_record_and_gradients_flow_to_inputs(ranks, alone):
    model = ff.setup_model(alone, made())
    half = ff.map_params(lambda value: 0.5 * value, model)
    x = data()[0].requires_grad_()
    ff.apply(alone, half, x).sum().backward()
    right = [ff.apply(alone, model, x), ff.apply(alone, half, x), ff.apply(alone, half, x, method="short"), x.grad]
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


def test_parts_do_not_pose_as_wholes(processes):
    processes.run(numbers)


def meaning(rt):
    rt = sharded(rt)
    model = ff.setup_model(rt, made())
    x, y = (part.tensor_split([5])[rt.rank] for part in data())
    return ff.value(rt, lambda net, x, y: ((net(x) - y).square().sum(), y.numel()), weighted=True)(model, x, y)


def test_value_is_the_mean_over_all_data(processes, alone):
    right = ff.value(alone, mse)(ff.setup_model(alone, made()), *data())
    for found in processes.run(meaning):
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


def test_mixed_precision_gathers_in_the_low_dtype_and_keeps_the_high_one(ranks, alone):
    oracle = expected(alone, mse)
    for found in ranks.run(mixing):
        for name, grad in oracle.items():
            if grad is not None:
                assert found[name].dtype is torch.float32
                torch.testing.assert_close(found[name].double(), grad, rtol=0.05, atol=0.05)


def normalised(rt, gather_dtype):
    rt = sharded(rt, ff.Precision.parse("bf16-mixed"), gather_dtype=gather_dtype)
    model = ff.setup_model(rt, nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1)))
    ff.value_and_grad(rt, lambda net, x: net(x).square().mean())(model, torch.ones(3, 4))


def test_a_normalisation_of_wider_inputs_is_refused_with_what_to_write(threads):
    with pytest.raises(ff.CapabilityError, match=r"gather_dtype=torch.float32"):
        threads.run(normalised, None, world_size=2)
    threads.run(normalised, torch.float32, world_size=2)


def reducing(rt):
    rt = sharded(rt, ff.Precision(reduce_dtype=torch.bfloat16))
    model = ff.setup_model(rt, made().float())
    return wholes(ff.value_and_grad(rt, mse)(model, *(part.float() for part in mine(rt, data())))[1])


def test_gradients_are_reduced_in_the_dtype_that_is_asked_for(processes, alone):
    oracle = expected(alone, mse)
    for found in processes.run(reducing):
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


def test_a_module_on_the_meta_device_gets_its_values_part_by_part(processes):
    first, second = processes.run(empty)
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
def test_what_nobody_can_initialise_is_refused(threads, case):
    threads.run(case, world_size=2)


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
