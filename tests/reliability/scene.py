"""What all the figures share: ranks without a launcher, the tree that is saved, and how a load is judged."""

import contextlib
import datetime
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fabricfn as ff

ALONE = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())

Save = Callable[[ff.Runtime, Path, Any], Any]
"""Saves a tree to a path; the checkpoint is committed when it returns."""


def blocking(rt: ff.Runtime, path: Path, tree: Any) -> Any:
    """The plain save."""
    return ff.save(rt, path, tree)


def non_blocking(rt: ff.Runtime, path: Path, tree: Any) -> Any:
    """The save whose writing goes on beside the training; the answer is waited for."""
    return ff.save(rt, path, tree, blocking=False).wait()


def tree_of(number: int, elements: int = 100_000) -> dict[str, Any]:
    """A tree of which every leaf tells its number; two tensors so large that one rank alone does not write all."""
    return {
        "n": number,
        "w": [torch.full((elements,), float(number)) for _ in range(2)],
        "small": torch.tensor(number),
    }


def number_of(tree: dict[str, Any]) -> int | None:
    """The number that all leaves tell; None for a mixture."""
    numbers = {
        tree["n"],
        tree["small"].item(),
        *(float(w.min()) for w in tree["w"]),
        *(float(w.max()) for w in tree["w"]),
    }
    return int(numbers.pop()) if len(numbers) == 1 else None


def load_quietly(path: Path) -> dict[str, Any]:
    """Load, without the warning of a load that finds the previous checkpoint put aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return ff.load(ALONE, path)


@contextlib.contextmanager
def member(rank: int, size: int, place: str, timeout: float = 60.0) -> Iterator[ff.Runtime]:
    """One rank of a real gloo group that meets at a file."""
    if size == 1:
        yield ALONE
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(
        *("gloo", f"file://{place}"), rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
    )
    try:
        world = ff.World(rank=rank, world_size=size, local_rank=rank, local_world_size=size, group=dist.group.WORLD)
        yield ff.Runtime(world=world, precision=ff.Precision(), strategy=ff.strategies.ddp())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def scratch(base: str | None = None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fabricfn-", dir=base) as folder:
        yield Path(os.path.realpath(folder))
