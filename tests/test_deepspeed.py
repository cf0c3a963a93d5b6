"""DeepSpeed, the real package, on CPU ranks: ZeRO obeys the laws of every strategy, in float32, which it knows."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import CapabilityError, ConfigurationError, GradientError, ModelError
from fabricfn.sharding import is_sharded, local_of, whole
from fabricfn.testing import cases
from tests.worlds import world_of

pytest.importorskip("deepspeed", reason='the extra "test" has it')

SINGLE, TOLERANCE = "32-true", 3e-6  # float32, sums in another order
ROWS = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "config": {"zero_optimization": {"stage3_param_persistence_threshold": 4}}},
    "stage 2, offload": {"stage": 2, "offload_optimizer": "cpu"},
    "stage 3, offload": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
}
EVERY = pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)


ranks = world_of("processes", 2)


class Net(nn.Module):
    """Tied weights, a frozen one, a scalar, a buffer, shapes that two ranks do not divide."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(3, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(2))
        self.out = nn.Linear(7, 3, bias=False)
        self.back = nn.Linear(3, 7, bias=False)
        self.back.weight = nn.Parameter(self.back.weight.detach().clone())
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.fixed = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.seen += 1
        h = self.inp(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h + self.back(x)) * self.scale + self.fixed


def made(seed=0):
    return cases.initialised(Net(), seed).float()


def data(rows=12):
    return cases.filled((rows, 3), torch.float32, 1), cases.filled((rows, 3), torch.float32, 2)


def mine(rt):
    return [tensor.chunk(rt.world_size)[rt.rank] for tensor in data()]


def mse(net, x, y):
    return (net(x) - y).square().mean()


def taught(net, x, y, teacher):
    return mse(net, x, y) + (net(x) - teacher(x)).square().mean()


def through(net, x, y, judge):
    return mse(net, x, y) + judge(net(x)).square().mean()


def twice(net, x, y):
    return mse(net, x, y) + net.inp(x).mean() + net.out.weight.square().sum()


def checkpointed(net, x, y):
    h = net.inp(x)
    for block in net.blocks:
        h = h + checkpoint(block, h, use_reentrant=False)
    return (net.out(h + net.back(x)) * net.scale + net.fixed - y).square().mean()


def pair(nets, x, y):
    return mse(nets["a"], x, y) + (nets["a"](x) - nets["b"](x)).square().mean()


def wholes(grads):
    return {name: None if grad is None else whole(grad) for name, grad in grads.params.items()}


def close(found, expected):
    worst = testing.difference(found, expected, TOLERANCE)
    assert worst is None, worst


def strategy(options):
    return ff.strategies.deepspeed(**options)


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


def several(rt):
    model, other = ff.setup_model(rt, made()), ff.setup_model(rt, made(5))
    half = ff.map_params(lambda value: 0.5 * value, model)

    def gradients(models, loss_fn, *others):
        loss, grads = ff.value_and_grad(rt, loss_fn)(models, *mine(rt), *others)
        if isinstance(models, dict):
            return ff.all_reduce(rt, loss), {name: wholes(grads[name]) for name in models}
        return ff.all_reduce(rt, loss), wholes(grads)

    def norm(limit):
        _, grads = ff.value_and_grad(rt, mse)(model, *mine(rt))
        grads, norm = ff.clip_gradients(rt, grads, max_norm=limit)
        return norm, wholes(grads)

    return {
        "plain": gradients(model, mse),
        "teacher": gradients(model, taught, half),
        "another teacher": gradients(model, taught, other),
        "a frozen judge": gradients(model, through, other),
        "direct and twice": gradients(model, twice),
        "checkpointed": gradients(model, checkpointed),
        "other values": gradients(half, mse),
        "two models": gradients({"a": model, "b": other}, pair),
        "two records": gradients({"a": model, "b": half}, pair),
        "accumulated": halves(rt, model),
        "clipped": norm(0.1),
        "apply": ff.apply(rt, half, data()[0]),
        "value": ff.value(rt, lambda net, x, y: (mse(net, x, y) * len(x), len(x)), weighted=True)(model, *mine(rt)),
        "input": inputs(rt, model),
        "module": dict(ff.to_module(rt, half).state_dict()),
        "plain again": gradients(model, mse),
    }


def halves(rt, model):
    """Two micro-batches of one size: the mean of their means."""
    x, y = mine(rt)
    return wholes(ff.accumulate(rt, mse)(model, zip(x.chunk(2), y.chunk(2), strict=True))[1])


def inputs(rt, model):
    x = data()[0].requires_grad_()
    return torch.autograd.grad(ff.apply(rt, model, x).sum(), x)[0]


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


def test_threads_are_refused():
    with testing.threads(2) as world, pytest.raises(CapabilityError, match=r"ranks are processes.*processes\(n\)"):
        world.run(lambda rt: ff.setup_model(rt, made()), strategy=strategy({}), precision=SINGLE)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"stage": 4}, ConfigurationError, "there are 0, 1, 2 and 3"),
        ({"stage": 1, "config": {"zero_optimization": {"stage": 2}}}, ConfigurationError, "differs"),
        ({"offload_optimizer": "gpu"}, ConfigurationError, 'None and "cpu"'),
        ({"stage": 2, "offload_param": "cpu"}, ConfigurationError, "needs stage 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, ConfigurationError, "needs stage 1"),
        ({"stage": 3, "offload_param": "nvme"}, CapabilityError, "deepspeed_stage_3_offload"),
        ({"config": {"gradient_clipping": 1.0}}, ConfigurationError, "clip_gradients"),
        ({"config": {"optimizer": {"type": "Adam"}, "bf16": {"enabled": True}}}, ConfigurationError, "setup_optimizer"),
        ({"config": "no such file.json"}, ConfigurationError, "cannot be read"),
    ],
)
def test_options_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        strategy(options)


def test_names_and_files(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 3}}))
    assert ff.strategies.deepspeed(config=path).name == "deepspeed_stage_3"
    for name, expected in (
        ("deepspeed", "deepspeed_stage_2"),
        ("deepspeed_stage_1", "deepspeed_stage_1"),
        ("deepspeed_stage_1_offload", "deepspeed_stage_1_offload"),
        ("deepspeed_stage_3_offload", "deepspeed_stage_3_offload"),
    ):
        assert ff.strategies.resolve(name, 2).name == expected
    with pytest.raises(CapabilityError, match="nvme"):
        ff.strategies.resolve("deepspeed_stage_3_offload_nvme", 2)


def test_a_missing_package_is_a_clear_error():
    code = """if True:
        import sys
        sys.modules["deepspeed"] = None
        import fabricfn as ff
        try:
            ff.strategies.resolve("deepspeed", 2)
        except ff.errors.CapabilityError as error:
            assert 'pip install "fabricfn[deepspeed]"' in str(error), error
        else:
            raise SystemExit("it was found")
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def spared(rt, policies):
    model = ff.setup_model(rt, made(), activation_checkpointing=policies)
    return wholes(ff.value_and_grad(rt, mse)(model, *mine(rt))[1])


@pytest.mark.parametrize("stage", ["stage 2", "stage 3"])
def test_policies_of_activation_checkpointing(ranks, stage):
    run = functools.partial(ranks.run, spared, strategy=strategy(ROWS[stage]), precision=SINGLE)
    expected = run(None)
    for policy in ("recompute", "offload", "keep_matmuls"):
        assert testing.difference(run({policy: nn.Sequential}), expected) is None, policy
