"""The package torch_xla: found, imported, told which devices are ours. It is imported by nobody else."""

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from fabricfn.errors import CapabilityError, ConfigurationError


def package(part: str = "") -> Any:
    """The module `torch_xla`, or a part of it.

    Raises:
        CapabilityError: it is not installed, or for another torch.
    """
    name = f"torch_xla.{part}" if part else "torch_xla"
    if sys.modules.get(name) is not None:
        return sys.modules[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the package's own imports
            return import_module(name)
    except ImportError as error:
        raise CapabilityError(
            f'strategy="xla" needs the package torch_xla and the torch that it was built for; here is torch'
            f" {torch.__version__}, and the import fails ({error}). Install both into an environment of their own:"
            ' pip install "fabricfn[xla]"; or write strategy="ddp". A TPU with the package torch_tpu needs neither:'
            ' accelerator="tpu".'
        ) from error


def num_devices() -> int:
    """How many devices of this machine XLA computes on, as PJRT_DEVICE says. Initialises none."""
    kind = package("runtime").device_type()
    if kind == "TPU":
        return int(package("_internal.tpu").num_available_chips())
    return int(os.environ.get(f"{kind}_NUM_DEVICES", "1"))


def begin(local_rank: int, local_world_size: int, *, spmd: bool) -> None:
    """Say what this process is, before its first tensor: the one that has all devices (SPMD), or one among several.

    Raises:
        CapabilityError: see `package`.
        ConfigurationError: autograd has computed already, and does not know these devices.
    """
    runtime = package("runtime")
    if spmd:
        if not runtime.is_spmd():
            runtime.use_spmd()
    elif local_world_size > 1 and runtime.device_type() != "CPU":  # on a CPU processes know nothing of each other
        package("_internal.pjrt").initialize_multiprocess(local_rank, local_world_size)
    runtime.addressable_runtime_device_count()  # starts it: before that, autograd counts no devices
    one = torch.zeros((), device=package().device(), requires_grad=True)
    try:
        (one + 1).backward()  # pyright: ignore[reportUnknownMemberType]
    except RuntimeError as error:
        raise ConfigurationError(
            "a backward pass has run in this process before XLA was started, and autograd learns of no devices after"
            ' its first one. Call init_runtime(strategy="xla") before anything else computes gradients.'
        ) from error


def settle() -> None:
    """Compile and start what was only written down: XLA's tensors are lazy."""
    package().sync()


def spans(num_ranks: int) -> bool:
    """Whether XLA itself reaches all ranks: it knows as many processes, and each of them has one device."""
    runtime = package("runtime")
    return runtime.process_count() == num_ranks and runtime.addressable_device_count() == 1


def mean_over_replicas(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The means over all of XLA's replicas, in new tensors. Every rank must call it."""
    model, size = package("core.xla_model"), package("runtime").process_count()
    found = [tensor / size for tensor in tensors]  # before the sum, which 16 bits may not hold
    model.all_reduce(model.REDUCE_SUM, found)
    return found


class Spread:
    """All devices of this process in a row, and how a tensor is laid out over them."""

    def __init__(self) -> None:
        self.spmd = package("distributed.spmd")
        count = int(package("runtime").global_runtime_device_count())
        self.mesh = self.spmd.Mesh(list(range(count)), (count,), ("fsdp",))

    def cut(self, leaf: Any) -> None:
        """Let each device have some rows of a tensor that all of them hold; everything else stays as it is."""
        if self._can(leaf) and package()._XLAC._get_xla_sharding_spec(leaf) in ("", "{replicated}"):
            self.spmd.mark_sharding(leaf, self.mesh, self._rows(leaf))

    def cut_in_graph(self, leaf: Any) -> Any:
        """The same values, cut, and so is their gradient."""
        if self._can(leaf):
            return self.spmd.mark_sharding_with_gradients(leaf, self.mesh, self._rows(leaf))
        return leaf

    def _can(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.device.type == "xla" and leaf.dim() > 0

    def _rows(self, tensor: torch.Tensor) -> tuple[str | None, ...]:
        return ("fsdp", *[None] * (tensor.dim() - 1))
