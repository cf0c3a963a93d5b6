"""submitit on this machine: the tasks of its `LocalExecutor`. On a cluster its tasks are those of an srun."""

from collections.abc import Mapping

from fabricfn.environments.topology import ALONE, Topology, integer, unset

FIRST_PORT, PORTS = 15000, 10000
"""The ports that the job id is mapped to."""


def why_not(environ: Mapping[str, str]) -> str | None:
    """Why submitit's LocalExecutor did not start this process as one of several."""
    missing = unset(environ, "SUBMITIT_LOCAL_JOB_ID", "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS")
    if missing is not None:
        return missing
    if environ.get("SUBMITIT_EXECUTOR") != "local":  # a job on a cluster inherits the variables of who submitted it
        return f"SUBMITIT_EXECUTOR is {environ.get('SUBMITIT_EXECUTOR')!r}, not 'local'"
    return ALONE if integer(environ, "SUBMITIT_LOCAL_NTASKS") == 1 else None


def detect(environ: Mapping[str, str]) -> Topology | None:
    """The place of a task of submitit's LocalExecutor; None elsewhere. All its tasks are on this machine."""
    if why_not(environ) is not None:
        return None
    said = "MASTER_PORT" in environ
    return Topology(
        name="submitit",
        rank=integer(environ, "SUBMITIT_LOCAL_GLOBALID"),
        world_size=integer(environ, "SUBMITIT_LOCAL_NTASKS"),
        num_nodes=1,
        main_address="127.0.0.1",
        main_port=integer(environ, "MASTER_PORT", FIRST_PORT + integer(environ, "SUBMITIT_LOCAL_JOB_ID") % PORTS),
        guessed=() if said else ("main_port",),
    )
