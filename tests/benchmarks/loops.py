"""The same training, as people write it: by hand, with fabricfn, Lightning Fabric, Accelerate.

Each function returns a step, which returns the loss of its last micro-batch. A way is "single", "ddp" or "fsdp".
"""

import contextlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fabricfn as ff
from tests.benchmarks.jobs import Job, job

LEARNING_RATE = 1e-3
COMPILED = (("4 layers", 1), ("4 layers", 8), ("40 layers", 1), ("GPT", 1))
"""What is compiled, too, with how many micro-batches: the compiler takes 4, 20, 25 and 70 s for these."""

Step = Callable[[], torch.Tensor]


def cut(net: nn.Module, unit: type[nn.Module], **options: Any) -> nn.Module:
    """What one writes with FSDP2: every block, then the root."""
    for module in net.modules():
        if isinstance(module, unit):
            fully_shard(module, **options)
    fully_shard(net, **options)
    return net


def unsynchronised(net: Any, way: str, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Around a micro-batch: only the last one reduces gradients."""
    if way == "ddp" and not last:
        return net.no_sync()
    if way == "fsdp":
        net.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def arithmetic(work: Job, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Around a forward pass that one writes by hand."""
    return torch.autocast(work.device, torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()


def by_hand(work: Job, way: str, accumulation: int, precision: str, rule: str, fused: bool | None = None) -> Step:
    if way == "ddp":
        net: Any = DistributedDataParallel(work.net)
    else:
        net = cut(work.net, work.unit) if way == "fsdp" else work.net
    optimizer = getattr(torch.optim, rule)(net.parameters(), lr=LEARNING_RATE, fused=fused)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        for index in range(accumulation):
            with unsynchronised(net, way, index == accumulation - 1) if accumulation > 1 else contextlib.nullcontext():
                with arithmetic(work, precision):
                    loss = work.loss_fn(net, *work.batch)
                (loss / accumulation if accumulation > 1 else loss).backward()
        optimizer.step()
        return loss.detach()

    return step


def without_optimizer(work: Job, precision: str) -> Step:
    """The floor: forward and backward by hand, and no update."""
    parameters = list(work.net.parameters())

    def step() -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = None
        with arithmetic(work, precision):
            loss = work.loss_fn(work.net, *work.batch)
        loss.backward()
        return loss.detach()

    return step


def by_fabricfn(rt: ff.Runtime, work: Job, accumulation: int, rule: str, donate: bool, **options: Any) -> Step:
    """`options` are those of `ff.accumulate`."""
    model = ff.setup_model(rt, work.net, donate=True)
    opt = ff.setup_optimizer(rt, model, getattr(torch.optim, rule), lr=LEARNING_RATE)
    several = ff.accumulate(rt, work.loss_fn, **options)
    one, batch = ff.value_and_grad(rt, work.loss_fn), work.batch

    def step() -> torch.Tensor:  # holds no net: that would be one copy of the parameters more than a script has
        nonlocal model, opt
        loss, grads = one(model, *batch) if accumulation == 1 else several(model, [batch] * accumulation)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)
        return loss

    return step


def by_compiled(rt: ff.Runtime, work: Job, accumulation: int, rule: str, **options: Any) -> Step:
    """`options` are those of `ff.compile_step`."""
    model = ff.setup_model(rt, work.net, donate=True)
    opt = ff.setup_optimizer(rt, model, getattr(torch.optim, rule), lr=LEARNING_RATE)
    one, several = ff.value_and_grad(rt, work.loss_fn), ff.accumulate(rt, work.loss_fn)

    def whole(model: ff.Model, opt: ff.Optimizer, *batch: torch.Tensor) -> Any:
        loss, grads = one(model, *batch) if accumulation == 1 else several(model, [batch] * accumulation)
        return *ff.optimizer_step(rt, model, opt, grads, donate=True), loss

    compiled = ff.compile_step(rt, whole, **options)

    def step() -> torch.Tensor:
        nonlocal model, opt
        model, opt, loss = compiled(model, opt, *work.batch)
        return loss

    return step


def by_fabric(rt: ff.Runtime, work: Job, way: str, accumulation: int, precision: str, rule: str) -> Step:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    strategies: dict[str, Callable[[], Any]] = {
        "single": lambda: "auto",
        "ddp": DDPStrategy,
        "fsdp": lambda: ModelParallelStrategy(
            lambda net, mesh: cut(net, work.unit, mesh=mesh["data_parallel"]),
            data_parallel_size=rt.world_size,
            tensor_parallel_size=1,
        ),
    }
    fabric = Fabric(accelerator=work.device, devices=rt.world_size, strategy=strategies[way](), precision=precision)
    fabric.launch()
    net = fabric.setup(work.net)
    optimizer = fabric.setup_optimizers(getattr(torch.optim, rule)(net.parameters(), lr=LEARNING_RATE))

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        for index in range(accumulation):
            waits = accumulation > 1 and index < accumulation - 1
            with fabric.no_backward_sync(net) if waits else contextlib.nullcontext():
                loss = work.loss_fn(net, *work.batch)
                fabric.backward(loss / accumulation if accumulation > 1 else loss)
        optimizer.step()
        return loss.detach()

    return step


def by_accelerate(work: Job, way: str, accumulation: int, precision: str, rule: str) -> Step:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[work.unit.__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(
        cpu=work.device == "cpu",
        mixed_precision="bf16" if precision == "bf16-mixed" else "no",
        gradient_accumulation_steps=accumulation,
        fsdp_plugin=plugin if way == "fsdp" else None,
    )
    if way == "fsdp" and not accelerator.is_fsdp2:  # on CPU ranks Accelerate puts DDP in its place, without a word
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    net, optimizer = accelerator.prepare(work.net, getattr(torch.optim, rule)(work.net.parameters(), lr=LEARNING_RATE))
    assert isinstance(net, {"single": nn.Module, "ddp": DistributedDataParallel, "fsdp": FSDPModule}[way])

    def step() -> torch.Tensor:
        for _ in range(accumulation):
            with accelerator.accumulate(net) if accumulation > 1 else contextlib.nullcontext():
                with accelerator.autocast():
                    loss = work.loss_fn(net, *work.batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return loss.detach()

    return step


def loops(
    rt: ff.Runtime, kind: str, way: str, accumulation: int, precision: str, rule: str
) -> dict[str, Callable[[], Step]]:
    """What makes them, by name; all begin at the same weights, each with the batch of its rank. Peers: if installed."""
    if way != "single":
        os.environ |= {"RANK": str(rt.rank), "LOCAL_RANK": str(rt.rank), "WORLD_SIZE": str(rt.world_size)}

    def work() -> Job:
        return job(kind, rt.rank, rt.device)

    found = {
        "plain": lambda: by_hand(work(), way, accumulation, precision, rule),
        "plain again (noise)": lambda: by_hand(work(), way, accumulation, precision, rule),
        "fused": lambda: by_hand(work(), way, accumulation, precision, rule, fused=True),
        "fabricfn, donated": lambda: by_fabricfn(rt, work(), accumulation, rule, donate=True),
        "fabricfn, pure": lambda: by_fabricfn(rt, work(), accumulation, rule, donate=False),
    }
    if (kind, accumulation) in COMPILED and rt.strategy.name in ("single", "functional"):
        found["fabricfn, compiled"] = lambda: by_compiled(rt, work(), accumulation, rule)
    if find_spec("lightning_fabric"):
        found["Lightning Fabric"] = lambda: by_fabric(rt, work(), way, accumulation, precision, rule)
    if find_spec("accelerate"):
        found["Accelerate"] = lambda: by_accelerate(work(), way, accumulation, precision, rule)
    return found
