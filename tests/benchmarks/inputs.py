"""What is paid around the step: moving batches, going through a loader, importing, coming to the first step."""

import os
import statistics
import subprocess
import sys
from typing import Any

import optree
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fabricfn as ff
from tests.benchmarks.timing import interleaved


def nested_batch() -> dict[str, Any]:
    """20 small tensors in dicts, lists and tuples."""
    return {
        "images": [torch.zeros(4, 3) for _ in range(8)],
        "targets": {"boxes": tuple(torch.zeros(4, 4) for _ in range(8)), "labels": [torch.zeros(4) for _ in range(4)]},
    }


def measure_to_device(rounds: int) -> dict[str, float]:
    """Median seconds of CPU for moving 20 nested tensors to the device where they are."""
    torch.set_num_threads(1)
    rt = ff.init_runtime(accelerator="cpu", devices=1)
    batch, device = nested_batch(), rt.device

    def bare() -> None:
        for _ in range(100):
            optree.tree_map(lambda leaf: leaf.to(device, non_blocking=True), batch)

    def ours() -> None:
        for _ in range(100):
            ff.to_device(rt, batch)

    seconds = interleaved({"bare": bare, "bare again (noise)": bare, "fabricfn": ours}, rounds)
    return {name: value / 100 for name, value in seconds.items()}


def measure_batches(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of CPU per batch: of a shuffled epoch, and of batches that stand ready."""
    torch.set_num_threads(1)
    rt = ff.init_runtime(accelerator="cpu", devices=1)
    samples = TensorDataset(torch.zeros(8192, 32), torch.zeros(8192))
    ready = [(torch.zeros(8, 32), torch.zeros(8)) for _ in range(500)]
    return {
        "shuffled": per_batch(rt, samples, rounds, batch_size=32, shuffle=True),
        "ready": per_batch(rt, ready, rounds, batch_size=None),
    }


def per_batch(rt: ff.Runtime, dataset: Any, rounds: int, **options: Any) -> dict[str, float]:
    """Median seconds of CPU per batch of an epoch."""
    loader = DataLoader(dataset, **options)
    sharded = ff.setup_dataloader(rt, DataLoader(dataset, **options))

    def bare() -> None:
        for _ in loader:
            pass

    def ours() -> None:
        for _ in ff.batches(rt, sharded, 0):
            pass

    seconds = interleaved({"bare": bare, "bare again (noise)": bare, "fabricfn": ours}, rounds, warmup=3, again=True)
    return {name: value / len(loader) for name, value in seconds.items()}


class Flow(IterableDataset[Any]):
    """Samples made one by one, without a length."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Any:
        for place in range(self.num):
            yield torch.full((32,), float(place))


def measure_stream(rt: ff.Runtime, rounds: int) -> dict[str, float]:
    """Median seconds of CPU on this rank for an epoch over 16384 samples in batches of 32."""
    torch.set_num_threads(1)
    flow = Flow(16384)
    loader = DataLoader(flow, batch_size=32)
    sharded = ff.setup_dataloader(rt, DataLoader(flow, batch_size=32))

    def bare() -> None:
        for _ in loader:
            pass

    def ours() -> None:
        for _ in ff.batches(rt, sharded, 0):
            pass

    return interleaved({"bare": bare, "bare again (noise)": bare, "fabricfn": ours}, rounds, warmup=3)


IMPORTS = {
    "import torch": "import torch",
    "import torch again (noise)": "import torch",
    "import fabricfn": "import fabricfn",
    "import fabricfn, use every name of the loop": (
        "import fabricfn as ff; ff.init_runtime, ff.setup_model, ff.setup_optimizer, ff.setup_dataloader,"
        " ff.value_and_grad, ff.batches, ff.clip_gradients, ff.optimizer_step, ff.save"
    ),
}

FIRST_STEPS = {
    "plain": """
import torch
net = torch.nn.Linear(8, 8); optimizer = torch.optim.AdamW(net.parameters())
net(torch.ones(2, 8)).sum().backward(); optimizer.step()
""",
    "fabricfn": """
import torch, fabricfn as ff
rt = ff.init_runtime(accelerator="cpu", devices=1)
model = ff.setup_model(rt, torch.nn.Linear(8, 8)); opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-3)
loss, grads = ff.value_and_grad(rt, lambda net, x: net(x).sum())(model, torch.ones(2, 8))
model, opt = ff.optimizer_step(rt, model, opt, grads)
""",
}
FIRST_STEPS["plain again (noise)"] = FIRST_STEPS["plain"]


def measure_programs(programs: dict[str, str], rounds: int) -> dict[str, float]:
    """Median seconds of CPU of small programs, each in a process of its own, taking turns; all modules as bytecode."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for index in range(rounds + 1):
        for name, code in programs.items():
            timed = f"import time; start = time.process_time()\n{code}\nprint(time.process_time() - start)"
            command = [sys.executable, "-c", timed]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            if index:  # the first round writes the bytecode and fills the file cache
                times[name].append(float(done.stdout))
    return {name: statistics.median(values) for name, values in times.items()}
