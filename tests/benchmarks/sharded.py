"""Two ranks: a step under fsdp against `fully_shard` by hand, Fabric's ModelParallelStrategy, and Accelerate."""

import contextlib
import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F

import fabricfn as ff
from tests.benchmarks.steps import LEARNING_RATE, loss_fn
from tests.benchmarks.timing import interleaved

Step = Callable[[], torch.Tensor]
"""One step of training; returns the loss of its last micro-batch."""


class Block(nn.Module):
    """A unit that is little arithmetic and much bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.linear(x))


def make_net(kind: str) -> nn.Module:
    """Repeated blocks, and a head that stays with the root."""
    torch.manual_seed(0)
    if kind == "linear":
        blocks = [Block() for _ in range(8)]
    else:
        blocks = [nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True) for _ in range(4)]
    return nn.Sequential(nn.Sequential(*blocks), nn.Linear(256, 256))


UNITS = {"linear": Block, "transformer": nn.TransformerEncoderLayer}


def make_batch(rt: ff.Runtime, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's batch."""
    generator = torch.Generator().manual_seed(rt.rank)
    shape = (16, 256) if kind == "linear" else (8, 64, 256)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def cut(net: nn.Module, kind: str, **options: Any) -> nn.Module:
    """What one writes with FSDP2: every block, then the root."""
    for module in net.modules():
        if isinstance(module, UNITS[kind]):
            fully_shard(module, **options)
    fully_shard(net, **options)
    return net


def by_hand(rt: ff.Runtime, kind: str, accumulation: int, fused: bool | None = None) -> Step:
    net: Any = cut(make_net(kind), kind)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, fused=fused)
    x, y = make_batch(rt, kind)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        for index in range(accumulation):
            if accumulation > 1:
                net.set_requires_gradient_sync(index == accumulation - 1)
            loss = loss_fn(net, x, y)
            (loss / accumulation).backward()
        optimizer.step()
        return loss.detach()

    return step


def by_fabricfn(rt: ff.Runtime, kind: str, accumulation: int, donate: bool) -> Step:
    model = ff.setup_model(rt, make_net(kind))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=LEARNING_RATE)
    x, y = make_batch(rt, kind)
    single = ff.value_and_grad(rt, loss_fn)
    several = ff.accumulate(rt, loss_fn)

    def step() -> torch.Tensor:
        nonlocal model, opt
        loss, grads = single(model, x, y) if accumulation == 1 else several(model, [(x, y)] * accumulation)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)
        return loss.detach()

    return step


def by_fabric(rt: ff.Runtime, kind: str, accumulation: int) -> Step:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        lambda net, mesh: cut(net, kind, mesh=mesh["data_parallel"]), data_parallel_size=2, tensor_parallel_size=1
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    net = fabric.setup(make_net(kind))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(net.parameters(), LEARNING_RATE))
    x, y = make_batch(rt, kind)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        for index in range(accumulation):
            with fabric.no_backward_sync(net, enabled=index < accumulation - 1):
                loss = loss_fn(net, x, y)
                fabric.backward(loss / accumulation)
        optimizer.step()
        return loss.detach()

    return step


def by_accelerate(rt: ff.Runtime, kind: str, accumulation: int) -> Step:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[UNITS[kind].__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=accumulation)
    if not accelerator.is_fsdp2:  # on CPU ranks Accelerate puts DDP in its place, without a word
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    net = make_net(kind)
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), LEARNING_RATE))
    assert isinstance(net, FSDPModule)
    x, y = make_batch(rt, kind)

    def step() -> torch.Tensor:
        for _ in range(accumulation):
            with accelerator.accumulate(net) if accumulation > 1 else contextlib.nullcontext():
                loss = loss_fn(net, x, y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return loss.detach()

    return step


def contenders(rt: ff.Runtime, kind: str, accumulation: int) -> dict[str, Step]:
    """By name; all begin at the same weights with the same batches."""
    os.environ |= {"RANK": str(rt.rank), "LOCAL_RANK": str(rt.rank), "WORLD_SIZE": str(rt.world_size)}
    found = {
        "plain": by_hand(rt, kind, accumulation),
        "plain again (noise)": by_hand(rt, kind, accumulation),
        "fused": by_hand(rt, kind, accumulation, fused=True),
        "fabricfn, donated": by_fabricfn(rt, kind, accumulation, donate=True),
        "fabricfn, pure": by_fabricfn(rt, kind, accumulation, donate=False),
    }
    if importlib.util.find_spec("lightning_fabric"):
        found["Lightning Fabric"] = by_fabric(rt, kind, accumulation)
    if importlib.util.find_spec("accelerate"):
        found["Accelerate"] = by_accelerate(rt, kind, accumulation)
    return found


def measure(rt: ff.Runtime, kind: str, accumulation: int, rounds: int) -> dict[str, float]:
    """Median seconds of one step on this rank, by contender; all of them must learn the same."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # a Linear returns a view; nobody writes into it
    steps = contenders(rt, kind, accumulation)
    losses = {name: torch.stack([step() for _ in range(2)]) for name, step in steps.items()}
    for name, found in losses.items():
        if not torch.allclose(found, losses["plain"], rtol=1e-4):
            raise AssertionError(f"{name} computes something else: losses {found}, by hand {losses['plain']}")
    return interleaved(steps, rounds, clock=time.perf_counter, warmup=rounds // 10)
