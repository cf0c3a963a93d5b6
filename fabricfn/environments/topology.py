"""What a launcher tells a process about its place in the job."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

from fabricfn.errors import ConfigurationError

FROM_OTHERS = -1
"""The value of a field that is to be worked out from the other ones."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The place of this process in the job, as its launcher describes it. Plain data, read once at start.

    Pass one of your own to `init_runtime(environment=...)` for a cluster that is not known here. `main_address`,
    `main_port`, `world_size`, `rank` and one of `num_nodes`, `local_world_size` are enough: the rest follows from them
    where every machine has equally many processes, in the order of ranks.

    Raises:
        ConfigurationError: a field that cannot be worked out is missing, or they contradict each other.

    Example:
        >>> mine = Topology(main_address="head", main_port=29500, world_size=8, rank=5, num_nodes=2)
        >>> mine.local_world_size, mine.local_rank, mine.node_rank
        (4, 1, 1)
    """

    name: str = "single"
    """What started the process, as `Runtime.environment` shows it."""
    rank: int = FROM_OTHERS
    """0 .. world_size - 1, over all nodes."""
    world_size: int = 1
    """The number of processes of the job."""
    local_rank: int = FROM_OTHERS
    """0 .. local_world_size - 1, on this node."""
    local_world_size: int = FROM_OTHERS
    """The number of processes on this node."""
    node_rank: int = FROM_OTHERS
    """0 .. num_nodes - 1."""
    num_nodes: int = FROM_OTHERS
    """The number of machines of the job."""
    main_address: str | None = None
    """The host where the ranks meet: that of rank 0. None on one node, or when they meet through `folder`."""
    main_port: int | None = None
    """Its port."""
    attempt: int = 0
    """How many times the job was restarted before."""
    max_restarts: int | None = None
    """How many times the launcher restarts the job; None when it does not say."""
    folder: str | None = None
    """The private folder of this attempt, which the ranks of one node share with the process that started them."""
    guessed: tuple[str, ...] = ()
    """Which of main_address and main_port no launcher said: a rule gave them, so an argument replaces them."""
    own_devices: bool = False
    """Whether the launcher may show each process nothing but its own device, which then has the index 0."""

    def __post_init__(self) -> None:
        if self.rank == FROM_OTHERS and self.world_size != 1:
            raise ConfigurationError(
                f"{self.name}: world_size={self.world_size}, but no rank: each process must say which one it is. Write"
                " Topology(..., rank=int(os.environ[...])) with the variable that your cluster sets."
            )
        self._fill("rank", 0)
        if self.local_world_size == FROM_OTHERS:
            self._fill("local_world_size", self._share("num_nodes", self.num_nodes))
        if self.num_nodes == FROM_OTHERS:
            self._fill("num_nodes", self._share("local_world_size", self.local_world_size))
        self._fill("local_rank", self.rank % self.local_world_size)
        self._fill("node_rank", self.rank // self.local_world_size)
        for name, total in (("rank", "world_size"), ("local_rank", "local_world_size"), ("node_rank", "num_nodes")):
            value, limit = getattr(self, name), getattr(self, total)
            if not 0 <= value < limit:
                raise ConfigurationError(
                    f"{self.name}: {name}={value} must be 0 .. {total} - 1, but {total}={limit}. (rank, local_rank"
                    " and node_rank count from 0, over all nodes, on this node, and over the nodes.)"
                )

    def _fill(self, name: str, value: int) -> None:
        if getattr(self, name) == FROM_OTHERS:
            object.__setattr__(self, name, value)

    def _share(self, name: str, divisor: int) -> int:
        if self.world_size == 1:
            return 1
        if divisor < 1 or self.world_size % divisor:
            what = "is missing" if divisor == FROM_OTHERS else f"is {divisor}"
            raise ConfigurationError(
                f"{self.name}: world_size={self.world_size} and {name} {what}, so the processes of each machine cannot"
                " be counted. Write Topology(..., num_nodes=...), or local_world_size=, local_rank=, node_rank= and"
                " num_nodes= where the machines differ."
            )
        return self.world_size // divisor


class Detector(Protocol):
    """One launcher: a file of this folder."""

    def why_not(self, environ: Mapping[str, str]) -> str | None:
        """Why this launcher did not start the process, in a few words; None when it did."""
        ...

    def detect(self, environ: Mapping[str, str]) -> Topology | None:
        """The place of the process; None exactly where `why_not` says why. An error where it makes no sense."""
        ...


def integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The value of an environment variable that must be a whole number.

    Raises:
        ConfigurationError: it is missing and has no default, or it is no number.
    """
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.removeprefix("-").isdigit()):
        found = "is not set" if text is None else f"is {text!r}, which is no whole number"
        raise ConfigurationError(f"the environment variable {name} {found}, but the launcher must set it.")
    return int(text)


def unset(environ: Mapping[str, str], *names: str) -> str | None:
    """Which of these variables are not set, in words; None when all are."""
    missing = [name for name in names if name not in environ]
    return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set" if missing else None


ALONE = "it started one process only, so there is nobody to join: this process may start ranks itself"
"""Why a launcher that started one process is taken as none."""
