"""Two ranks: collectives of many small tensors against a loop over them."""

import time

import torch
import torch.distributed as dist

import fabricfn as ff
from tests.benchmarks.timing import interleaved


def measure_collectives(rt: ff.Runtime, rounds: int, leaves: int = 200) -> dict[str, dict[str, float]]:
    """Median seconds on this rank for so many small tensors: collective -> contender -> seconds."""
    torch.set_num_threads(1)
    tree = {f"{index}": torch.full((1 + index % 50,), float(rt.rank)) for index in range(leaves)}

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
