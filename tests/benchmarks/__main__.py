"""Measure everything and write docs/benchmarks.md and docs/benchmarks.json: `python -m tests.benchmarks`.

Every measurement runs in fresh processes of its own, several times; the tables show medians. `--quick` takes minutes,
writes nothing and only shows that everything runs. `--only gpu` measures what stands under "On a GPU"; without CUDA
those rows are left out and their old figures stay.
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
from tests.benchmarks import devices, functions, inputs, memory, randomness, ranks, report, starting, steps, storage

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs/benchmarks.json"


def on_ranks(function: Any, size: int, strategy: str = "auto", **options: Any) -> Any:
    """What `function(rt, ...)` measured on the first of so many ranks."""
    return ff.launch(functools.partial(function, **options), accelerator="cpu", devices=size, strategy=strategy)[0]


# name -> what measures it: called with the JSON that the row gives, in a process of its own.
MEASURES = {
    "steps": steps.measure_single,
    "ddp": functools.partial(on_ranks, steps.measure, way="ddp", strategy="ddp"),
    "flat": functools.partial(on_ranks, steps.measure, way="ddp", strategy="flat"),
    "functional": functools.partial(on_ranks, steps.measure, way="ddp", strategy="functional"),
    "fsdp": functools.partial(on_ranks, steps.measure, way="fsdp", strategy="fsdp"),
    "flat_sharded": functools.partial(on_ranks, steps.measure, way="fsdp", strategy="flat_sharded"),
    "canonical": functools.partial(on_ranks, steps.measure_canonical),
    "randomness": randomness.measure,
    "functions": functions.measure,
    "memory": memory.measure,
    "collectives": functools.partial(on_ranks, ranks.measure_collectives, 2),
    "to_device": inputs.measure_to_device,
    "batches": inputs.measure_batches,
    "stream": functools.partial(on_ranks, inputs.measure_stream, 2),
    "save": storage.measure_save,
    "load": storage.measure_load,
    "sharded": functools.partial(on_ranks, storage.measure_sharded, 2),
    "stall": storage.measure_stall,
    "partial": functools.partial(on_ranks, storage.measure_partial, 2),
    "starting": starting.measure,
    "imports": functools.partial(inputs.measure_programs, inputs.IMPORTS),
    "first_step": functools.partial(inputs.measure_programs, inputs.FIRST_STEPS),
    "gpu_steps": devices.measure_steps,
    "gpu_training": devices.measure_training,
    "gpu_checkpoints": devices.measure_checkpoints,
}
ONCE = ("starting", "imports", "first_step", "partial", "memory", "gpu_training")
"""They start processes of their own."""

# what is trained, in which way on how many ranks, micro-batches a step, rounds
STEPS = (("1", 200), ("4", 200), ("40", 60), ("500", 6))
RANKS = (
    *(("ddp", 2, "4 layers", k, r) for k, r in ((1, 100), (8, 40))),
    ("ddp", 4, "4 layers", 1, 40),
    *(("ddp", 2, "GPT", k, r) for k, r in ((1, 8), (8, 4))),
    *(("flat", 2, kind, k, r) for kind, k, r in (("4 layers", 1, 100), ("4 layers", 8, 40), ("GPT", 1, 8))),
    *(("functional", 2, "4 layers", k, r) for k, r in ((1, 100), (8, 40))),
    *(("fsdp", 2, "8 blocks", k, r) for k, r in ((1, 60), (8, 12))),
    *(("fsdp", 2, "4 encoder layers", k, r) for k, r in ((1, 16), (8, 4))),
    *(("fsdp", 2, "GPT", k, r) for k, r in ((1, 8), (8, 2))),
    *(("flat_sharded", 2, "8 blocks", k, r) for k, r in ((1, 60), (8, 12))),
    ("flat_sharded", 2, "4 encoder layers", 1, 16),
    ("flat_sharded", 2, "GPT", 1, 8),
)

# key of the report, what to measure, the contender that others are compared with (else the first), options, rounds.
ROWS: tuple[tuple[str, str, str, dict[str, Any], int], ...] = (
    *((f"steps {n}", "steps", "plain", {"kind": f"{n} layers"}, r) for n, r in STEPS),
    *(
        (f"steps {n} bf16-mixed", "steps", "plain", {"kind": f"{n} layers", "precision": "bf16-mixed"}, r)
        for n, r in STEPS[:3]
    ),
    *((f"steps {n} SGD", "steps", "plain", {"kind": f"{n} layers", "rule": "SGD"}, r) for n, r in STEPS[:3]),
    *((f"steps GPT {k}", "steps", "plain", {"kind": "GPT", "accumulation": k}, r) for k, r in ((1, 10), (8, 4))),
    *(
        (f"{way} {size} {kind} {k}", way, "plain", {"size": size, "kind": kind, "accumulation": k}, r)
        for way, size, kind, k, r in RANKS
    ),
    *((f"canonical {n}", "canonical", "mean", {"size": n, "kind": "4 layers", "accumulation": 8}, 120) for n in (1, 2)),
    ("randomness", "randomness", "no key", {"layers": 4}, 400),
    ("functions", "functions", "by hand", {}, 300),
    ("memory", "memory", "parameters", {}, 1),
    *((f"collectives {n}", "collectives", "loop", {"leaves": n}, 20) for n in (1, 10, 100, 200, 1000)),
    ("to_device", "to_device", "bare", {}, 100),
    ("batches", "batches", "bare", {}, 100),
    ("stream", "stream", "bare", {}, 40),
    ("save", "save", "bare", {}, 10),
    ("load", "load", "DCP", {}, 10),
    ("sharded", "sharded", "bare", {}, 10),
    ("stall", "stall", "copy", {}, 10),
    ("partial", "partial", "needed", {}, 1),
    ("starting", "starting", "torch", {}, 5),
    ("imports", "imports", "import torch", {}, 5),
    ("first_step", "first_step", "plain", {}, 5),
    *((f"gpu steps {n}", "gpu_steps", "plain", {"kind": f"{n} layers"}, r) for n, r in ((4, 100), (40, 40))),
    *((f"gpu GPT-2 {size}", "gpu_training", "plain", {"kind": f"GPT-2 {size}"}, 5) for size in ("124M", "350M")),
    ("gpu checkpoints", "gpu_checkpoints", "bare", {}, 10),
)


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
    base = base if base in results[0] else next(iter(results[0]))
    ratios = {name: [result[name] / result[base] for result in results] for name in results[0]}
    return {
        "seconds": statistics.median(result[base] for result in results),
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "ranges": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


def measure_all(quick: bool, only: str) -> dict[str, Any]:
    """Every figure of the report; those of the rows that `only`, or the want of a GPU, leaves out are the old ones."""
    repeats, divisor = (1, 20) if quick else (3, 1)
    old: dict[str, Any] = json.loads(FIGURES.read_text())
    results = old if only else {key: value for key, value in old.items() if key.startswith("gpu")}
    wanted = [row for row in ROWS if row[0].startswith(only)]
    rows = wanted if torch.cuda.is_available() else [row for row in wanted if not row[0].startswith("gpu")]
    if rows != wanted:
        print("There is no CUDA device: the rows that begin with gpu are left out.", flush=True)
    for key, name, base, options, rounds in rows:
        results |= {"gpu": gpu()} if key.startswith("gpu") else {"machine": machine()}
        times = 1 if name in ONCE or options.get("kind") == "GPT" else repeats
        found = in_fresh_processes(name, times, **options, rounds=max(rounds // divisor, 1))
        if isinstance(found[0][next(iter(found[0]))], dict):  # several figures of one measurement
            for part in found[0]:
                results[f"{key} {part}"] = medians([result[part] for result in found], base)
        else:
            results[key] = medians(found, base)
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


def gpu() -> dict[str, str]:
    """Where the figures of a GPU come from."""
    return {"name": torch.cuda.get_device_name(), "torch": str(torch.__version__), "cuda": str(torch.version.cuda)}


def main() -> None:
    """Run one measurement for a parent process, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; print the page instead of writing it")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "JSON"), help="one measurement, in this process")
    parser.add_argument("--only", default="", metavar="ROW", help="measure the rows that begin so, keep the others")
    args = parser.parse_args()
    if args.measure:
        torch.set_num_threads(1)
        name, options = args.measure
        print(json.dumps(MEASURES[name](**json.loads(options))))
        return
    results = measure_all(args.quick, args.only)
    page = report.render(results)
    if args.quick:
        print(page)
        return
    FIGURES.write_text(json.dumps(results, indent=1) + "\n")
    (ROOT / "docs/benchmarks.md").write_text(page)
    print("wrote docs/benchmarks.md and docs/benchmarks.json")


if __name__ == "__main__":
    main()
