"""What started this process. One file per launcher; to add one, write its `detect` and put it into `DETECTORS`."""

from collections.abc import Callable, Mapping

from fabricfn.environments import single, torchrun, workers
from fabricfn.environments.topology import Topology as Topology
from fabricfn.errors import ConfigurationError

DETECTORS: dict[str, Callable[[Mapping[str, str]], Topology | None]] = {
    "workers": workers.detect,
    "torchrun": torchrun.detect,
    "single": single.detect,
}
"""In the order in which they are asked: a launcher that runs on another stands before it."""


def find(environ: Mapping[str, str], environment: str | Topology | None = None) -> Topology:
    """The place of this process in the job.

    Args:
        environ: the environment variables, usually `os.environ`.
        environment: None asks every detector; the name of one asks it alone; a `Topology` is taken as it is.

    Raises:
        ConfigurationError: the name is unknown, or this process was not started by it.

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
    topology = next((found for detect in detectors if (found := detect(environ)) is not None), None)
    if topology is None:
        raise ConfigurationError(
            f"environment={environment!r}, but this process was not started by it (its variables are not set). Leave"
            " environment out, or start the script with that launcher."
        )
    return topology
