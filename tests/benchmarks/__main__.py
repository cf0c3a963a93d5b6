"""Measure everything and write docs/benchmarks.md and docs/benchmarks.json: `python -m tests.benchmarks`.

Every measurement runs in fresh processes of its own, several times; the tables show medians. `--quick` takes seconds,
writes nothing and only shows that everything runs.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fabricfn as ff
from tests.benchmarks import inputs, randomness, ranks, report, sharded, steps

ROOT = Path(__file__).parents[2]


def on_ranks(function: Any, size: int, strategy: str = "auto", **options: Any) -> Any:
    """What `function(rt, ...)` measured on the first of so many ranks."""
    return ff.launch(functools.partial(function, **options), accelerator="cpu", devices=size, strategy=strategy)[0]


def on_two_ranks(function: Any, **options: Any) -> Any:
    """What `function(rt, ...)` measured on the first of two ranks."""
    return on_ranks(function, 2, **options)


# name -> what measures it: called with the JSON that the row gives, in a process of its own.
MEASURES = {
    "steps": steps.measure,
    "randomness": randomness.measure,
    "ddp": functools.partial(on_two_ranks, ranks.measure_ddp),
    "canonical": functools.partial(on_ranks, ranks.measure_canonical),
    "fsdp": functools.partial(on_two_ranks, sharded.measure, strategy="fsdp"),
    "collectives": functools.partial(on_two_ranks, ranks.measure_collectives),
    "to_device": inputs.measure_to_device,
    "batches": inputs.measure_batches,
    "stream": functools.partial(on_two_ranks, inputs.measure_stream),
    "imports": functools.partial(inputs.measure_programs, inputs.IMPORTS),
    "first_step": functools.partial(inputs.measure_programs, inputs.FIRST_STEPS),
}

# kind of net, micro-batches a step, rounds
FSDP = (("linear", 1, 150), ("linear", 8, 40), ("transformer", 1, 40), ("transformer", 8, 10))


def in_fresh_processes(name: str, repeats: int, **options: Any) -> list[Any]:
    """The results of `repeats` processes, one after the other."""
    command = [sys.executable, "-m", "tests.benchmarks", "--measure", name, json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    results = []
    for _ in range(repeats):
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"measured {name} {options}", flush=True)
    return results


def medians(results: list[dict[str, float]], base: str) -> dict[str, Any]:
    """The base's median seconds, and for each contender the median and the range over processes of its ratio."""
    ratios = {name: [result[name] / result[base] for result in results] for name in results[0]}
    return {
        "seconds": statistics.median(result[base] for result in results),
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "ranges": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


def measure_all(quick: bool) -> dict[str, Any]:
    """Every figure of the report."""
    repeats, divisor = (1, 20) if quick else (3, 1)
    results: dict[str, Any] = {"machine": machine()}
    for layers, precision, rounds in ((4, "32-true", 400), (40, "32-true", 120), (4, "bf16-mixed", 300)):
        found = in_fresh_processes("steps", repeats, layers=layers, precision=precision, rounds=rounds // divisor)
        results[f"steps {layers} {precision}"] = medians(found, "plain")
    results["randomness"] = medians(
        in_fresh_processes("randomness", repeats, layers=4, rounds=400 // divisor), "no key"
    )
    for accumulation, rounds in ((1, 300), (8, 120)):
        found = in_fresh_processes("ddp", repeats, layers=4, accumulation=accumulation, rounds=rounds // divisor)
        results[f"ddp {accumulation}"] = medians(found, "plain")
    for size in (1, 2):
        options = {"size": size, "layers": 4, "accumulation": 8, "rounds": 120 // divisor}
        results[f"canonical {size}"] = medians(in_fresh_processes("canonical", repeats, **options), "mean")
    for kind, accumulation, rounds in FSDP:
        options = {"kind": kind, "accumulation": accumulation, "rounds": max(rounds // divisor, 1)}
        results[f"fsdp {kind} {accumulation}"] = medians(in_fresh_processes("fsdp", repeats, **options), "plain")
    found = in_fresh_processes("collectives", repeats, rounds=max(20 // divisor, 2))
    for name in found[0]:
        results[f"collectives {name}"] = medians([result[name] for result in found], "loop")
    results["to_device"] = medians(in_fresh_processes("to_device", repeats, rounds=100 // divisor), "bare")
    results["batches"] = medians(in_fresh_processes("batches", repeats, rounds=100 // divisor), "bare")
    results["stream"] = medians(in_fresh_processes("stream", repeats, rounds=max(40 // divisor, 2)), "bare")
    rounds = 1 if quick else 5
    results["imports"] = medians(in_fresh_processes("imports", 1, rounds=rounds), "import torch")
    results["first_step"] = medians(in_fresh_processes("first_step", 1, rounds=rounds), "plain")
    return results


def machine() -> dict[str, str]:
    """Where the figures come from."""
    versions = {}
    for package in ("torch", "optree", "lightning-fabric", "accelerate"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {"cpu": f"{model}, {os.cpu_count()} cores", "python": platform.python_version(), **versions}


def main() -> None:
    """Run one measurement for a parent process, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; print the page instead of writing it")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "JSON"), help="one measurement, in this process")
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(1)
        name, options = args.measure
        print(json.dumps(MEASURES[name](**json.loads(options))))
        return
    results = measure_all(args.quick)
    page = report.render(results)
    if args.quick:
        print(page)
        return
    (ROOT / "docs/benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")
    (ROOT / "docs/benchmarks.md").write_text(page)
    print("wrote docs/benchmarks.md and docs/benchmarks.json")


if __name__ == "__main__":
    main()
