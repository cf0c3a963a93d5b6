"""What started this process. One file per launcher; to add one, write its `why_not` and `detect` and put the file into
`DETECTORS`.
"""

from collections.abc import Mapping

from fabricfn.environments import kubeflow, lsf, mpi, single, slurm, submitit, torchrun, workers
from fabricfn.environments.topology import Detector, Topology as Topology
from fabricfn.errors import ConfigurationError

DETECTORS: dict[str, Detector] = {
    "workers": workers,
    "torchrun": torchrun,
    "submitit": submitit,
    "slurm": slurm,
    "lsf": lsf,
    "mpi": mpi,
    "kubeflow": kubeflow,
    "single": single,
}
"""In the order in which they are asked: a launcher that runs on another stands before it."""


def find(environ: Mapping[str, str], environment: str | Topology | None = None) -> Topology:
    """The place of this process in the job.

    Args:
        environ: the environment variables, usually `os.environ`.
        environment: None asks every detector; the name of one asks it alone; a `Topology` is taken as it is.

    Raises:
        ConfigurationError: the name is unknown, or this process was not started by it; or the launcher's variables make
            no sense.

    Example:
        >>> find({}).world_size
        1
    """
    if isinstance(environment, Topology):
        return environment
    if environment is not None and environment not in DETECTORS:
        raise ConfigurationError(
            f"environment={environment!r} is unknown; there are {', '.join(DETECTORS)}, or pass an"
            " fabricfn.environments.Topology record of your own."
        )
    detectors = DETECTORS.values() if environment is None else [DETECTORS[environment]]
    topology = next((found for one in detectors if (found := one.detect(environ)) is not None), None)
    if topology is None and environment is not None:
        reason = DETECTORS[environment].why_not(environ)
        raise ConfigurationError(
            f"environment={environment!r}, but this process was not started by it: {reason}. Leave environment out, or"
            " start the script with that launcher."
        )
    return topology or Topology()
