"""The package DeepSpeed: found, imported, joined to the process group of a world, and kept from what it would do.

An engine of ours has no optimizer of its own: see [Note: zero] in `deepspeed_engine.py`.
"""

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Generator
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from fabricfn.errors import CapabilityError
from fabricfn.world import World


def require() -> None:
    """Raise `CapabilityError` unless the package is there. It is not imported: that takes three seconds."""
    try:
        there = importlib.util.find_spec("deepspeed") is not None
    except ValueError:  # its import is blocked
        there = False
    if not there:
        raise missing("there is no such module")


def missing(why: object) -> CapabilityError:
    """The error for a package that is not installed."""
    return CapabilityError(
        f'strategy="deepspeed" needs the package deepspeed, which cannot be imported here ({why}). Install it:'
        ' DS_BUILD_OPS=0 pip install "fabricfn[deepspeed]"; or write strategy="fsdp".'
    )


def package(device_type: str) -> Any:
    """The module `deepspeed`, told to compile nothing on CPU.

    Raises:
        CapabilityError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package's own imports
            loaded: Any = import_module("deepspeed")
    except ImportError as error:
        raise missing(error) from error
    if device_type == "cpu":  # else the first engine compiles an operation for a minute, or fails without a compiler
        loaded.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # which it calls by names that torch renamed
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)
    logger = logging.getLogger("DeepSpeed")
    if logger.level in (logging.NOTSET, logging.INFO):
        logger.setLevel(logging.WARNING)
    return loaded


def joined(world: World) -> Any:
    """The package, whose collectives go through the process group of this world.

    Raises:
        CapabilityError: the group is not the one that torch knows as the default, which DeepSpeed takes.
    """
    if type(world.group) is not dist.ProcessGroup or world.group is not dist.group.WORLD:
        raise CapabilityError(
            "DeepSpeed talks through torch's default process group and its settings are one a process, so its ranks are"
            ' processes: fabricfn.testing.processes(n), or init_runtime(strategy="deepspeed", devices=n).'
        )
    loaded = package(world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # stage 3 reads it in every pass
    if getattr(loaded, "_fabricfn_group", None) is not world.group:
        loaded.comm.comm.cdb = None  # of a group that is no more
        loaded.utils.groups._release_process_group_references(None)
        with settled(world):
            loaded.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        loaded._fabricfn_group = world.group
    return loaded


@contextlib.contextmanager
def settled(world: World) -> Generator[None]:
    """The environment variables that DeepSpeed reads, while it does."""
    wanted = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.world_size}
    before = {name: os.environ.get(name) for name in wanted}
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.setLevel(logging.ERROR)  # it warns of an optimizer that it does not know
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _nothing(engine: Any) -> None:
    pass


@contextlib.contextmanager
def without_broadcast(engine: Any) -> Generator[None]:
    """Values come in by `write`; the broadcast of an engine that is made fails on scalar parameters, besides."""
    before = engine._broadcast_model
    engine._broadcast_model = _nothing
    try:
        yield
    finally:
        engine._broadcast_model = before


class Idle(torch.optim.Optimizer):
    """Stands where ZeRO wants an optimizer: see [Note: zero]."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing."""
