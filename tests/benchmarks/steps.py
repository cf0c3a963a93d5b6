"""CPU time of one training step: forward, backward, AdamW; fabricfn against loops that people write."""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from tests.benchmarks.timing import interleaved

LEARNING_RATE = 1e-3


def make_net(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers)))


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 32, generator=generator), torch.randn(8, 32, generator=generator)


def loss_fn(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(net(x), y)


def by_hand(layers: int, precision: str, fused: bool | None = None) -> Callable[[], None]:
    net = make_net(layers)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, fused=fused)
    x, y = make_batch()

    def context() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()

    def step() -> None:
        optimizer.zero_grad()
        with context():
            loss = loss_fn(net, x, y)
        loss.backward()
        optimizer.step()

    return step


def by_fabricfn(layers: int, precision: str, donate: bool) -> Callable[[], None]:
    rt = ff.init_runtime(accelerator="cpu", devices=1, precision=precision)
    model = ff.setup_model(rt, make_net(layers))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=LEARNING_RATE)
    grad_fn = ff.value_and_grad(rt, loss_fn)
    x, y = make_batch()

    def step() -> None:
        nonlocal model, opt
        _, grads = grad_fn(model, x, y)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)

    return step


def by_fabric(layers: int, precision: str) -> Callable[[], None]:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    net = make_net(layers)
    net, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), LEARNING_RATE))
    x, y = make_batch()

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_fn(net, x, y)
        fabric.backward(loss)
        optimizer.step()

    return step


def by_accelerate(layers: int, precision: str) -> Callable[[], None]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16-mixed" else "no")
    net = make_net(layers)
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), LEARNING_RATE))
    x, y = make_batch()

    def step() -> None:
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = loss_fn(net, x, y)
        accelerator.backward(loss)
        optimizer.step()

    return step


def measure(layers: int, precision: str, rounds: int) -> dict[str, float]:
    """Median seconds of CPU of one step, by contender."""
    torch.set_num_threads(1)
    contenders = {
        "plain": by_hand(layers, precision),
        "plain again (noise)": by_hand(layers, precision),
        "fused": by_hand(layers, precision, fused=True),
        "fabricfn, donated": by_fabricfn(layers, precision, donate=True),
        "fabricfn, pure": by_fabricfn(layers, precision, donate=False),
    }
    if importlib.util.find_spec("lightning_fabric"):
        contenders["Lightning Fabric"] = by_fabric(layers, precision)
    if importlib.util.find_spec("accelerate"):
        contenders["Accelerate"] = by_accelerate(layers, precision)
    return interleaved(contenders, rounds, warmup=30)
