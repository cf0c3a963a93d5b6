"""Steps of optimizers on parts: the bits of steps on whole tensors, for every kind of optimizer."""

import dataclasses
from types import MappingProxyType

import pytest
import torch
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh

import fabricfn as ff
from fabricfn.sharding import is_sharded
from fabricfn.states import optimizer_from_tree, optimizer_to_tree
from tests.support.dtensors import (
    EXACT,
    FUSED,
    Net,
    assert_equal,
    grads_of,
    line,
    numbers,
    setup,
    split,
    train,
    trains_as_single,
    whole,
)
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

ranks = world_of("threads", 4)


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
        ff.setup_optimizer(RT64, setup(line(rt)), opt)
    expected, alone = train(opt, {"elementwise": True})
    for donate in (False, True):
        params, state = train(opt, {"elementwise": True}, line(rt), donate=donate)
        assert_equal(params, expected)
        torch.testing.assert_close(whole(state.state), alone.state, rtol=0, atol=0)
        again = optimizer_from_tree(state, optimizer_to_tree(state))
        torch.testing.assert_close(whole(again.state), alone.state, rtol=0, atol=0)
        model, plain = setup(line(rt)), setup()
        after, _ = ff.optimizer_step(RT64, model, again, grads_of(model, numbers(9), line(rt)))
        there, _ = ff.optimizer_step(RT64, plain, alone, grads_of(plain, numbers(9)))
        assert_equal(after.params, there.params)
    found = state.state["mean"]["tall"] if "mean" in state.state else next(iter(state.state["tall"].values()))
    assert is_sharded(found) or opt is Child
    return True


@pytest.mark.parametrize("kind", OWN)
def test_an_optimizer_of_the_users_own_updates_parts_only_on_his_word(ranks, kind):
    ranks.run(own_optimizer, OWN[kind], world_size=3)


def refused(rt, opt, options):
    with pytest.raises(ff.CapabilityError, match="needs"):
        ff.setup_optimizer(RT64, setup(line(rt)), opt, elementwise=True, **options)
    return True


@pytest.mark.parametrize("opt", [optim.LBFGS, optim.Muon, optim.Adafactor, optim.SparseAdam])
def test_what_needs_whole_tensors_is_refused_whatever_the_word(ranks, opt):
    ranks.run(refused, opt, {}, world_size=2)


def instances(rt):
    module = Net(torch.float64)
    expected, alone = train(optim.AdamW, {"lr": 0.1})
    model = ff.setup_model(RT64, module)
    built = {kind: kind(module.parameters(), lr=0.1) for kind in (optim.AdamW, optim.Adagrad)}
    for param, value in zip(module.parameters(), numbers(1).values(), strict=True):
        param.grad = value
    built[optim.AdamW].step()  # its state is of whole tensors
    sharded = dataclasses.replace(model, params=split(line(rt), model.params))
    for instance in built.values():
        state = ff.setup_optimizer(RT64, sharded, instance)
        plain = ff.setup_optimizer(RT64, model, instance)
        assert is_sharded(next(slot for slot in state.state["w"].values() if slot.ndim))
        torch.testing.assert_close(whole(state.state), plain.state, rtol=0, atol=0)
        after, _ = ff.optimizer_step(RT64, sharded, state, grads_of(model, numbers(2), line(rt)))
        there, _ = ff.optimizer_step(RT64, model, plain, grads_of(model, numbers(2)))
        assert_equal(after.params, there.params)
    built[optim.AdamW].register_step_pre_hook(lambda *_: None)
    with pytest.raises(ff.CapabilityError, match="AdamW with hooks"):
        ff.setup_optimizer(RT64, sharded, built[optim.AdamW])
    return True


def test_an_instance_brings_state_of_whole_tensors_which_is_cut(ranks):
    ranks.run(instances, world_size=3)


def with_closure(rt):
    results = []
    for mesh in (None, line(rt)):
        model = setup(mesh)
        state = ff.setup_optimizer(RT64, model, optim.SGD, lr=0.1)

        def closure(trial, mesh=mesh):
            assert is_sharded(trial.params["w"]) is (mesh is not None)
            return torch.zeros(()), grads_of(trial, numbers(1), mesh)

        results.append(ff.optimizer_step(RT64, model, state, closure=closure)[0].params)
    assert_equal(results[1], results[0])
    return True


def test_a_closure_sees_and_returns_dtensors(ranks):
    ranks.run(with_closure, world_size=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sgd_on_cpu_moves_every_number(dtype):
    """torch's fused kernel leaves whole vectors of such numbers as they are."""
    half = nn.Module()
    half.w = nn.Parameter(torch.zeros(40, dtype=dtype))
    rt = dataclasses.replace(RT64, precision=ff.Precision.parse("bf16-mixed"))
    model = ff.setup_model(rt, half)
    grads = ff.Grads(params=MappingProxyType({"w": torch.ones(40, dtype=dtype)}), ref=model.ref)
    for options in ({"lr": 1.0}, {"lr": 1.0, "momentum": 0.9}):
        state = ff.setup_optimizer(rt, model, optim.SGD, **options)
        after, _ = ff.optimizer_step(rt, model, state, grads)
        assert torch.equal(after.params["w"], torch.full((40,), -1.0, dtype=dtype))
    with pytest.raises(ff.ConfigurationError, match="Leave fused=True out"):
        ff.setup_optimizer(rt, model, optim.SGD, lr=1.0, fused=True)
