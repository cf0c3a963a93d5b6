"""SLURM: the tasks of one `srun`."""

from collections.abc import Mapping

from fabricfn.environments.hostlists import counts, expand
from fabricfn.environments.topology import ALONE, Topology, integer
from fabricfn.errors import ConfigurationError

INTERACTIVE = ("bash", "interactive")
"""Names of jobs in which somebody sits at a shell: what is started there was started once."""
FIRST_PORT, PORTS = 15000, 10000
"""The ports that the job id is mapped to; below those that kernels give out by themselves."""


def _first(environ: Mapping[str, str], *names: str) -> str | None:
    return next((environ[name] for name in names if environ.get(name)), None)


def _tasks(environ: Mapping[str, str]) -> int:
    # srun describes the step it has started, sbatch the whole job
    return integer(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS", 1)


def why_not(environ: Mapping[str, str]) -> str | None:
    """Why `srun` did not start this process as one of several."""
    if _first(environ, "SLURM_JOB_ID", "SLURM_JOBID") is None:
        return "SLURM_JOB_ID is not set"
    if "OMPI_COMM_WORLD_RANK" in environ or "MPI_LOCALRANKID" in environ:
        return "mpirun started the process, inside a SLURM job"
    if "SLURM_PROCID" not in environ or _first(environ, "SLURM_STEP_ID", "SLURM_STEPID") is None:
        return "in a SLURM job, but srun did not start the process (SLURM_PROCID or SLURM_STEP_ID is not set)"
    if environ.get("SLURM_JOB_NAME") in INTERACTIVE and integer(environ, "SLURM_PROCID") == 0:
        return f"the job is interactive (SLURM_JOB_NAME={environ['SLURM_JOB_NAME']})"
    if _tasks(environ) == 1:
        return ALONE
    return None


def detect(environ: Mapping[str, str]) -> Topology | None:
    """The place of a task of srun; None elsewhere, and in an interactive job.

    The ranks meet on the first node of the list, at a port made from the job id, unless MASTER_ADDR and MASTER_PORT
    say otherwise.

    Raises:
        ConfigurationError: the tasks of a node are not fixed (`--ntasks` alone), or several tasks of an interactive job
            run this.
    """
    if why_not(environ) is not None:
        return None
    rank, tasks = integer(environ, "SLURM_PROCID"), _tasks(environ)
    nodes = integer(environ, "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environ else "SLURM_NNODES", 1)
    if environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        raise ConfigurationError(
            f"task {rank} of {tasks} of a SLURM job with the name {environ['SLURM_JOB_NAME']!r}: jobs of that name are"
            " taken as interactive, where each task would train a model of its own. Name it: SLURM_JOB_NAME=train srun"
            f" --nodes={nodes} --ntasks-per-node={max(1, tasks // nodes)} python train.py"
        )
    if "SLURM_NTASKS_PER_NODE" not in environ:
        raise ConfigurationError(
            f"SLURM started {tasks} tasks on {nodes} nodes by --ntasks={tasks} alone, which may spread them unevenly."
            f" Say how many each node has: srun --nodes={nodes} --ntasks-per-node={max(1, tasks // nodes)} python"
            " train.py (in an sbatch script: #SBATCH --ntasks-per-node=..., without --ntasks)."
        )
    node = integer(environ, "SLURM_NODEID", 0)
    hosts = _first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    address = environ.get("MASTER_ADDR") or (next(expand(hosts)) if hosts else None)
    job = integer(environ, "SLURM_JOB_ID" if "SLURM_JOB_ID" in environ else "SLURM_JOBID")
    step = integer(environ, "SLURM_STEP_ID" if "SLURM_STEP_ID" in environ else "SLURM_STEPID")
    # Two steps of one job may run at a time.
    port = integer(environ, "MASTER_PORT", FIRST_PORT + (job + 101 * step) % PORTS)
    said = {"main_address": "MASTER_ADDR", "main_port": "MASTER_PORT"}
    return Topology(
        name="slurm",
        rank=rank,
        world_size=tasks,
        local_rank=integer(environ, "SLURM_LOCALID"),
        local_world_size=_local_size(environ, node, tasks, nodes),
        node_rank=node,
        num_nodes=nodes,
        main_address=address,
        main_port=port,
        attempt=integer(environ, "SLURM_RESTART_COUNT", 0),
        guessed=tuple(field for field, variable in said.items() if not environ.get(variable)),
        own_devices=True,
    )


def _local_size(environ: Mapping[str, str], node: int, tasks: int, nodes: int) -> int:
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE")
    sizes = counts(listed) if listed else []
    # what was asked for per node is the size of a full one; a step of fewer tasks has smaller ones
    return sizes[node] if node < len(sizes) else max(1, tasks // nodes)
