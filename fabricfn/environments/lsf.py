"""IBM LSF: the tasks of one `jsrun`."""

import socket
from collections.abc import Mapping
from pathlib import Path

from fabricfn.environments.topology import ALONE, Topology, integer, unset
from fabricfn.errors import ConfigurationError

FIRST_PORT, PORTS = 10000, 1000
"""The ports that the job id is mapped to."""


def why_not(environ: Mapping[str, str]) -> str | None:
    """Why `jsrun` did not start this process as one of several."""
    missing = unset(environ, "LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE")
    if missing is not None:
        return missing
    return ALONE if integer(environ, "JSM_NAMESPACE_SIZE") == 1 else None


def detect(environ: Mapping[str, str], host: str | None = None) -> Topology | None:
    """The place of a task of jsrun; None elsewhere. Reads the file of hosts that LSB_DJOB_RANKFILE names.

    Args:
        environ: the environment variables.
        host: the name of this machine; None asks the machine.

    Raises:
        ConfigurationError: that file cannot be read, or names no host.
    """
    if why_not(environ) is not None:
        return None
    hosts = _hosts(environ["LSB_DJOB_RANKFILE"])
    rank, size = integer(environ, "JSM_NAMESPACE_RANK"), integer(environ, "JSM_NAMESPACE_SIZE")
    local_rank = integer(environ, "JSM_NAMESPACE_LOCAL_RANK")
    local_size = integer(environ, "JSM_NAMESPACE_LOCAL_SIZE", max(1, size // len(hosts)))
    short = [name.partition(".")[0] for name in hosts]
    mine = (host or socket.gethostname()).partition(".")[0]
    # where the machine calls itself otherwise, jsrun's order by node stands in for its name
    node = short.index(mine) if mine in short else (rank - local_rank) // local_size
    return Topology(
        name="lsf",
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=node,
        num_nodes=len(hosts),
        main_address=environ.get("MASTER_ADDR") or hosts[0],
        main_port=integer(environ, "MASTER_PORT", FIRST_PORT + integer(environ, "LSB_JOBID") % PORTS),
        guessed=tuple(
            field
            for field, variable in (("main_address", "MASTER_ADDR"), ("main_port", "MASTER_PORT"))
            if not environ.get(variable)
        ),
        own_devices=True,
    )


def _hosts(path: str) -> list[str]:
    """The machines of the job, each once. The first line is the one that the job was submitted to: it has no task."""
    try:
        lines = Path(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"LSB_DJOB_RANKFILE={path!r}, the file with the hosts of this LSF job, cannot be read: {error}. Write"
            " environment=fabricfn.environments.Topology(...) to say yourself where the ranks are."
        ) from error
    hosts = list(dict.fromkeys(lines[1:] or lines))
    if not hosts:
        raise ConfigurationError(f"LSB_DJOB_RANKFILE={path!r}, the file with the hosts of this LSF job, is empty.")
    return hosts
