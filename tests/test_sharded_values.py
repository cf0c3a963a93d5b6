"""Values after the gradient where leaves are DTensors: steps, clipping, leases, states. The oracle is `single`."""

import copy
import dataclasses
import math
import pickle
from types import MappingProxyType

import pytest
import torch
from torch import nn, optim
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial

import fabricfn as ff
from fabricfn.leases import Lease
from fabricfn.optimizers.skipping import all_finite
from fabricfn.runs import scale
from fabricfn.sharding import full, is_sharded, local_of, with_local
from fabricfn.states import optimizer_from_tree, optimizer_to_tree, overlap
from tests.worlds import world_of

# 3 rows on 4 ranks: an empty part; "one" lies on one rank; "plain" is not sharded at all
SHAPES = {"w": (3, 4), "plain": (2, 2), "tall": (37, 5), "one": (1,), "deep": (2, 5, 2)}
ALONE = ff.Runtime(world=ff.World(), precision=ff.Precision.parse(64), strategy=ff.strategies.single())
ALONE32 = dataclasses.replace(ALONE, precision=ff.Precision.parse(32))


ranks = world_of("threads", 4)
real_ranks = world_of("processes", 3)


class Net(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        for name, value in numbers(0, dtype).items():
            setattr(self, name, nn.Parameter(value))


def numbers(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def line(rt):
    return DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))


def split(mesh, values):
    """Each tensor placed: the last along its second dimension, one not at all; on a 2-D mesh replicated and sharded."""
    out = {}
    for name, value in values.items():
        at = [*[Replicate()] * (mesh.ndim - 1), Shard(1 if name == "deep" else 0)]
        out[name] = (
            value if name == "plain" or value is None else distribute_tensor(value, mesh, at, src_data_rank=None)
        )
    return out


def setup(mesh=None, dtype=torch.float64):
    model = ff.setup_model(ALONE if dtype == torch.float64 else ALONE32, Net(dtype))
    return model if mesh is None else dataclasses.replace(model, params=split(mesh, model.params))


def grads_of(model, values, mesh=None):
    placed = values if mesh is None else split(mesh, values)
    return ff.Grads(params=MappingProxyType(placed), ref=model.ref)


def train(opt, options, mesh=None, dtype=torch.float64, donate=False, steps=4):
    """Values and state after some steps, the last but one without a gradient for "w", the last with another rate."""
    model = setup(mesh, dtype)
    state = ff.setup_optimizer(ALONE, model, opt, **options)
    for step in range(steps):
        values = numbers(step + 1, dtype)
        if step == 2:
            values["w"] = None
        overrides = {"lr": 0.05} if step == 3 and "lr" in (state.hyperparams or [{}])[0] else {}
        grads = grads_of(model, values, mesh)
        model, state = ff.optimizer_step(ALONE, model, state, grads, donate=donate, **overrides)
    for name, value in model.params.items():
        assert is_sharded(value) is (mesh is not None and name != "plain")
    return model.params, state


def whole(tree):
    return ff.tree_map(lambda leaf: full(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def assert_equal(found, expected, exact=True):
    found, expected = whole(dict(found)), dict(expected)
    assert set(found) == set(expected)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    if not exact and all(value.dtype == torch.float64 for value in ff.tree_map(lambda x: x, list(expected.values()))):
        tolerance = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(found, expected, **tolerance)


EXACT = {
    "adamw": (optim.AdamW, {"fused": False, "lr": 0.1}),
    "sgd": (optim.SGD, {"fused": False, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "plain sgd": (optim.SGD, {"lr": 0.1}),
    "rmsprop": (optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "nadam": (optim.NAdam, {}),
    "radam": (optim.RAdam, {"weight_decay": 0.1}),
    "adamax": (optim.Adamax, {}),
    "adadelta": (optim.Adadelta, {}),
    "asgd": (optim.ASGD, {}),
    "rprop": (optim.Rprop, {}),
    "two groups": (optim.NAdam, {"groups": {"*e*": {"weight_decay": 0.1}}}),
    "a part": (optim.RMSprop, {"params": ["w", "plain"]}),
}
FUSED = {
    "adamw": (optim.AdamW, {"lr": 0.1}),
    "adam": (optim.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
    "adagrad": (optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "two groups": (optim.AdamW, {"groups": {"*e*": {"weight_decay": 0.3}}}),
    "a part": (optim.AdamW, {"params": "[wt]*"}),
}


def trains_as_single(rt, opt, options, dtype, exact):
    expected, state = train(opt, options, None, dtype)
    shown = whole(state.state)
    for donate in (False, True):
        params, mine = train(opt, options, line(rt), dtype, donate)
        assert_equal(params, expected, exact)
        assert {name: set(row) for name, row in mine.state.items()} == {n: set(r) for n, r in shown.items()}
        for name, row in mine.state.items():
            for slot, value in row.items():
                counter = slot in ("step", "mu_product", "eta", "mu")
                assert is_sharded(value) is (name != "plain" and not counter), (name, slot)
            assert_equal(row, shown[name], exact)
    return True


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", EXACT)
def test_steps_on_parts_have_the_bits_of_steps_on_whole_tensors(ranks, name, world_size):
    for dtype in (torch.float64, torch.float32):
        ranks.run(trains_as_single, *EXACT[name], dtype, True, world_size=world_size)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_on_parts_are_steps_on_whole_tensors_up_to_the_last_bit(ranks, name, world_size):
    for dtype in (torch.float64, torch.float32):
        ranks.run(trains_as_single, *FUSED[name], dtype, False, world_size=world_size)


def test_one_rank_has_everything(group):
    rt = dataclasses.replace(ALONE, world=ff.World(group=group))
    for opt, options in (*EXACT.values(), *FUSED.values()):
        trains_as_single(rt, opt, options, torch.float32, True)
    for case in (donated, mapped, partial_steps):
        case(rt)
    clipped(rt, "line", 2.0)


def two_dimensional(rt):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for opt, options in (EXACT["nadam"], EXACT["adamw"]):
        for donate in (False, True):
            params, state = train(opt, options, mesh, donate=donate)
            expected, alone = train(opt, options)
            assert_equal(params, expected)
            assert_equal(state.state["tall"], alone.state["tall"])
    return True


def test_replicated_and_sharded_on_a_mesh_of_two_dimensions(ranks):
    ranks.run(two_dimensional)


class Lion(optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    momentum = self.state[param].setdefault("m", torch.zeros_like(param))
                    param.add_(momentum.lerp(param.grad, 0.1).sign(), alpha=-group["lr"])
                    momentum.lerp_(param.grad, 0.01)


class Child(optim.AdamW):
    pass


def start_momentum(params):
    return {"mean": {name: torch.zeros_like(value) for name, value in params.items()}, "count": 0}


def momentum(grads, state, params):
    mean = {name: 0.9 * state["mean"][name] + grad for name, grad in grads.items()}
    return {name: -0.1 * value for name, value in mean.items()}, {"mean": mean, "count": state["count"] + 1}


OWN = {"class": Lion, "child": Child, "pair": (start_momentum, momentum)}


def own_optimizer(rt, opt):
    with pytest.raises(ff.CapabilityError, match="elementwise=True"):
        ff.setup_optimizer(ALONE, setup(line(rt)), opt)
    expected, alone = train(opt, {"elementwise": True})
    for donate in (False, True):
        params, state = train(opt, {"elementwise": True}, line(rt), donate=donate)
        assert_equal(params, expected)
        torch.testing.assert_close(whole(state.state), alone.state, rtol=0, atol=0)
        again = optimizer_from_tree(state, optimizer_to_tree(state))
        torch.testing.assert_close(whole(again.state), alone.state, rtol=0, atol=0)
        model, plain = setup(line(rt)), setup()
        after, _ = ff.optimizer_step(ALONE, model, again, grads_of(model, numbers(9), line(rt)))
        there, _ = ff.optimizer_step(ALONE, plain, alone, grads_of(plain, numbers(9)))
        assert_equal(after.params, there.params)
    found = state.state["mean"]["tall"] if "mean" in state.state else next(iter(state.state["tall"].values()))
    assert is_sharded(found) or opt is Child
    return True


@pytest.mark.parametrize("kind", OWN)
def test_an_optimizer_of_the_users_own_updates_parts_only_on_his_word(ranks, kind):
    ranks.run(own_optimizer, OWN[kind], world_size=3)


def refused(rt, opt, options):
    with pytest.raises(ff.CapabilityError, match="needs"):
        ff.setup_optimizer(ALONE, setup(line(rt)), opt, elementwise=True, **options)
    return True


@pytest.mark.parametrize("opt", [optim.LBFGS, optim.Muon, optim.Adafactor, optim.SparseAdam])
def test_what_needs_whole_tensors_is_refused_whatever_the_word(ranks, opt):
    ranks.run(refused, opt, {}, world_size=2)


def instances(rt):
    module = Net(torch.float64)
    expected, alone = train(optim.AdamW, {"lr": 0.1})
    model = ff.setup_model(ALONE, module)
    built = {kind: kind(module.parameters(), lr=0.1) for kind in (optim.AdamW, optim.Adagrad)}
    for param, value in zip(module.parameters(), numbers(1).values(), strict=True):
        param.grad = value
    built[optim.AdamW].step()  # its state is of whole tensors
    sharded = dataclasses.replace(model, params=split(line(rt), model.params))
    for instance in built.values():
        state = ff.setup_optimizer(ALONE, sharded, instance)
        plain = ff.setup_optimizer(ALONE, model, instance)
        assert is_sharded(next(slot for slot in state.state["w"].values() if slot.ndim))
        torch.testing.assert_close(whole(state.state), plain.state, rtol=0, atol=0)
        after, _ = ff.optimizer_step(ALONE, sharded, state, grads_of(model, numbers(2), line(rt)))
        there, _ = ff.optimizer_step(ALONE, model, plain, grads_of(model, numbers(2)))
        assert_equal(after.params, there.params)
    built[optim.AdamW].register_step_pre_hook(lambda *_: None)
    with pytest.raises(ff.CapabilityError, match="AdamW with hooks"):
        ff.setup_optimizer(ALONE, sharded, built[optim.AdamW])
    return True


def test_an_instance_brings_state_of_whole_tensors_which_is_cut(ranks):
    ranks.run(instances, world_size=3)


def with_closure(rt):
    results = []
    for mesh in (None, line(rt)):
        model = setup(mesh)
        state = ff.setup_optimizer(ALONE, model, optim.SGD, lr=0.1)

        def closure(trial, mesh=mesh):
            assert is_sharded(trial.params["w"]) is (mesh is not None)
            return torch.zeros(()), grads_of(trial, numbers(1), mesh)

        results.append(ff.optimizer_step(ALONE, model, state, closure=closure)[0].params)
    assert_equal(results[1], results[0])
    return True


def test_a_closure_sees_and_returns_dtensors(ranks):
    ranks.run(with_closure, world_size=2)


def donated(rt):
    mesh = line(rt)
    for opt in (optim.AdamW, optim.RMSprop):
        model = setup(mesh)
        state = ff.setup_optimizer(ALONE, model, opt)
        grads = grads_of(model, numbers(1), mesh)
        _, state = ff.optimizer_step(ALONE, model, state, grads)  # RMSprop has no state before
        before = ff.tree_map(torch.clone, model)
        twins = {
            "the same wrappers": ff.tree_map(lambda value: value, model),
            "other wrappers of the parts": dataclasses.replace(
                model, params={n: with_local(v, local_of(v)) for n, v in model.params.items()}
            ),
            "detached": dataclasses.replace(model, params={n: v.detach() for n, v in model.params.items()}),
            "data": dataclasses.replace(model, params={n: v.data for n, v in model.params.items()}),
        }
        alias, state_twin = ff.eval_mode(model), ff.tree_map(lambda value: value, state)
        parts = {name: local_of(value) for name, value in model.params.items()}
        pure, _ = ff.optimizer_step(ALONE, model, state, grads)
        assert_equal(model.params, whole(dict(before.params)))
        after, next_state = ff.optimizer_step(ALONE, model, state, grads, donate=True)
        assert all(local_of(after.params[name]) is part for name, part in parts.items())
        assert_equal(after.params, whole(dict(pure.params)))
        again = grads_of(model, numbers(2), mesh)
        for name, old in {"itself": model, "alias": alias, **twins}.items():
            with pytest.raises(ff.DonatedError):
                old.lease.check(name)
            with pytest.raises(ff.DonatedError):
                ff.optimizer_step(ALONE, old, next_state, again)
        for old in (state, state_twin):
            with pytest.raises(ff.DonatedError):
                ff.optimizer_step(ALONE, after, old, again)
        with pytest.raises(ff.DonatedError):
            ff.optimizer_step(ALONE, after, next_state, grads)
        ff.optimizer_step(ALONE, after, next_state, again)
        ff.optimizer_step(ALONE, before, next_state, again)
    return True


def test_donation_is_found_out_through_every_wrapper_of_a_part(ranks):
    ranks.run(donated, world_size=2)


def watched(rt):
    tensor = split(line(rt), numbers(0))["tall"]
    for change in (
        lambda: tensor.mul_(2),
        lambda: local_of(tensor).mul_(2),
        lambda: tensor.detach().mul_(2),
        lambda: local_of(tensor.data).mul_(2),
    ):
        lease = Lease({"tall": tensor})
        lease.check("Model")
        change()
        with pytest.raises(ff.DonatedError, match="changed in place"):
            lease.check("Model")
    return True


def test_a_change_in_place_of_a_dtensor_or_of_its_part_is_seen(ranks):
    ranks.run(watched, world_size=2)


def open_graph(rt):
    """A graph that saved the parameter must fail after a donated step, not give the gradient at other values."""
    mesh = line(rt)
    model = setup(mesh)
    state = ff.setup_optimizer(ALONE, model, optim.SGD, lr=0.1)
    x = distribute_tensor(torch.ones(37, 5, dtype=torch.float64), mesh, [Shard(0)], src_data_rank=None)
    y = model.params["tall"] * x.requires_grad_()
    ff.optimizer_step(ALONE, model, state, grads_of(model, numbers(1), mesh), donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))
    return True


def test_an_open_graph_over_a_dtensor_fails_after_a_donated_step(ranks):
    ranks.run(open_graph, world_size=2)


def memory(rt):
    mesh = line(rt)
    buffer = torch.arange(12.0, dtype=torch.float64)
    like = distribute_tensor(torch.zeros(3 * rt.world_size, 2), mesh, [Shard(0)], src_data_rank=None)
    one, two = (with_local(like, buffer[i : i + 6].view(3, 2)) for i in (0, 6))
    three = with_local(like, buffer[3:9].view(3, 2))
    empty = distribute_tensor(torch.zeros(0, 2), mesh, [Shard(0)], src_data_rank=None)
    assert overlap([one, two, empty, empty]) is None
    assert overlap([one, two, three]) == (0, 2)
    assert overlap([two, two]) == (0, 1)
    for others, shared in (({"one": one, "two": two}, False), ({"one": one, "three": three}, True)):
        module = nn.Module()
        for name, value in others.items():
            setattr(module, name, nn.Parameter(torch.zeros(value.shape, dtype=torch.float64)))
        plain = ff.setup_model(ALONE, module)
        model = dataclasses.replace(plain, params=others)
        state = ff.setup_optimizer(ALONE, model, optim.SGD, lr=0.1)
        grads = ff.Grads(params=MappingProxyType({n: v.clone() for n, v in others.items()}), ref=model.ref)
        if shared:
            with pytest.raises(ff.ModelError, match="one and three share memory"):
                ff.optimizer_step(ALONE, model, state, grads, donate=True)
        else:
            ff.optimizer_step(ALONE, model, state, grads, donate=True)
    # gradients are scaled once, also where two are views of one memory
    for pair in ({"one": one, "two": two}, {"one": one, "two": three}):
        record = ff.Grads(params=MappingProxyType(pair), ref=model.ref)
        pure, _ = ff.clip_gradients(rt, record, max_norm=0.1)
        taken, _ = ff.clip_gradients(rt, record, max_norm=0.1, donate=True)
        assert_equal(taken.params, whole(dict(pure.params)))
        assert (taken.params["one"] is one) is (pair["two"] is two)
    return True


def test_parts_of_one_buffer_share_memory_only_where_they_overlap(ranks):
    ranks.run(memory, world_size=2)


@pytest.mark.parametrize("layout", ["line", "square", "several meshes"])
@pytest.mark.parametrize("norm_type", [1, 2.0, 3, "inf"])
def test_the_norm_counts_each_number_once(ranks, layout, norm_type):
    for world_size in (2, 3, 4) if layout == "line" else (4,):
        found = ranks.run(clipped, layout, norm_type, world_size=world_size)
        assert len(set(found)) == 1  # the same bits on every rank


def placed(rt, layout, values):
    if layout == "line":
        return split(line(rt), values)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    out = split(square, values)
    if layout == "several meshes":
        out |= {
            "w": split(line(rt), values)["w"],
            "tall": distribute_tensor(values["tall"], square, [Shard(1), Shard(0)], src_data_rank=None),
            "one": distribute_tensor(values["one"], line(rt), [Replicate()], src_data_rank=None),
            "deep": distribute_tensor(values["deep"], square, [Shard(1), Replicate()], src_data_rank=None),
        }
    return out


def clipped(rt, layout, norm_type):
    model = setup()
    values = {name: 3 * value for name, value in numbers(1).items()}
    for limit in ({"max_norm": 0.7}, {"max_norm": 1e6}, {"clip_val": 0.5}):
        expected, norm = ff.clip_gradients(ALONE, grads_of(model, values), norm_type=norm_type, **limit)
        for donate in (False, True):
            grads = ff.Grads(params=MappingProxyType(placed(rt, layout, values)), ref=model.ref)
            twin = ff.tree_map(lambda grad: grad.detach() if is_sharded(grad) else grad.clone(), grads)
            found, mine = ff.clip_gradients(rt, grads, norm_type=norm_type, donate=donate, **limit)
            assert type(mine) is torch.Tensor
            assert mine.shape == ()
            torch.testing.assert_close(mine, norm, rtol=1e-13, atol=0)
            torch.testing.assert_close(whole(dict(found.params)), dict(expected.params), rtol=1e-13, atol=0)
            assert all((found.params[name] is grad) is donate for name, grad in grads.params.items())
            for given in (grads, twin) if donate else ():
                with pytest.raises(ff.DonatedError):
                    ff.clip_gradients(rt, given, max_norm=1.0)
    return mine.item()


def one_collective(rt):
    """The collectives of one clip over all gradients, as torch's profiler sees them."""
    grads = grads_of(setup(), numbers(1), line(rt))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ff.clip_gradients(rt, grads, max_norm=1.0)
    return [event.key for event in profile.key_averages() if event.key.startswith("gloo:") for _ in range(event.count)]


def nonfinite(rt, bad):
    values = numbers(1)
    values["one"][0] = bad  # on rank 0 alone
    grads = grads_of(setup(), values, line(rt))
    _, norm = ff.clip_gradients(rt, grads, max_norm=1.0)
    assert not torch.isfinite(norm)
    place = r"in one\)" if rt.rank == 0 else "every number of this rank's parts is"
    with pytest.raises(ff.GradientError, match=rf"rank {rt.rank}.*{place}"):
        ff.clip_gradients(rt, grads, max_norm=1.0, error_if_nonfinite=True, donate=True)
    ff.clip_gradients(rt, grads, max_norm=1.0)
    assert not all_finite([*grads.params.values()], rt.world)
    assert all_finite([*grads_of(setup(), numbers(1), line(rt)).params.values()], rt.world)
    alone = [torch.full((2,), bad if rt.rank == 1 else 1.0), None]
    assert all_finite(alone, rt.world) is (rt.rank != 1)  # whole gradients: nothing travels
    assert all_finite([], rt.world)
    return True


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_on_one_rank_is_known_on_all(ranks, bad):
    ranks.run(nonfinite, bad, world_size=3)


def partial_steps(rt):
    grads = dict(split(line(rt), numbers(1)))
    grads["w"] = DTensor.from_local(torch.ones(3, 4, dtype=torch.float64), line(rt), [Partial()], run_check=False)
    model = setup(line(rt))
    record = ff.Grads(params=MappingProxyType(grads), ref=model.ref)
    with pytest.raises(ff.GradientError, match="the gradient of w .*a term of a sum"):
        ff.clip_gradients(rt, record, max_norm=1.0)
    state = ff.setup_optimizer(ALONE, model, optim.AdamW)
    for wrong in (grads["w"], numbers(1)["w"], grads["w"].redistribute(placements=[Replicate()])):
        record = ff.Grads(params=MappingProxyType({**grads, "w": wrong}), ref=model.ref)
        with pytest.raises(ff.GradientError, match="the gradient of w is .*redistribute"):
            ff.optimizer_step(ALONE, model, state, record)
    whole_w = {**model.params, "w": full(model.params["w"])}
    fine = grads_of(model, numbers(1), line(rt))
    with pytest.raises(ff.ModelError, match="w is a plain tensor"):
        ff.optimizer_step(ALONE, dataclasses.replace(model, params=whole_w), state, fine)
    return True


def test_what_is_placed_otherwise_is_refused_by_name(ranks):
    ranks.run(partial_steps, world_size=2)


def mapped(rt):
    mesh = line(rt)
    model, other = setup(mesh), dataclasses.replace(setup(mesh), params=split(mesh, numbers(7)))
    state = ff.setup_optimizer(ALONE, model, optim.NAdam)
    ema = ff.map_params(lambda a, b: a.lerp(b, 0.1), model, other)
    mean = ff.tree_map(lambda a, b: (a + b) / 2, model, other)
    expected = {name: value.lerp(numbers(7)[name], 0.1) for name, value in setup().params.items()}
    torch.testing.assert_close(whole(dict(ema.params)), expected, rtol=0, atol=1e-15)
    for made in (ema, mean, ff.eval_mode(ema), ff.map_params(torch.zeros_like, model), copy.deepcopy(model)):
        assert all(is_sharded(value) is (name != "plain") for name, value in made.params.items())
        for donate in (False, True):
            start = ff.tree_map(torch.clone, made)
            own = ff.tree_map(torch.clone, state)
            after, _ = ff.optimizer_step(ALONE, start, own, grads_of(model, numbers(1), mesh), donate=donate)
            alone = setup()
            plain = dataclasses.replace(alone, params=whole(dict(made.params)))
            fresh = ff.setup_optimizer(ALONE, alone, optim.NAdam)
            there, _ = ff.optimizer_step(ALONE, plain, fresh, grads_of(plain, numbers(1)))
            assert_equal(after.params, there.params)
    doubled = ff.tree_map(torch.add, *[grads_of(model, numbers(1), mesh)] * 2)
    after, _ = ff.optimizer_step(ALONE, model, state, doubled)
    twice = scale([[*grads_of(model, numbers(1), mesh).params.values(), None]], 2.0)[0]
    assert twice.pop() is None
    torch.testing.assert_close(whole(twice), whole(list(doubled.params.values())), rtol=0, atol=0)
    again, _ = ff.optimizer_step(
        ALONE, model, state, ff.Grads(params=MappingProxyType(dict(zip(SHAPES, twice, strict=True))), ref=model.ref)
    )
    assert_equal(again.params, whole(dict(after.params)))
    return True


def test_arithmetic_on_sharded_models_gives_models_that_train(ranks):
    ranks.run(mapped, world_size=3)


@pytest.mark.parametrize("opt", [optim.AdamW, optim.NAdam, optim.SGD])
def test_the_state_is_a_tree_of_dtensors_and_comes_back(ranks, opt):
    ranks.run(round_trip, opt, {"momentum": 0.9} if opt is optim.SGD else {}, world_size=3)


def round_trip(rt, opt, options):
    mesh = line(rt)
    params, state = train(opt, options, mesh, steps=2)
    model = dataclasses.replace(setup(mesh), params=dict(params))
    fresh = ff.setup_optimizer(ALONE, setup(mesh), opt, **options)
    tree = optimizer_to_tree(state)
    cut = {"whole": {**tree, "state": whole(tree["state"])}, "dtensors": tree}
    copies = {name: optimizer_from_tree(fresh, made) for name, made in cut.items()}
    copies |= {"copied": ff.tree_map(torch.clone, state), "deep": copy.deepcopy(state)}
    grads = grads_of(model, numbers(9), mesh)
    expected, there = ff.optimizer_step(ALONE, model, state, grads)
    for value in (value for row in copies["whole"].state.values() for value in row.values() if is_sharded(value)):
        part = local_of(value)  # and not a view of the whole tensor
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    for made in copies.values():
        torch.testing.assert_close(whole(made.state), whole(state.state), rtol=0, atol=0)
        after, then = ff.optimizer_step(ALONE, model, made, grads)
        assert_equal(after.params, whole(dict(expected.params)))
        torch.testing.assert_close(whole(then.state), whole(there.state), rtol=0, atol=0)
    leaves = torch.utils._pytree.tree_leaves(state)
    assert {type(leaf) for leaf in leaves if leaf.ndim} == {DTensor, torch.Tensor}
    slot = next(slot for slot, value in tree["state"]["tall"].items() if is_sharded(value))
    for wrong in (
        tree["state"]["tall"][slot].redistribute(placements=[Replicate()]),
        local_of(tree["state"]["tall"][slot]),
    ):
        rows = {**tree["state"], "tall": {**tree["state"]["tall"], slot: wrong}}
        with pytest.raises(ff.errors.ConfigurationError, match=f"{slot} of tall .*redistribute"):
            optimizer_from_tree(fresh, {**tree, "state": rows})
    terms = ff.tree_map(
        lambda x: DTensor.from_local(local_of(x), mesh, [Partial()], run_check=False) if is_sharded(x) else x, state
    )
    with pytest.raises((ff.FabricfnError, RuntimeError)):
        ff.optimizer_step(ALONE, model, terms, grads)
    return True


def frozen(rt):
    mesh = line(rt)
    module = Net(torch.float64)
    module.tall.requires_grad_(False)
    model = ff.setup_model(ALONE, module)
    model = dataclasses.replace(model, params=split(mesh, model.params))
    state = ff.setup_optimizer(ALONE, model, optim.AdamW)
    values = {**numbers(1), "tall": None}
    twin = ff.tree_map(lambda value: value.detach() if is_sharded(value) else value.clone(), model)
    still = Lease({"tall": model.params["tall"]})
    pure, _ = ff.optimizer_step(ALONE, model, state, grads_of(model, values, mesh))
    assert_equal({"tall": pure.params["tall"]}, {"tall": numbers(0)["tall"]})
    after, _ = ff.optimizer_step(ALONE, model, state, grads_of(model, values, mesh), donate=True)
    assert_equal(after.params, whole(dict(pure.params)))
    still.check("frozen values")
    with pytest.raises(ff.DonatedError):
        twin.lease.check("Model")
    return True


def test_frozen_parameters_stay_and_the_others_are_found_out(ranks):
    ranks.run(frozen, world_size=2)


def trees(rt):
    """Two models in one optimizer, whose parameters have the same names."""
    mesh = line(rt)
    results = []
    for where in (None, mesh):
        models = {"a": setup(where), "b": [setup(where)]}
        grads = {"a": grads_of(models["a"], numbers(1), where), "b": [grads_of(models["a"], numbers(2), where)]}
        for opt, options in ((optim.NAdam, {}), ((start_momenta, momenta), {"elementwise": True})):
            state = ff.setup_optimizer(ALONE, models, opt, **options)
            for donate in (False, True):
                start, own = ff.tree_map(torch.clone, (models, state))
                after, then = ff.optimizer_step(ALONE, start, own, ff.tree_map(torch.clone, grads), donate=donate)
                tree = optimizer_to_tree(then)
                results.append(whole((dict(after["a"].params), dict(after["b"][0].params), then.state)))
                torch.testing.assert_close(whole(optimizer_from_tree(state, tree).state), results[-1][2])
    for mine, there in zip(results[4:], results[:4], strict=True):
        torch.testing.assert_close(mine, there, rtol=0, atol=0)
    return True


def start_momenta(params):
    return ff.tree_map(torch.zeros_like, params)


def momenta(grads, state, params):
    state = ff.tree_map(lambda m, g: 0.9 * m + g, state, grads)
    return ff.tree_map(lambda m: -0.1 * m, state), state


def test_several_models_in_one_optimizer(ranks):
    ranks.run(trees, world_size=3)


def loop(rt, where):
    """Clip and step on real ranks; pickled values come back."""
    mesh = line(rt) if where else None
    model = setup(mesh)
    state = ff.setup_optimizer(ALONE, model, optim.AdamW, lr=0.1, fused=False)
    norms = []
    for step in range(5):
        grads = grads_of(model, numbers(step), mesh)
        grads, norm = ff.clip_gradients(rt if where else ALONE, grads, max_norm=1.0, donate=step % 2 == 0)
        model, state = ff.optimizer_step(rt, model, state, grads, donate=step % 3 == 0)
        norms.append(norm.item())
    if where:
        again = pickle.loads(pickle.dumps(local_of(model.params["tall"])))
        assert torch.equal(again, local_of(model.params["tall"]))
    return {name: full(value).tolist() for name, value in model.params.items()}, norms


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_loop_on_real_ranks(real_ranks, world_size):
    expected, norms = loop(ALONE, False)
    for found, mine in real_ranks.run(loop, True, world_size=world_size):
        assert mine == pytest.approx(norms, rel=1e-13)
        for name, value in found.items():
            torch.testing.assert_close(
                torch.tensor(value, dtype=torch.float64),
                torch.tensor(expected[name], dtype=torch.float64),
                rtol=0,
                atol=1e-12,
            )


@pytest.mark.parametrize("case", ["finite", "donated", "memory"])
def test_the_cases_of_threads_on_real_ranks(real_ranks, case):
    if case == "finite":
        real_ranks.run(nonfinite, math.nan, world_size=3)
    else:
        real_ranks.run({"donated": donated, "memory": memory}[case], world_size=2)


def test_one_collective_for_all_gradients(real_ranks):
    assert all(len(calls) == 1 for calls in real_ranks.run(one_collective, world_size=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sgd_on_cpu_moves_every_number(dtype):
    """torch's fused kernel leaves whole vectors of such numbers as they are."""
    half = nn.Module()
    half.w = nn.Parameter(torch.zeros(40, dtype=dtype))
    rt = dataclasses.replace(ALONE, precision=ff.Precision.parse("bf16-mixed"))
    model = ff.setup_model(rt, half)
    grads = ff.Grads(params=MappingProxyType({"w": torch.ones(40, dtype=dtype)}), ref=model.ref)
    for options in ({"lr": 1.0}, {"lr": 1.0, "momentum": 0.9}):
        state = ff.setup_optimizer(rt, model, optim.SGD, **options)
        after, _ = ff.optimizer_step(rt, model, state, grads)
        assert torch.equal(after.params["w"], torch.full((40,), -1.0, dtype=dtype))
    with pytest.raises(ff.ConfigurationError, match="Leave fused=True out"):
        ff.setup_optimizer(rt, model, optim.SGD, lr=1.0, fused=True)
