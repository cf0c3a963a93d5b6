"""Programs that call `launch`. Usage: launching.py what [words ...]."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import fabricfn as ff


def total(rt, scale=1):
    tensor = torch.full((2,), float(rt.rank + 1) * scale)
    dist.all_reduce(tensor, group=rt.world.group)
    return tensor


def hang(rt, folder):
    (Path(folder) / f"pid-{rt.rank}").write_text(str(os.getpid()))
    dist.barrier(group=rt.world.group)
    if rt.rank == 0:
        print("ready", flush=True)
        signal.pause()
    dist.barrier(group=rt.world.group)


def main(what, *words):
    if what == "spawn":
        factor = 10
        options = {"devices": 2, "accelerator": "cpu", "start_method": "spawn", "timeout": 60}
        first, second = ff.launch(lambda rt: total(rt, factor), **options)
        assert first.tolist() == second.tolist() == [30.0, 30.0]
        sys.modules["cloudpickle"] = None  # as if it were not installed
        try:
            ff.launch(lambda rt: total(rt, factor), **options)
        except ff.errors.LaunchError as error:
            print(error)
    if what == "forkserver":
        fn = partial(total, scale=2)
        for _ in range(2):  # the server is that of the first time, and its environment too
            results = ff.launch(fn, devices=2, accelerator="cpu", start_method="forkserver", timeout=60)
            print([result.tolist() for result in results])
    if what == "hang":
        ff.launch(hang, *words, devices=2, accelerator="cpu")
    if what == "node":
        node, port = map(int, words)
        options = {"num_nodes": 2, "node_rank": node, "main_address": "127.0.0.1", "main_port": port, "timeout": 60}
        ((world, number, tensor),) = ff.launch(place, devices=1, accelerator="cpu", **options)
        print(world, number, tensor.tolist())


def place(rt):
    return rt.world_size, rt.node_rank, total(rt)


if __name__ == "__main__":
    main(*sys.argv[1:])
