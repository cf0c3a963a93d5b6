"""Schedules as functions of the step: the values of torch's own schedulers, in any order of calls."""

import pickle
import random
import warnings
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import fabricfn as ff
from fabricfn.errors import ConfigurationError
from tests.support.runtimes import RT64

STEPS = 25

CASES = {
    "StepLR": (schedulers.StepLR, {"step_size": 3, "gamma": 0.5}),
    "MultiStepLR": (schedulers.MultiStepLR, {"milestones": [2, 5, 5, 11]}),
    "ConstantLR": (schedulers.ConstantLR, {"total_iters": 4}),
    "LinearLR": (schedulers.LinearLR, {"start_factor": 0.1, "total_iters": 7}),
    "ExponentialLR": (schedulers.ExponentialLR, {"gamma": 0.9}),
    "PolynomialLR": (schedulers.PolynomialLR, {"total_iters": 9, "power": 2.0}),
    "CosineAnnealingLR": (schedulers.CosineAnnealingLR, {"T_max": 8, "eta_min": 1e-3}),
    "CosineAnnealingWarmRestarts": (schedulers.CosineAnnealingWarmRestarts, {"T_0": 3, "T_mult": 2}),
    "LambdaLR": (schedulers.LambdaLR, {"lr_lambda": lambda step: 1 / (1 + step)}),
    "MultiplicativeLR": (schedulers.MultiplicativeLR, {"lr_lambda": lambda step: 0.9 + 0.001 * step}),
    "OneCycleLR": (schedulers.OneCycleLR, {"max_lr": 0.5, "total_steps": STEPS}),
    "CyclicLR": (schedulers.CyclicLR, {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 4}),
}
PARTS = [
    partial(schedulers.LinearLR, start_factor=0.1, total_iters=5),
    partial(schedulers.CosineAnnealingLR, T_max=10),
    partial(schedulers.ExponentialLR, gamma=0.9),
]


def by_torch(optimizer, build, key):
    """The hyperparameter before each step of a plain loop, one list per step."""
    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = build(optimizer)
        for step in range(STEPS):
            out.append([group[key] for group in optimizer.param_groups])
            optimizer.step()
            if step < STEPS - 1:
                scheduler.step()
    return out


def adamw(*rates):
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": rate} for rate in rates])


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_torch_in_any_order(name):
    cls, options = CASES[name]
    schedule = ff.schedule_from_torch(cls, 0.2, **options)
    expected = by_torch(adamw(0.2), lambda optimizer: cls(optimizer, **options), "lr")
    order = random.Random(0).sample(range(STEPS), STEPS)
    assert {step: [schedule(step)["lr"]] for step in order} == dict(enumerate(expected))
    assert [[schedule(step)["lr"]] for step in range(STEPS)] == expected


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_betas_and_momentum_move_where_the_scheduler_moves_them(name):
    cls, options = CASES[name]
    betas = by_torch(adamw(0.2), lambda optimizer: cls(optimizer, **options), "betas")
    schedule = ff.schedule_from_torch(cls, 0.2, **options)
    assert [[schedule(step)["betas"]] for step in range(STEPS)] == betas
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.2, momentum=0.9)
    momentum = by_torch(sgd, lambda optimizer: cls(optimizer, **options), "momentum")
    schedule = ff.schedule_from_torch(cls, 0.2, momentum=0.9, **options)
    assert [[schedule(step)["momentum"]] for step in range(STEPS)] == momentum
    still = ff.schedule_from_torch(cls, 0.2, **options, cycle_momentum=False)
    assert set(still(3)) == {"lr"}


def test_only_lr_where_nothing_else_moves():
    assert set(ff.schedule_from_torch(schedulers.StepLR, 0.2, step_size=3)(7)) == {"lr"}


def test_one_rate_per_group():
    schedule = ff.schedule_from_torch(schedulers.CosineAnnealingLR, [0.2, 0.4], T_max=8)
    expected = by_torch(adamw(0.2, 0.4), lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=8), "lr")
    assert [schedule(step)["lr"] for step in range(STEPS)] == expected
    lambdas = [lambda step: 0.5**step, lambda step: 1 / (1 + step)]
    schedule = ff.schedule_from_torch(schedulers.LambdaLR, [0.2, 0.4], lr_lambda=lambdas)
    assert schedule(2)["lr"] == [0.05, 0.4 / 3]


@pytest.mark.parametrize("chained", [False, True])
def test_schedulers_of_schedulers(chained):
    if chained:
        cls, options = schedulers.ChainedScheduler, {}
    else:
        cls, options = schedulers.SequentialLR, {"milestones": [5, 15]}
    schedule = ff.schedule_from_torch(cls, 0.2, schedulers=PARTS, **options)

    def build(optimizer):
        return cls(optimizer=optimizer, schedulers=[part(optimizer) for part in PARTS], **options)

    expected = by_torch(adamw(0.2), build, "lr")
    assert [[schedule(step)["lr"]] for step in reversed(range(STEPS))] == expected[::-1]


def test_a_function_that_makes_a_scheduler_will_do():
    def warmup(optimizer, steps):
        return schedulers.LinearLR(optimizer, start_factor=0.5, total_iters=steps)

    assert ff.schedule_from_torch(warmup, 1.0, steps=2)(1)["lr"] == 0.75


def test_in_a_loop_it_is_torchs_loop():
    module = torch.nn.Linear(3, 2).double()
    options = {"max_lr": 0.3, "total_steps": 6}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    scheduler = schedulers.OneCycleLR(optimizer, **options)
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
    schedule = ff.schedule_from_torch(schedulers.OneCycleLR, 0.1, **options)
    grad_fn = ff.value_and_grad(RT64, lambda net, x: net(x).square().mean())
    for seed in range(5):
        x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        _, grads = grad_fn(model, x)
        model, opt = ff.optimizer_step(RT64, model, opt, grads, donate=True, **schedule(opt.step))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
    for found, expected in zip(model.params.values(), module.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_steps_outside_are_refused():
    schedule = ff.schedule_from_torch(schedulers.OneCycleLR, 0.1, max_lr=0.3, total_steps=4)
    with pytest.raises(ConfigurationError, match="begins with step 0"):
        schedule(-1)
    with pytest.raises(ValueError, match="total"):
        schedule(10)
    assert schedule(0)["lr"] == pytest.approx(0.3 / 25)
    with pytest.raises(TypeError):
        ff.schedule_from_torch(schedulers.StepLR, 0.1, stepsize=3)


PLATEAUS = [
    {},
    {"mode": "max", "patience": 1, "factor": 0.5},
    {"threshold_mode": "abs", "threshold": 0.05, "patience": 0, "cooldown": 2},
    {"mode": "max", "threshold_mode": "abs", "threshold": 0.1, "patience": 2, "min_lr": 0.03, "factor": 0.6},
    {"patience": 0, "eps": 0.02, "factor": 0.8},
]


@pytest.mark.parametrize("options", PLATEAUS)
@pytest.mark.parametrize("rates", [0.2, [0.2, 0.4]])
def test_plateau_is_that_of_torch(options, rates):
    optimizer = adamw(*(rates if isinstance(rates, list) else [rates]))
    scheduler = schedulers.ReduceLROnPlateau(optimizer, **options)
    init, update = ff.reduce_on_plateau(**options)
    plateau = init(rates)
    generator = random.Random(1)
    seen = set()
    for step in range(60):
        metric = generator.random() if step % 7 else float("nan")
        scheduler.step(metric)
        before = plateau
        plateau = update(plateau, torch.tensor(metric, dtype=torch.float64))
        assert before == before._replace()
        found = plateau.lr if isinstance(rates, list) else [plateau.lr]
        assert found == [group["lr"] for group in optimizer.param_groups]
        assert plateau.num_bad == scheduler.num_bad_epochs
        assert plateau.cooldown_left == scheduler.cooldown_counter
        assert plateau.best == scheduler.best
        seen.add(str(found))
        plateau = pickle.loads(pickle.dumps(plateau))
    assert len(seen) > 1
    assert update(before, 0.5) == update(before, 0.5)


def test_plateau_checks_its_arguments():
    for options in ({"mode": "least"}, {"threshold_mode": "relative"}, {"factor": 1.0}):
        with pytest.raises(ConfigurationError):
            ff.reduce_on_plateau(**options)
    with pytest.raises(ConfigurationError, match="min_lr has 2"):
        ff.reduce_on_plateau(min_lr=[0.1, 0.2])[0](0.5)
