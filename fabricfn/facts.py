"""What there is: the machine, the packages, the launcher; and what a command line would start here."""

import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from fabricfn.accelerators import available, describe
from fabricfn.environments import DETECTORS, Topology, command_line, find
from fabricfn.errors import ConfigurationError
from fabricfn.starting.commanded import filled
from fabricfn.starting.meeting import DEFAULT_PORT
from fabricfn.starting.request import Request, check_own_start, choice_of, most_ranks, node_range, rendezvous_name
from fabricfn.world import threads_each

PACKAGES = (
    "fabricfn",
    "torch",
    "optree",
    "safetensors",
    "numpy",
    "cloudpickle",
    "mpi4py",
    "torchdata",
    "lightning-fabric",
)
# fmt: off
VARIABLES = (
    "CUDA_", "OMP_NUM_THREADS", "NCCL_", "GLOO_", "TORCH", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK",
    "LOCAL_WORLD_SIZE", "GROUP_", "NODE_RANK", "SLURM_", "LSB_", "JSM_", "OMPI_COMM_", "PMI_", "PMIX_RANK",
    "PMIX_NAMESPACE", "MPI_LOCAL", "MV2_COMM_", "SUBMITIT_", "FABRICFN_", "TPU_", "PJRT_", "LOGLEVEL",
)
# fmt: on
"""The beginnings of the names of environment variables that matter here. Others may hold secrets."""
SECRETS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL", "COOKIE")
"""What the name of a variable that is never shown contains."""


def environment_report(environ: Mapping[str, str] | None = None) -> str:
    """What this process finds around it, fit for a bug report; `fabricfn env` prints it.

    Versions of Python, torch, CUDA, NCCL and the packages; the devices; for each launcher why it did not start this
    process, or that it did; the environment variables that any of these read, but none that looks like a secret. No
    process group is needed, and any rank may call it, alone.

    Args:
        environ: the environment variables to look at; None takes those of this process.

    Returns:
        Lines of text.

    Example:
        >>> import fabricfn as ff
        >>> print(ff.environment_report({}).splitlines()[-1])
        environment variables: none that matters
    """
    seen = dict(os.environ) if environ is None else dict(environ)
    return "\n".join([*_versions(), *_devices(), *_launchers(seen), *_variables(seen)])


def _versions() -> list[str]:
    backends = [name for name in ("gloo", "nccl", "mpi", "ucc", "xccl") if _has(name)]
    return [
        f"system: {platform.platform()}, {platform.machine()}, host {platform.node()}",
        f"python: {platform.python_version()} ({sys.executable})",
        "packages: " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        f"torch: CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}, NCCL {_nccl()},"
        f" torch.distributed {' '.join(backends) or 'not available'}",
    ]


def _has(backend: str) -> bool:
    return dist.is_available() and dist.is_backend_available(backend)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _nccl() -> str:
    if not (torch.cuda.is_available() and _has("nccl")):
        return "none"
    version: Any = nccl.version  # without types
    found: tuple[Any, ...] = version()
    return ".".join(map(str, found))


def _devices() -> list[str]:
    found = available()
    lines = [f"devices: {describe(found)}, {threads_each(1)} CPU cores for this process, shm {_shared_memory()}"]
    cuda: Any = torch.cuda  # without types
    for index in range(found.get("cuda", 0)):
        device: Any = cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        lines.append(f"  cuda:{index} {device.name}, {device.total_memory >> 20} MiB, capability {capability}")
    return lines


def _shared_memory() -> str:
    if not os.path.isdir("/dev/shm"):
        return "none"
    room = os.statvfs("/dev/shm")
    return f"{room.f_bavail * room.f_frsize >> 20} MiB free"


def _launchers(environ: Mapping[str, str]) -> list[str]:
    lines = ["launchers, in the order in which they are asked:"]
    first = True
    for name, reason in _reasons(environ).items():
        if reason is not None:
            lines.append(f"  {name}: no: {reason}")
        else:
            lines.append(f"  {name}: {_matched(environ, name) if first else 'yes, but an earlier one has matched'}")
            first = False
    return lines


def _reasons(environ: Mapping[str, str]) -> dict[str, str | None]:
    """For each launcher why it did not start this process; a variable that makes no sense is a reason too."""
    found: dict[str, str | None] = {}
    for name, one in DETECTORS.items():
        try:
            found[name] = one.why_not(environ)
        except ConfigurationError as error:
            found[name] = f"ConfigurationError: {error}"
    return found


def _matched(environ: Mapping[str, str], name: str) -> str:
    try:
        return f"yes: {_place(find(environ, name))}"
    except ConfigurationError as error:
        return f"ConfigurationError: {error}"


def _place(topology: Topology) -> str:
    where = "" if topology.main_address is None else f", at {topology.main_address}:{topology.main_port}"
    return (
        f"rank {topology.rank} of {topology.world_size}, local rank {topology.local_rank} of"
        f" {topology.local_world_size}, node {topology.node_rank} of {topology.num_nodes}{where}"
    )


def _variables(environ: Mapping[str, str]) -> list[str]:
    shown = {
        name: environ[name]
        for name in sorted(environ)
        if name.startswith(VARIABLES) and not any(word in name.upper() for word in SECRETS)
    }
    if not shown:
        return ["environment variables: none that matters"]
    return ["environment variables:", *(f"  {name}={value}" for name, value in shown.items())]


def plan(options: Mapping[str, Any]) -> str:
    """What `fabricfn run` with these options would start here, in words; the script may still say otherwise.

    Raises:
        ConfigurationError: the options make no sense here.
    """
    request = filled(Request(), options)
    choice = choice_of(request)
    topology = find(os.environ, request.environment)
    lines = [f"  {command_line.RUN}={command_line.write(options, os.getpid())}"]
    if topology.name != "single":
        return "\n".join(
            [f"processes: none: {topology.name} has started them ({_place(topology)})", "environment:", *lines]
        )
    check_own_start(request, choice)
    count = len(choice.indices)
    said = "devices" in options
    where = f"{count} on {choice.accelerator}" + ("" if said else ", if the script leaves devices at its default")
    least, most = node_range(request.num_nodes)
    nodes = "" if request.node_rank is None else f"; this is node {request.node_rank} of {most}"
    if request.node_rank is None and most > 1:
        nodes = f"; {least} to {most} nodes" if least < most else f"; {most} nodes"
    if most > 1:
        meeting = f"{request.main_address}:{request.main_port or DEFAULT_PORT} ({rendezvous_name(request)})"
        nodes += f", which meet at {meeting}"
    if "OMP_NUM_THREADS" not in os.environ and most_ranks(request, choice) > 1:
        lines.append(f"  OMP_NUM_THREADS={threads_each(count)}")
    return "\n".join(
        [f"processes: {where}{nodes}", f"restarts: at most {request.max_restarts}", "environment:", *lines]
    )
