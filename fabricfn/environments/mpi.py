"""MPI: the processes of one `mpirun` or `mpiexec`, of Open MPI, MPICH, Intel MPI and their kin.

Their variables say who this process is. They do not say where rank 0 is: on several machines that comes from
MASTER_ADDR or from mpi4py. The file that names mpi4py.
"""

import dataclasses
import socket
import zlib
from collections.abc import Mapping
from typing import Any

from fabricfn.environments.topology import ALONE, Topology, integer
from fabricfn.errors import ConfigurationError

DIALECTS: tuple[tuple[str, str, str, str], ...] = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
"""The variables for rank, size, local rank and local size: Open MPI, MVAPICH, MPICH and Intel MPI, Cray."""
JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
"""Variables that name the job, the same in all its processes."""
FIRST_PORT, PORTS = 15000, 10000
"""The ports that the name of the job is mapped to."""


def _dialect(environ: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    return next((names for names in DIALECTS if all(name in environ for name in names)), None)


def why_not(environ: Mapping[str, str]) -> str | None:
    """Why no mpirun started this process as one of several."""
    names = _dialect(environ)
    if names is None:
        return "no variables of an mpirun are set (OMPI_COMM_WORLD_RANK ..., PMI_RANK and MPI_LOCALRANKID ...)"
    return ALONE if integer(environ, names[1]) == 1 else None


def detect(environ: Mapping[str, str]) -> Topology | None:
    """The place of a process of mpirun; None elsewhere.

    `main_address` and `main_port` are None where the variables do not say them; `meet` asks mpi4py.

    Raises:
        ConfigurationError: the machines have unequal numbers of processes.
    """
    names = _dialect(environ)
    if names is None or why_not(environ) is not None:
        return None
    rank, size, local_rank, local_size = (integer(environ, name) for name in names)
    here = size == local_size
    job = next((environ[name] for name in JOB if name in environ), None)
    port = None if job is None else FIRST_PORT + zlib.crc32(job.encode()) % PORTS
    said = "MASTER_PORT" in environ
    return Topology(
        name="mpi",
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=_node(rank, size, local_rank, local_size),
        num_nodes=size // local_size,
        main_address=environ.get("MASTER_ADDR") or ("127.0.0.1" if here else None),
        main_port=integer(environ, "MASTER_PORT") if said else port,
        guessed=("main_address",) * ("MASTER_ADDR" not in environ) + ("main_port",) * (not said),
        own_devices=True,
    )


def _node(rank: int, size: int, local_rank: int, local_size: int) -> int:
    """The machine of a process: ranks go round the machines where the local rank says so, else they fill one first.

    Open MPI may number the processes of one machine in another order than their ranks.
    """
    if size % local_size:
        raise ConfigurationError(
            f"mpirun started {local_size} of {size} processes on this machine, so the machines have unequal numbers."
            " Start equally many on each: mpirun --map-by ppr:4:node (Open MPI), mpiexec -ppn 4 (MPICH), or pass"
            " environment=fabricfn.environments.Topology(...)."
        )
    nodes = size // local_size
    round_the_machines = rank % local_size != local_rank and rank // nodes == local_rank
    return rank % nodes if round_the_machines else rank // local_size


def meet(topology: Topology) -> tuple[Topology, socket.socket | None]:
    """The address and the port of rank 0, as mpi4py tells them. Every process of the job calls it.

    Without mpi4py the address must be known; the port is the default, on one machine a guess from the job's name.

    Returns:
        The topology with both; and on rank 0, where the kernel chose the port, the socket that listens there.

    Raises:
        ConfigurationError: the address is missing and mpi4py is not installed, or it belongs to another MPI.
    """
    if None not in (topology.main_address, topology.main_port):
        return topology, None
    world = _world(needed=topology.main_address is None)
    if world is None and topology.main_address is not None:
        return topology, None
    if world is None:
        raise ConfigurationError(
            f"mpirun started {topology.world_size} processes on {topology.num_nodes} machines, and no variable says"
            " where rank 0 is. Install mpi4py, which asks it (pip install 'fabricfn[mpi]'), or start with: mpirun -x"
            " MASTER_ADDR=<the first machine> -x MASTER_PORT=29500 ..., or write main_address=."
        )
    if world.Get_size() != topology.world_size or world.Get_rank() != topology.rank:
        raise ConfigurationError(
            f"mpirun says rank {topology.rank} of {topology.world_size}, but mpi4py says rank {world.Get_rank()} of"
            f" {world.Get_size()}: it was installed for another MPI. Install it for this one, or set MASTER_ADDR and"
            " MASTER_PORT."
        )
    found: Any = None
    listener = None
    if topology.rank == 0:
        if topology.main_port is None:
            listener = socket.create_server(("127.0.0.1" if topology.num_nodes == 1 else "", 0))
        found = socket.gethostname(), topology.main_port if listener is None else listener.getsockname()[1]
    host, port = world.bcast(found, root=0)
    return dataclasses.replace(topology, main_address=topology.main_address or host, main_port=port), listener


def _world(needed: bool) -> Any:
    """mpi4py's communicator of all processes; None where it is not installed, or cannot be loaded and is not needed."""
    try:
        # an extra that need not be here, nor where types are checked
        from mpi4py import MPI  # pyright: ignore[reportMissingImports, reportUnknownVariableType]
    except ImportError:
        return None
    except RuntimeError as error:  # it is there, and the library that it needs is not
        if not needed:
            return None
        raise ConfigurationError(f"mpi4py cannot be loaded: {error}. Set MASTER_ADDR and MASTER_PORT.") from error
    return MPI.COMM_WORLD  # pyright: ignore[reportUnknownVariableType]
