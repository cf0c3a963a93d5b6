"""From the call that starts two ranks to the end of their first collective."""

import os
import random
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

METHODS = ("spawn", "forkserver", "fork")
TURNS = ("spawn", "forkserver", "fork", "fork", "fork")
"""A round; what takes 20 ms is disturbed by less, so it is measured more often."""

# Programs that print these seconds; the start method is their argument. Everything is imported before the call.
PROGRAMS = {
    "torch": """
import socket, sys, time
import torch, torch.distributed as dist, torch.multiprocessing as mp

def work(rank, port, done):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    done[rank] = time.monotonic()
    dist.destroy_process_group()

if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = torch.zeros(2, dtype=torch.float64).share_memory_()
    start = time.monotonic()
    mp.start_processes(work, (port, done), nprocs=2, start_method=sys.argv[1])
    print(done.max().item() - start)
""",
    "fabricfn": """
import sys, time
import torch, fabricfn as ff

def work(rt):
    torch.distributed.all_reduce(torch.ones(1))
    return time.monotonic()

if __name__ == "__main__":
    launch = ff.launch  # which imports it, as the others are imported
    start = time.monotonic()
    done = launch(work, accelerator="cpu", devices=2, start_method=sys.argv[1])
    print(max(done) - start)
""",
    "Lightning Fabric": """
import sys, time, warnings
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

def work(fabric, done):
    torch.distributed.all_reduce(torch.ones(1))
    done[fabric.global_rank] = time.monotonic()

if __name__ == "__main__":
    done = torch.zeros(2, dtype=torch.float64).share_memory_()
    start = time.monotonic()
    Fabric(accelerator="cpu", devices=2, strategy=DDPStrategy(start_method=sys.argv[1])).launch(work, done)
    print(done.max().item() - start)
""",
}
NEEDS = {"Lightning Fabric": "lightning_fabric"}
# As from an installed package, whatever this shell says: modules are not compiled again in each process.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds: start method -> contender -> seconds. Each run is a process of its own; they take turns,
    in another order in each round.

    "default" compares what users write: Fabric's "ddp_spawn" with `launch`, by spawn and by its own choice.
    """
    programs = {name: code for name, code in PROGRAMS.items() if name not in NEEDS or find_spec(NEEDS[name])}
    programs["torch again (noise)"] = programs["torch"]
    found: dict[str, dict[str, list[float]]] = {method: {name: [] for name in programs} for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for number, code in enumerate(programs.values()):
            Path(folder, f"program{number}.py").write_text(code)
        for index in range(rounds + 1):
            for method in TURNS:
                for number, name in random.Random(index).sample([*enumerate(programs)], len(programs)):
                    seconds = _run([f"{folder}/program{number}.py", method])
                    if index:  # the first round fills the file cache
                        found[method][name].append(seconds)
    medians = {method: {name: statistics.median(times) for name, times in of.items()} for method, of in found.items()}
    peers = {f"{name}, spawn": medians["spawn"][name] for name in NEEDS if name in programs}
    ours = {"fabricfn, spawn": medians["spawn"]["fabricfn"], "fabricfn": medians["fork"]["fabricfn"]}
    return {**medians, "default": {**peers, **ours}}


def _run(words: list[str]) -> float:
    """The seconds that one program printed."""
    command = [sys.executable, *words]
    done = subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True)  # errors are shown
    return float(done.stdout.split()[-1])
