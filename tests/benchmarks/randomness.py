"""CPU time of one training step with dropout: with a key, without one, and seeded as one does without keys."""

from collections.abc import Callable

import torch
from torch import nn

import fabricfn as ff
from tests.benchmarks.jobs import job, squares
from tests.benchmarks.loops import LEARNING_RATE
from tests.benchmarks.timing import interleaved


def make_net(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1)) for _ in range(layers)))


def step_of(layers: int, seeding: str) -> Callable[[], None]:
    rt = ff.init_runtime(accelerator="cpu", devices=1)
    model = ff.setup_model(rt, make_net(layers))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=LEARNING_RATE)
    grad_fn = ff.value_and_grad(rt, squares)
    key = ff.key(0)
    x, y = job("4 layers").batch

    def step() -> None:
        nonlocal model, opt
        if seeding == "manual_seed":
            torch.manual_seed(opt.step)
        _, grads = grad_fn(model, x, y, rng=ff.fold_in(key, opt.step) if seeding == "key" else None)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)

    return step


def measure(layers: int, rounds: int) -> dict[str, float]:
    """Median seconds of CPU of one step, by contender."""
    torch.set_num_threads(1)
    contenders = {
        "no key": step_of(layers, "none"),
        "no key again (noise)": step_of(layers, "none"),
        "a key a step": step_of(layers, "key"),
        "torch.manual_seed a step": step_of(layers, "manual_seed"),
    }
    return interleaved(contenders, rounds, warmup=30)
