"""One step of training: forward, backward, the optimizer; fabricfn against loops that people write."""

import time
import warnings
from typing import Any

import torch

import fabricfn as ff
from tests.benchmarks.jobs import job, small
from tests.benchmarks.loops import by_fabricfn, loops, without_optimizer
from tests.benchmarks.timing import IN_A_ROW, interleaved


def check(losses: dict[str, list[float]], precision: str) -> None:
    """That all contenders have learnt what the loop by hand has."""
    expected, rtol = torch.tensor(losses["plain"]), 1e-4 if precision == "32-true" else 1e-2
    for name, found in losses.items():
        if not torch.allclose(torch.tensor(found), expected, rtol=rtol):
            raise AssertionError(f"{name} computes something else: losses {found}, by hand {losses['plain']}")


def measure(
    rt: ff.Runtime,
    kind: str,
    rounds: int,
    way: str = "single",
    accumulation: int = 1,
    precision: str = "32-true",
    rule: str = "AdamW",
) -> dict[str, float]:
    """Median seconds of a step by contender: of CPU on one process, on the clock of rank 0 on several.

    All of them must learn the same.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # a Linear returns a view; nobody writes into it
    steps = {name: make() for name, make in loops(rt, kind, way, accumulation, precision, rule).items()}
    check({name: [step().item() for _ in range(2)] for name, step in steps.items()}, precision)
    alone = way == "single"
    if alone and accumulation == 1:
        steps["no optimizer"] = without_optimizer(job(kind), precision)
    clock = time.process_time if alone else time.perf_counter
    in_a_row = IN_A_ROW if small(kind) else 1
    return interleaved(steps, rounds, clock, warmup=max(1, rounds // 10), again=True, in_a_row=in_a_row)


def measure_single(precision: str = "32-true", **options: Any) -> dict[str, float]:
    """The same on one process."""
    rt = ff.init_runtime(accelerator="cpu", devices=1, precision=precision)
    return measure(rt, precision=precision, **options)


def measure_canonical(rt: ff.Runtime, kind: str, accumulation: int, rounds: int) -> dict[str, float]:
    """Median seconds of one step on this rank with the default reduction and with the canonical one."""
    torch.set_num_threads(1)
    reductions = {"mean": "mean", "mean again (noise)": "mean", "canonical": "canonical"}
    contenders = {
        name: by_fabricfn(rt, job(kind, rt.rank), accumulation, "AdamW", donate=True, reduce=how)
        for name, how in reductions.items()
    }
    return interleaved(contenders, rounds, clock=time.perf_counter, warmup=20)
