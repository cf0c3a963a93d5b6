"""Donation, clipping and arithmetic where leaves are DTensors, also on one rank and on real ones."""

import copy
import dataclasses
import math
import pickle
from types import MappingProxyType

import pytest
import torch
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial

import fabricfn as ff
from fabricfn.optimizers.skipping import all_finite
from fabricfn.runs import scale
from fabricfn.sharding import full, is_sharded, local_of, with_local
from fabricfn.states import overlap
from tests.support.dtensors import (
    EXACT,
    FUSED,
    SHAPES,
    assert_equal,
    grads_of,
    line,
    numbers,
    setup,
    split,
    trains_as_single,
    whole,
)
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

ranks = world_of("threads", 4)
real_ranks = world_of("processes", 3)


def test_one_rank_has_everything(group):
    rt = dataclasses.replace(RT64, world=ff.World(group=group))
    for opt, options in (*EXACT.values(), *FUSED.values()):
        trains_as_single(rt, opt, options, torch.float32, True)
    for case in (donated, mapped, partial_steps):
        case(rt)
    clipped(rt, "line", 2.0)


def donated(rt):
    mesh = line(rt)
    for opt in (optim.AdamW, optim.RMSprop):
        model = setup(mesh)
        state = ff.setup_optimizer(RT64, model, opt)
        grads = grads_of(model, numbers(1), mesh)
        _, state = ff.optimizer_step(RT64, model, state, grads)  # RMSprop has no state before
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
        pure, _ = ff.optimizer_step(RT64, model, state, grads)
        assert_equal(model.params, whole(dict(before.params)))
        after, next_state = ff.optimizer_step(RT64, model, state, grads, donate=True)
        assert all(local_of(after.params[name]) is part for name, part in parts.items())
        assert_equal(after.params, whole(dict(pure.params)))
        again = grads_of(model, numbers(2), mesh)
        for name, old in {"itself": model, "alias": alias, **twins}.items():
            with pytest.raises(ff.DonatedError):
                old.lease.check(name)
            with pytest.raises(ff.DonatedError):
                ff.optimizer_step(RT64, old, next_state, again)
        for old in (state, state_twin):
            with pytest.raises(ff.DonatedError):
                ff.optimizer_step(RT64, after, old, again)
        with pytest.raises(ff.DonatedError):
            ff.optimizer_step(RT64, after, next_state, grads)
        ff.optimizer_step(RT64, after, next_state, again)
        ff.optimizer_step(RT64, before, next_state, again)
    return True


def test_donation_is_found_out_through_every_wrapper_of_a_part(ranks):
    ranks.run(donated, world_size=2)


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
        plain = ff.setup_model(RT64, module)
        model = dataclasses.replace(plain, params=others)
        state = ff.setup_optimizer(RT64, model, optim.SGD, lr=0.1)
        grads = ff.Grads(params=MappingProxyType({n: v.clone() for n, v in others.items()}), ref=model.ref)
        if shared:
            with pytest.raises(ff.ModelError, match="one and three share memory"):
                ff.optimizer_step(RT64, model, state, grads, donate=True)
        else:
            ff.optimizer_step(RT64, model, state, grads, donate=True)
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
        expected, norm = ff.clip_gradients(RT64, grads_of(model, values), norm_type=norm_type, **limit)
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
    state = ff.setup_optimizer(RT64, model, optim.AdamW)
    for wrong in (grads["w"], numbers(1)["w"], grads["w"].redistribute(placements=[Replicate()])):
        record = ff.Grads(params=MappingProxyType({**grads, "w": wrong}), ref=model.ref)
        with pytest.raises(ff.GradientError, match="the gradient of w is .*redistribute"):
            ff.optimizer_step(RT64, model, state, record)
    whole_w = {**model.params, "w": full(model.params["w"])}
    fine = grads_of(model, numbers(1), line(rt))
    with pytest.raises(ff.ModelError, match="w is a plain tensor"):
        ff.optimizer_step(RT64, dataclasses.replace(model, params=whole_w), state, fine)
    return True


def test_what_is_placed_otherwise_is_refused_by_name(ranks):
    ranks.run(partial_steps, world_size=2)


def mapped(rt):
    mesh = line(rt)
    model, other = setup(mesh), dataclasses.replace(setup(mesh), params=split(mesh, numbers(7)))
    state = ff.setup_optimizer(RT64, model, optim.NAdam)
    ema = ff.map_params(lambda a, b: a.lerp(b, 0.1), model, other)
    mean = ff.tree_map(lambda a, b: (a + b) / 2, model, other)
    expected = {name: value.lerp(numbers(7)[name], 0.1) for name, value in setup().params.items()}
    torch.testing.assert_close(whole(dict(ema.params)), expected, rtol=0, atol=1e-15)
    for made in (ema, mean, ff.eval_mode(ema), ff.map_params(torch.zeros_like, model), copy.deepcopy(model)):
        assert all(is_sharded(value) is (name != "plain") for name, value in made.params.items())
        for donate in (False, True):
            start = ff.tree_map(torch.clone, made)
            own = ff.tree_map(torch.clone, state)
            after, _ = ff.optimizer_step(RT64, start, own, grads_of(model, numbers(1), mesh), donate=donate)
            alone = setup()
            plain = dataclasses.replace(alone, params=whole(dict(made.params)))
            fresh = ff.setup_optimizer(RT64, alone, optim.NAdam)
            there, _ = ff.optimizer_step(RT64, plain, fresh, grads_of(plain, numbers(1)))
            assert_equal(after.params, there.params)
    doubled = ff.tree_map(torch.add, *[grads_of(model, numbers(1), mesh)] * 2)
    after, _ = ff.optimizer_step(RT64, model, state, doubled)
    twice = scale([[*grads_of(model, numbers(1), mesh).params.values(), None]], 2.0)[0]
    assert twice.pop() is None
    torch.testing.assert_close(whole(twice), whole(list(doubled.params.values())), rtol=0, atol=0)
    again, _ = ff.optimizer_step(
        RT64, model, state, ff.Grads(params=MappingProxyType(dict(zip(SHAPES, twice, strict=True))), ref=model.ref)
    )
    assert_equal(again.params, whole(dict(after.params)))
    return True


def test_arithmetic_on_sharded_models_gives_models_that_train(ranks):
    ranks.run(mapped, world_size=3)


def loop(rt, where):
    """Clip and step on real ranks; pickled values come back."""
    mesh = line(rt) if where else None
    model = setup(mesh)
    state = ff.setup_optimizer(RT64, model, optim.AdamW, lr=0.1, fused=False)
    norms = []
    for step in range(5):
        grads = grads_of(model, numbers(step), mesh)
        grads, norm = ff.clip_gradients(rt if where else RT64, grads, max_norm=1.0, donate=step % 2 == 0)
        model, state = ff.optimizer_step(rt, model, state, grads, donate=step % 3 == 0)
        norms.append(norm.item())
    if where:
        again = pickle.loads(pickle.dumps(local_of(model.params["tall"])))
        assert torch.equal(again, local_of(model.params["tall"]))
    return {name: full(value).tolist() for name, value in model.params.items()}, norms


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_loop_on_real_ranks(real_ranks, world_size):
    expected, norms = loop(RT64, False)
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
