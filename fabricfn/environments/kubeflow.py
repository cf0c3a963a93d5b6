"""Kubeflow's PyTorchJob, and every other scheduler that sets the four variables of torch's `env://`."""

from collections.abc import Mapping

from fabricfn.environments.topology import ALONE, FROM_OTHERS, Topology, integer, unset


def why_not(environ: Mapping[str, str]) -> str | None:
    """Why nothing but these variables says that this process is one of several."""
    missing = unset(environ, "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
    if missing is not None:
        return missing
    return ALONE if integer(environ, "WORLD_SIZE") == 1 else None


def detect(environ: Mapping[str, str]) -> Topology | None:
    """The place of a replica: alone on its node, unless LOCAL_RANK and LOCAL_WORLD_SIZE say otherwise.

    Raises:
        ConfigurationError: LOCAL_RANK is set, and LOCAL_WORLD_SIZE is not.
    """
    if why_not(environ) is not None:
        return None
    local = "LOCAL_RANK" in environ
    return Topology(
        name="kubeflow",
        rank=integer(environ, "RANK"),
        world_size=integer(environ, "WORLD_SIZE"),
        local_rank=integer(environ, "LOCAL_RANK", 0),
        local_world_size=integer(environ, "LOCAL_WORLD_SIZE") if local else 1,
        node_rank=integer(environ, "NODE_RANK", FROM_OTHERS) if local else FROM_OTHERS,
        main_address=environ["MASTER_ADDR"],
        main_port=integer(environ, "MASTER_PORT"),
    )
