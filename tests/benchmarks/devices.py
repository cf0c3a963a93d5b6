"""On a GPU: steps, GPT-2 with what it makes of the device, checkpoints. The same runs on a CPU, where nobody asks."""

import dataclasses
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import fabricfn as ff
from tests.benchmarks import storage
from tests.benchmarks.jobs import Job, job
from tests.benchmarks.loops import LEARNING_RATE, Step, arithmetic, by_compiled, by_hand, loops
from tests.benchmarks.steps import check
from tests.benchmarks.timing import IN_A_ROW, clock_of, interleaved

WARM = 3
"""Steps before a capture, which libraries and the optimizer's state need."""


def by_capture(work: Job, precision: str) -> Step:
    """The whole step as one CUDA graph, by hand; its first steps are made without."""
    optimizer = torch.optim.AdamW(work.net.parameters(), lr=LEARNING_RATE, fused=True, capturable=True)
    slots = [part.clone() for part in work.batch]
    graph, side, made, loss = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, torch.empty(0)

    def whole() -> torch.Tensor:
        optimizer.zero_grad()
        with arithmetic(work, precision):
            loss = work.loss_fn(work.net, *slots)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def step() -> torch.Tensor:
        nonlocal made, loss
        for slot, part in zip(slots, work.batch, strict=True):
            slot.copy_(part)
        made += 1
        if made <= WARM:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = whole()
            torch.cuda.current_stream().wait_stream(side)
            return loss
        if made == WARM + 1:
            with torch.cuda.graph(graph):
                loss = whole()
        graph.replay()
        return loss

    return step


def contenders(rt: ff.Runtime, kind: str, precision: str, backend: str) -> dict[str, Callable[[], Step]]:
    """The loops of every device, and those that one compiles (by `backend`) and captures."""

    def work() -> Job:
        return job(kind, device=rt.device)

    def compiled_by_hand() -> Step:
        one = work()
        whole = dataclasses.replace(one, loss_fn=torch.compile(one.loss_fn, backend=backend))
        return by_hand(whole, "single", 1, precision, "AdamW", fused=True)

    found = loops(rt, kind, "single", 1, precision, "AdamW")
    found["compiled"] = compiled_by_hand
    found["fabricfn, compiled"] = lambda: by_compiled(rt, work(), 1, "AdamW", backend=backend)
    if rt.device.type == "cuda":
        found["captured"] = lambda: by_capture(work(), precision)
        found["fabricfn, captured"] = lambda: by_compiled(rt, work(), 1, "AdamW", backend=backend, capture=True)
    return found


def losses_of(step: Step) -> list[float]:
    """Of the first steps, of which the last two are replayed where a graph is captured."""
    return [step().item() for _ in range(WARM + 2)]


def measure_steps(
    rounds: int, kind: str, device: str = "cuda", precision: str = "32-true", backend: str = "inductor"
) -> dict[str, float]:
    """Median seconds of a step by contender, who take turns in this process."""
    torch.set_num_threads(1)
    rt = ff.init_runtime(accelerator=device, devices=1, precision=precision)
    steps = {name: make() for name, make in contenders(rt, kind, precision, backend).items()}
    check({name: losses_of(step) for name, step in steps.items()}, precision)
    return interleaved(steps, rounds, clock_of(device), warmup=max(1, rounds // 10), in_a_row=IN_A_ROW)


def train(name: str, rounds: int, kind: str, device: str, precision: str, backend: str) -> dict[str, Any]:
    """What one contender does: the losses of its first steps, the median seconds of a step, its peak of memory."""
    torch.set_num_threads(1)
    rt = ff.init_runtime(accelerator=device, devices=1, precision=precision)
    step = contenders(rt, kind, precision, backend)[name]()
    losses = losses_of(step)
    seconds = interleaved({name: step}, rounds, clock_of(device), warmup=1, in_a_row=IN_A_ROW)[name]
    return {"losses": losses, "seconds": seconds, "bytes": torch.cuda.max_memory_allocated()}


def flops_of(work: Job) -> int:
    """The products of a step, forward and backward; of a net on the meta device, which computes nothing."""
    return ff.measure_flops(lambda: work.loss_fn(work.net, *work.batch).backward())


def measure_training(
    rounds: int,
    kind: str,
    device: str = "cuda",
    precision: str = "bf16-mixed",
    backend: str = "inductor",
    names: tuple[str, ...] = (),
) -> dict[str, dict[str, float]]:
    """By contender (all, or `names`), each in a process of its own: "step" in seconds, "tokens" (1,000 a second), and,
    where the device tells, "memory" (GiB at the peak) and "MFU" (%)."""
    rt = ff.init_runtime(accelerator=device, devices=1, precision=precision)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found: dict[str, dict[str, Any]] = {}
    for name in names or contenders(rt, kind, precision, backend):
        with ProcessPoolExecutor(1, context) as pool:
            found[name] = pool.submit(train, name, rounds, kind, device, precision, backend).result()
    check({name: one["losses"] for name, one in found.items()}, precision)
    work = job(kind, device="meta")
    flops, peak = flops_of(work), ff.available_flops(rt) or float("inf")
    parts: dict[str, Callable[[dict[str, Any]], float]] = {
        "step": lambda one: one["seconds"],
        "tokens": lambda one: work.batch[0].numel() / one["seconds"] / 1e3,
        "memory": lambda one: one["bytes"] / 2**30,
        "MFU": lambda one: 100 * flops / one["seconds"] / peak,
    }
    return {
        part: {name: value(one) for name, one in found.items()}
        for part, value in parts.items()
        if value(found["plain"])
    }


def measure_checkpoints(rounds: int, device: str = "cuda", count: int = storage.TENSORS) -> dict[str, dict[str, float]]:
    """GB/s of a save from the device and of a load to it, by contender."""
    gigabytes = count * storage.ROWS * storage.COLUMNS * 4 / 1e9
    measures = {"save": storage.measure_save, "load": storage.measure_load}
    return {
        way: {name: gigabytes / seconds for name, seconds in measure(rounds, device, count).items()}
        for way, measure in measures.items()
    }
