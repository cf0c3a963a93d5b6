"""torchrun, and everything else that runs workers on torch's elastic agent."""

from collections.abc import Mapping

from fabricfn.environments.topology import Topology, integer, unset


def why_not(environ: Mapping[str, str]) -> str | None:
    """Why this is no worker of torch's elastic agent."""
    return unset(environ, "TORCHELASTIC_RUN_ID")


def detect(environ: Mapping[str, str]) -> Topology | None:
    """The place of a worker of torch's elastic agent; None outside one."""
    if why_not(environ) is not None:
        return None
    return Topology(
        name="torchrun",
        rank=integer(environ, "RANK"),
        world_size=integer(environ, "WORLD_SIZE"),
        local_rank=integer(environ, "LOCAL_RANK"),
        local_world_size=integer(environ, "LOCAL_WORLD_SIZE"),
        node_rank=integer(environ, "GROUP_RANK", 0),
        num_nodes=integer(environ, "GROUP_WORLD_SIZE", 1),
        main_address=environ.get("MASTER_ADDR"),
        main_port=integer(environ, "MASTER_PORT"),
        attempt=integer(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        max_restarts=integer(environ, "TORCHELASTIC_MAX_RESTARTS", 0),
    )
