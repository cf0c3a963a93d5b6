"""DeepSpeed, the real package, on CPU ranks: ZeRO obeys the laws of every strategy, in float32, which it knows."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import CapabilityError, GradientError, ModelError
from fabricfn.sharding import is_sharded, local_of, whole
from fabricfn.testing import cases
from tests.support.worlds import world_of
from tests.support.zero_stages import EVERY, ROWS, SINGLE, TOLERANCE, close, made, mine, mse, several, strategy, wholes

pytest.importorskip("deepspeed", reason='the extra "test" has it')

ranks = world_of("processes", 2)


def row(loss=cases.mean_square, optimizer=torch.optim.SGD, **options):
    """A training loop on any data; donation is tried where the law of it is checked."""
    module, x_shape, y_shape = cases.build("tied", 5, 2)
    x, y = (cases.filled((23, *shape), torch.float32, seed) for seed, shape in enumerate((x_shape, y_shape)))
    net = cases.initialised(module.float(), 7)
    return testing.training_loop(net, loss, (x, y), optimizer, batch_size=17, **{"lr": 0.1, **options})


# The laws


@EVERY
def test_the_laws_of_training(ranks, options):
    train = row(momentum=0.9)
    settings = {"strategies": (strategy(options),), "ranks": ranks, "precision": SINGLE}
    assert testing.check_purity(train, world_sizes=(2,), **settings) == 4
    assert testing.check_equivalence(train, accumulation=(1, 2), tolerance=TOLERANCE, world_sizes=(1, 2), **settings)
    assert testing.check_accumulation(train, accumulation=(3,), tolerance=TOLERANCE, world_sizes=(2,), **settings)
    assert testing.check_donation(train, world_sizes=(2,), **settings) == 2
    assert testing.check_resume(train, tolerance=TOLERANCE, world_sizes=(1, 2), **settings) == 6


def test_four_ranks_are_one():
    with testing.processes(4) as ranks:
        for stage in (1, 2, 3):
            testing.check_equivalence(
                *(row(momentum=0.9),),
                accumulation=(1,),
                tolerance=TOLERANCE,
                world_sizes=(4,),
                strategies=(strategy({"stage": stage}),),
                ranks=ranks,
                precision=SINGLE,
            )


def test_checkpoints_between_stages_and_other_strategies(ranks):
    def make(rt):
        model = ff.setup_model(rt, made())
        opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-3)
        ema = ff.map_params(lambda value: value / 2, model)
        _, grads = ff.value_and_grad(rt, lambda net: net(torch.ones(2, 3)).sum())(model)
        model, opt = ff.optimizer_step(rt, model, opt, grads)
        return {"nets": (model, ema), "opt": opt}

    strategies = [*(strategy(ROWS[name]) for name in ("stage 1", "stage 3, offload")), "fsdp"]
    assert (
        testing.check_checkpoint(make, ranks=ranks, strategies=strategies, world_sizes=(1, 2), precision=SINGLE)
        == 6 * 3 * 3
    )


def from_golden(rt, name):
    folder = Path(__file__).parent / "golden"
    spec = importlib.util.spec_from_file_location("make_deepspeed", folder / "make_deepspeed.py")
    formulas = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formulas)
    model = ff.setup_model(rt, formulas.Net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, groups={"two.*": {"weight_decay": 0.5}})
    like = {"module": ff.map_params(torch.zeros_like, model), "optimizer": opt}
    found = ff.load_raw(rt, folder / "deepspeed" / name, like)
    return ff.gather_params(rt, found["module"]), ff.tree_map(whole, found["optimizer"].state)


def test_its_own_checkpoints_load_into_other_stages(ranks):
    for stage, name in ((1, "stage3"), (3, "stage1"), (3, "stage3_universal")):
        expected = ranks.run(from_golden, name, world_size=1, strategy="single", precision=SINGLE)[0]
        for found in ranks.run(from_golden, name, strategy=strategy({"stage": stage}), precision=SINGLE):
            assert testing.difference(found, expected) is None


# The gradients


@EVERY
def test_any_loss_gives_what_single_gives(ranks, options):
    (expected,) = ranks.run(several, world_size=1, strategy="single", precision=SINGLE)
    for found in ranks.run(several, strategy=strategy(options), precision=SINGLE):
        close(found, expected)


# Optimizers, precisions


def stepped(rt, kind, groups, options):
    model = ff.setup_model(rt, made())
    opt = ff.setup_optimizer(rt, model, kind, groups=groups, **options)
    for _ in range(3):
        _, grads = ff.value_and_grad(rt, mse)(model, *mine(rt))
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
    return ff.gather_params(rt, model), opt.step


@pytest.mark.parametrize(
    ("kind", "groups", "options"),
    [
        (torch.optim.AdamW, {"*bias": {"weight_decay": 0.0, "lr": 1e-3}}, {"lr": 1e-2, "eps": 1e-3}),
        (torch.optim.NAdam, None, {"lr": 1e-2, "eps": 1e-3}),
        (torch.optim.Adagrad, None, {"lr": 1e-2, "eps": 1e-3}),
    ],
)
def test_optimizers_step_as_on_whole_tensors(ranks, kind, groups, options):
    expected = ranks.run(stepped, kind, groups, options, world_size=1, strategy="single", precision=SINGLE)[0]
    for name in ("stage 2", "stage 3, offload"):
        for found in ranks.run(stepped, kind, groups, options, strategy=strategy(ROWS[name]), precision=SINGLE):
            close(found, expected)


def low(rt):
    model = ff.setup_model(rt, made())
    slots = {slot.dtype for slot in model.ref.engine.frames[0].slots if slot.requires_grad}
    loss, grads = ff.value_and_grad(rt, mse)(model, *mine(rt))
    assert all(grad is None or grad.dtype is model.params[name].dtype for name, grad in grads.params.items())
    return slots, {value.dtype for value in cutted(model)}, wholes(grads)


def cutted(model):
    return [value for value in model.params.values() if is_sharded(value)]


@pytest.mark.parametrize(("precision", "kept"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_the_engine_computes_in_bfloat16(ranks, precision, kept):
    expected = ranks.run(low, world_size=1, strategy="single", precision=SINGLE)[0][2]
    for stage in (2, 3):
        for slots, values, grads in ranks.run(low, strategy=strategy({"stage": stage}), precision=precision):
            assert slots == {torch.bfloat16} and values == {kept}
            for name, grad in grads.items():
                if grad is not None:
                    scale = expected[name].abs().max()
                    assert (grad.float() - expected[name]).abs().max() < 0.06 * scale + 1e-3, name
                    assert not torch.equal(grad.float(), expected[name])


# What a rank holds


def holding(rt):
    model = ff.setup_model(rt, made(rt.rank))
    assert all(
        torch.equal(a, b) for a, b in zip(ff.gather_params(rt, model).values(), made().parameters(), strict=True)
    )
    trained = [value for name, value in model.params.items() if name != "fixed"]
    assert not any("shm_comm" in name for name in sys.modules)
    return sum(local_of(value).numel() for value in trained), sum(value.numel() for value in trained)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_rank_holds_a_part_and_nothing_is_compiled(ranks, stage):
    parts = ranks.run(holding, strategy=strategy({"stage": stage}), precision=SINGLE)
    assert sum(part for part, _ in parts) == parts[0][1]
    assert max(part for part, _ in parts) < 0.6 * parts[0][1]


def computing(rt):
    value = ff.setup_model(rt, nn.Linear(3, 5)).params["weight"]
    full = whole(value)
    for fn in (
        lambda w: 2 * w + 1,
        torch.clone,
        lambda w: torch.lerp(w, w * 2, 0.25),
        lambda w: w.clone().mul_(3).add_(w),
        lambda w: w.abs().sqrt().double(),
        lambda w: torch.where(w > 0, w, torch.zeros_like(w)),
        lambda w: w * torch.arange(15.0).view(5, 3),
    ):
        found = fn(value)
        assert is_sharded(found) and found.shape == full.shape
        assert torch.equal(whole(found), fn(full)) and whole(found).dtype is fn(full).dtype
    assert torch.equal(whole(value), full)
    for fn in (torch.sum, lambda w: w @ w.T, lambda w: w.view(15), lambda w: w[0], lambda w: w * torch.ones(3)):
        with pytest.raises(CapabilityError, match="full_tensor"):
            fn(value)


def test_stretches_compute_number_by_number_and_nothing_else(ranks):
    ranks.run(computing, strategy=strategy({"stage": 3}), precision=SINGLE)


# What it refuses


class Break(torch.autograd.Function):
    """Fails in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("in backward")


def refusals(rt):
    model = ff.setup_model(rt, made())
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    batch = mine(rt)

    def failing(net, x, y):
        net(x)
        raise KeyError("halfway")

    def breaking(net, x, y):
        h = Break.apply(net.inp(x))
        return (net.out(net.blocks[1](net.blocks[0](h)) + net.back(x)) * net.scale - y).square().mean()

    before = wholes(ff.value_and_grad(rt, mse)(model, *batch)[1])
    for loss_fn, error, match in (
        (lambda net, x, y: net.inp(x).sum(), GradientError, "got no gradient: "),
        (failing, KeyError, "halfway"),
        (breaking, ArithmeticError, "in backward"),
    ):
        with pytest.raises(error, match=match):
            ff.value_and_grad(rt, loss_fn)(model, *batch)
        close(wholes(ff.value_and_grad(rt, mse)(model, *batch)[1]), before)
    with pytest.raises(CapabilityError, match="allow_unused=True needs"):
        ff.value_and_grad(rt, mse, allow_unused=True)
    with pytest.raises(CapabilityError, match="gather_params"):
        torch.func.vmap(lambda x: ff.apply(rt, model, x))(batch[0])
    with pytest.raises(CapabilityError, match='init_runtime.strategy="ddp"'):
        ff.accumulate(rt, mse, reduce="canonical")(model, [batch, batch])
    with pytest.raises(CapabilityError, match="Muon"):
        ff.setup_optimizer(rt, ff.setup_model(rt, nn.Linear(2, 2)), torch.optim.Muon)
    with pytest.raises(CapabilityError, match='float64.*"32-true"'):
        ff.setup_model(ff.Runtime(world=rt.world, precision=ff.Precision.parse(64), strategy=rt.strategy), made())
    other = ff.setup_model(rt, nn.Linear(7, 7, bias=False))
    stranger = ff.map_params(lambda value: value, model)
    cut = {**model.params, "blocks.0.0.weight": other.params["weight"]}
    if rt.strategy.name != "deepspeed_stage_3":  # which cuts all tensors of a shape alike
        with pytest.raises(ModelError, match="is not cut as the module.*ff.load"):
            ff.value_and_grad(rt, mse)(dataclasses.replace(stranger, params=cut), *batch)
    _, grads = ff.value_and_grad(rt, mse)(model, *batch)
    ff.optimizer_step(rt, model, opt, grads, donate=True)
    with pytest.raises(ff.errors.DonatedError, match="given away"):
        ff.value_and_grad(rt, mse)(model, *batch)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_it_cannot_do_is_refused_and_the_engine_goes_on(ranks, stage):
    ranks.run(refusals, strategy=strategy({"stage": stage}), precision=SINGLE)


def spared(rt, policies):
    model = ff.setup_model(rt, made(), activation_checkpointing=policies)
    return wholes(ff.value_and_grad(rt, mse)(model, *mine(rt))[1])


@pytest.mark.parametrize("stage", ["stage 2", "stage 3"])
def test_policies_of_activation_checkpointing(ranks, stage):
    run = functools.partial(ranks.run, spared, strategy=strategy(ROWS[stage]), precision=SINGLE)
    expected = run(None)
    for policy in ("recompute", "offload", "keep_matmuls"):
        assert testing.difference(run({policy: nn.Sequential}), expected) is None, policy
