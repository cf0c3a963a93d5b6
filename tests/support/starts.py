"""What the tests of starting ranks share: two ranks that meet, programs that start their own, waiting for them."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

PROGRAMS = Path(__file__).parents[1] / "programs"
TWO = {"devices": 2, "accelerator": "cpu", "timeout": 60}
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def run(*words, flags=(), **environ):
    """A program of tests/programs, in a process of its own; OMP_NUM_THREADS unset unless given."""
    arguments = [sys.executable, *flags, *words]
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environ = {**inherited, **{name: str(value) for name, value in environ.items()}}
    return subprocess.run(arguments, cwd=PROGRAMS, env=environ, text=True, capture_output=True, timeout=90, check=False)


def wait_for(condition, seconds=60.0):
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def free_port():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meet(rt):
    dist.barrier(group=rt.world.group)


def own(text):
    """What a program printed itself: gloo greets on stdout in torch 2.9."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("[Gloo]"))
