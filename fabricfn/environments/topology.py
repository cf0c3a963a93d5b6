"""What a launcher tells a process about its place in the job."""

import dataclasses
from collections.abc import Mapping

from fabricfn.errors import ConfigurationError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The place of this process in the job, as its launcher describes it. Plain data, read once at start.

    Pass one of your own to `init_runtime(environment=...)` for a cluster that is not known here.
    """

    name: str = "single"
    """What started the process, as `Runtime.environment` shows it."""
    rank: int = 0
    """0 .. world_size - 1, over all nodes."""
    world_size: int = 1
    """The number of processes of the job."""
    local_rank: int = 0
    """0 .. local_world_size - 1, on this node."""
    local_world_size: int = 1
    """The number of processes on this node."""
    node_rank: int = 0
    """0 .. num_nodes - 1."""
    num_nodes: int = 1
    """The number of machines of the job."""
    main_address: str | None = None
    """The host where the ranks meet; None when they meet through `folder`."""
    main_port: int | None = None
    """Its port."""
    attempt: int = 0
    """How many times the job was restarted before."""
    max_restarts: int | None = None
    """How many times the launcher restarts the job; None when it does not say."""
    folder: str | None = None
    """The private folder of this attempt, which the ranks of one node share with the process that started them."""


def integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The value of an environment variable that must be a whole number.

    Raises:
        ConfigurationError: it is missing and has no default, or it is no number.
    """
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.removeprefix("-").isdigit():
        found = "is not set" if text is None else f"is {text!r}, which is no whole number"
        raise ConfigurationError(f"the environment variable {name} {found}, but the launcher must set it.")
    return int(text)
