"""Two ranks: a step under ddp against hand-written DDP, and collectives of many small tensors against a loop."""

import contextlib
import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fabricfn as ff
from tests.benchmarks.steps import LEARNING_RATE, loss_fn, make_batch, make_net
from tests.benchmarks.timing import interleaved


def ddp_by_hand(layers: int, accumulation: int, fused: bool | None = None) -> Callable[[], None]:
    net = DistributedDataParallel(make_net(layers))
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, fused=fused)
    x, y = make_batch()

    def step() -> None:
        optimizer.zero_grad()
        for index in range(accumulation):
            with contextlib.nullcontext() if index == accumulation - 1 else net.no_sync():
                (loss_fn(net, x, y) / accumulation).backward()
        optimizer.step()

    return step


def ddp_by_fabricfn(
    rt: ff.Runtime, layers: int, accumulation: int, donate: bool, reduce: Literal["mean", "canonical"] = "mean"
) -> Callable[[], None]:
    model = ff.setup_model(rt, make_net(layers))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=LEARNING_RATE)
    x, y = make_batch()
    single = ff.value_and_grad(rt, loss_fn)
    several = ff.accumulate(rt, loss_fn, reduce=reduce)

    def step() -> None:
        nonlocal model, opt
        _, grads = single(model, x, y) if accumulation == 1 else several(model, [(x, y)] * accumulation)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)

    return step


def measure_ddp(rt: ff.Runtime, layers: int, accumulation: int, rounds: int) -> dict[str, float]:
    """Median seconds of one step on this rank, by contender."""
    torch.set_num_threads(1)
    contenders = {
        "plain": ddp_by_hand(layers, accumulation),
        "plain again (noise)": ddp_by_hand(layers, accumulation),
        "fused": ddp_by_hand(layers, accumulation, fused=True),
        "fabricfn, donated": ddp_by_fabricfn(rt, layers, accumulation, donate=True),
        "fabricfn, pure": ddp_by_fabricfn(rt, layers, accumulation, donate=False),
    }
    return interleaved(contenders, rounds, clock=time.perf_counter, warmup=20)


def measure_canonical(rt: ff.Runtime, layers: int, accumulation: int, rounds: int) -> dict[str, float]:
    """Median seconds of one step on this rank with the default reduction and with the canonical one."""
    torch.set_num_threads(1)
    contenders = {
        "mean": ddp_by_fabricfn(rt, layers, accumulation, donate=True),
        "mean again (noise)": ddp_by_fabricfn(rt, layers, accumulation, donate=True),
        "canonical": ddp_by_fabricfn(rt, layers, accumulation, donate=True, reduce="canonical"),
    }
    return interleaved(contenders, rounds, clock=time.perf_counter, warmup=20)


def measure_collectives(rt: ff.Runtime, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds on this rank for 200 small tensors: collective -> contender -> seconds."""
    torch.set_num_threads(1)
    tree = {f"{index}": torch.full((1 + index % 50,), float(rt.rank)) for index in range(200)}

    def loop_all_reduce() -> None:
        for tensor in tree.values():
            dist.all_reduce(tensor.clone())

    def loop_broadcast() -> None:
        for tensor in tree.values():
            dist.broadcast(tensor.clone(), 0)

    def loop_all_gather() -> None:
        for tensor in tree.values():
            dist.all_gather([torch.empty_like(tensor) for _ in range(rt.world_size)], tensor)

    pairs = {
        "all_reduce": (loop_all_reduce, lambda: ff.all_reduce(rt, tree, op="sum")),
        "broadcast": (loop_broadcast, lambda: ff.broadcast(rt, tree)),
        "all_gather": (loop_all_gather, lambda: ff.all_gather(rt, tree)),
    }
    return {
        name: interleaved(
            {"loop": loop, "loop again (noise)": loop, "fabricfn": ours}, rounds, clock=time.perf_counter, warmup=3
        )
        for name, (loop, ours) in pairs.items()
    }
