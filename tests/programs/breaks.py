"""A job of which one rank breaks. Usage: breaks.py way when how rank folder [restarts]."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import fabricfn as ff


def run_out_of_memory():
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    torch.ones(2**33)


def fail():
    raise ValueError("the data are gone")


HOW = {
    "raise": fail,
    "exit-0": lambda: sys.exit(0),
    "exit-3": lambda: sys.exit(3),
    "_exit-0": lambda: os._exit(0),
    "_exit-4": lambda: os._exit(4),
    "segfault": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": run_out_of_memory,
}


def attempt():
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def note(folder, rank):
    """Who is there: this rank, and what it started."""
    helper = subprocess.Popen(["sleep", "1000"])
    (folder / f"pids-{attempt()}-{rank}").write_text(f"{os.getpid()} {helper.pid}")


def end(how, folder, restarts):
    if attempt() > 0 and restarts == attempt():
        return
    draft = folder / "draft"
    draft.write_text(repr(time.time()))
    draft.rename(folder / "died")
    HOW[how]()


def work(rt, when, how, who, folder, restarts=0):
    breaks = rt.rank == who
    if when == "joining":
        note(folder, rt.rank)
    if when == "joining" and breaks:
        end(how, folder, restarts)
    dist.all_reduce(torch.ones(1))
    if when == "training":
        note(folder, rt.rank)
    for step in range(3 if when == "done" or (restarts and attempt() == restarts) else 10**9):
        if step == 20 and breaks and when == "training":
            end(how, folder, restarts)
        if step == 5 and breaks and when == "saving":
            end_within(how, folder)
        if when == "saving":
            ff.save(rt, folder / "checkpoint", {"x": torch.ones(1000), "y": torch.ones(1000)})  # one file for each rank
        elif when == "alone" and step == 1:  # nobody waits for the other one in a collective
            note(folder, rt.rank)
            if breaks:
                end(how, folder, restarts)
            time.sleep(1000)
        else:
            dist.all_reduce(torch.ones(4))
    return attempt()


def end_within(how, folder):
    """In the middle of the next save: when its first file is flushed."""
    flush = os.fsync

    def broken(descriptor):
        end(how, folder, 0)
        flush(descriptor)

    os.fsync = broken


def main(way, when, how, who, folder, restarts="0"):
    who, folder, restarts = int(who), Path(folder), int(restarts)
    options = {"devices": 2, "accelerator": "cpu", "timeout": 60, "max_restarts": restarts}
    if when == "starting" and "RANK" in os.environ:
        note(folder, int(os.environ["RANK"]))
        if int(os.environ["RANK"]) == who:
            end(how, folder, restarts)
    if way == "script":
        rt = ff.init_runtime(**options)
        if when == "saving":
            note(folder, rt.rank)
        got = work(rt, when, how, who, folder, restarts)
        ff.print(rt, f"attempt {got}")
    else:
        got = ff.launch(noted_work, when, how, who, folder, restarts, start_method=way, **options)
        print(f"attempt {got[0]}")


def noted_work(rt, when, how, who, folder, restarts):
    if when == "saving":
        note(folder, rt.rank)
    return work(rt, when, how, who, folder, restarts)


if __name__ == "__main__":
    (Path(sys.argv[5]) / f"main-{os.getpid()}").touch()
    main(*sys.argv[1:])
