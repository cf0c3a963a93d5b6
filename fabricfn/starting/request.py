"""The options of `init_runtime` as one record, and what they mean on this machine."""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, cast

from fabricfn.accelerators import Choice, available, choose, in_one_process
from fabricfn.environments import Topology
from fabricfn.errors import ConfigurationError
from fabricfn.interrupts import STOP_SIGNALS, numbers_of
from fabricfn.loggers.logger import Logger
from fabricfn.precision import Precision, check_name
from fabricfn.strategies import ACCELERATORS, STARTS, resolve
from fabricfn.strategies.xla_package import num_devices
from fabricfn.strategy import Strategy

START_METHODS = ("auto", "fork", "spawn", "forkserver")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of `init_runtime`, which documents them, with their defaults."""

    accelerator: str = "auto"
    devices: int | str | Sequence[int] | None = "auto"
    strategy: str | Strategy = "auto"
    num_nodes: int | str = 1
    precision: str | int | Precision = "32-true"
    environment: str | Topology | None = None
    loggers: Logger | Sequence[Logger] = ()
    callbacks: Any = ()
    seed: int | None = None
    timeout: float | timedelta = 1800.0
    debug: bool = False
    stop_signals: Sequence[str | int] = STOP_SIGNALS
    grace: float = 30.0
    backend: str | None = None
    node_rank: int | None = None
    main_address: str | None = None
    main_port: int | None = None
    rendezvous: str = "auto"
    max_restarts: int = 0
    start_method: str = "auto"
    spawn: Literal["script", "never"] = "script"


def request_from(options: dict[str, Any]) -> Request:
    """The record of these keyword arguments.

    Raises:
        TypeError: there is no such option.
    """
    known = [field.name for field in dataclasses.fields(Request)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"there is no option {unknown[0]!r}; there are {', '.join(known)}. To give the launched function a keyword"
            f" argument, write functools.partial(fn, {unknown[0]}=...)."
        )
    return Request(**options)


def choice_of(request: Request) -> Choice:
    """The devices of this node that the request means, everything that can be wrong in it being checked.

    Raises:
        ConfigurationError: an option has no meaning here.
    """
    for name, allowed in (("spawn", ("script", "never")), ("start_method", START_METHODS)):
        if getattr(request, name) not in allowed:
            raise ConfigurationError(f"{name}={getattr(request, name)!r} is unknown; there are {', '.join(allowed)}.")
    node_range(request.num_nodes)
    if type(request.max_restarts) is not int or request.max_restarts < 0:
        raise ConfigurationError(f"max_restarts={request.max_restarts!r} must be a whole number, at least 0.")
    start_method_of(request)
    loggers_of(request)
    if seconds(request.timeout) <= 0:
        raise ConfigurationError(f"timeout={request.timeout!r} must be a positive number of seconds.")
    numbers_of(request.stop_signals)
    if request.grace < 0:
        raise ConfigurationError(f"grace={request.grace!r} must be a number of seconds, 0 or more.")
    Precision.parse(request.precision)
    accelerator, found = accelerator_of(request), available()
    if accelerator == "xla":
        found["xla"] = num_devices()
    choice = choose(accelerator, request.devices, found)
    check_name(request.precision, choice.accelerator)
    return in_one_process(choice) if name_of(request.strategy) == "xla_fsdp" or request.strategy == "dp" else choice


def name_of(strategy: str | Strategy) -> str:
    """The name of a strategy."""
    return strategy.name if isinstance(strategy, Strategy) else strategy


def accelerator_of(request: Request) -> str:
    """What `accelerator` and a strategy such as "xla" say together.

    Raises:
        ConfigurationError: they contradict each other.
    """
    name = name_of(request.strategy)
    own = ACCELERATORS.get(name, "auto")
    if "auto" not in (own, request.accelerator) and own != request.accelerator:
        raise ConfigurationError(
            f'strategy={name!r} means accelerator="{own}", but accelerator={request.accelerator!r}. Leave accelerator'
            " out; the environment variable PJRT_DEVICE (CPU, TPU) says on which hardware XLA computes."
        )
    return request.accelerator if own == "auto" else own


def loggers_of(request: Request) -> tuple[Logger, ...]:
    """One logger, or several, as a tuple.

    Raises:
        ConfigurationError: something is no logger.
    """
    loggers = _several(request.loggers)
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise ConfigurationError(
                f"loggers={logger!r:.120} is no logger. Write loggers=ff.loggers.csv('logs'), jsonl, tensorboard, or a"
                " record ff.loggers.Logger(log=lambda values, step: ...); a logger of Lightning's is"
                " ff.loggers.lightning(logger)."
            )
    return loggers


def callbacks_of(request: Request) -> tuple[Any, ...]:
    """One callback, or a list or tuple of them, as a tuple."""
    return _several(request.callbacks)


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else (value,)


def start_method_of(request: Request) -> str:
    """What `start_method` and a strategy such as "ddp_spawn" say together.

    Raises:
        ConfigurationError: they contradict each other.
    """
    own = STARTS.get(request.strategy, "auto") if isinstance(request.strategy, str) else "auto"
    if "auto" not in (own, request.start_method) and own != request.start_method:
        raise ConfigurationError(
            f'strategy={request.strategy!r} means start_method="{own}", but start_method={request.start_method!r}.'
            ' Write strategy="ddp", or leave start_method out.'
        )
    return request.start_method if own == "auto" else own


def seconds(timeout: float | timedelta) -> float:
    """A time limit in seconds."""
    return timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)


def node_range(num_nodes: int | str) -> tuple[int, int]:
    """The least and the largest number of nodes that `num_nodes` allows.

    Raises:
        ConfigurationError: it is neither a number nor a range.

    Example:
        >>> node_range(2), node_range("1:4")
        ((2, 2), (1, 4))
    """
    least, colon, most = str(num_nodes).partition(":")
    most = most if colon else least
    if type(num_nodes) in (int, str) and least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most):
        return int(least), int(most)
    raise ConfigurationError(
        f'num_nodes={num_nodes!r} must be a whole number, at least 1, or a range such as "1:4": nodes that come and go'
        " while the job runs."
    )


def most_ranks(request: Request, choice: Choice) -> int:
    """The number of ranks of the job, when every node is like this one and as many take part as may."""
    return len(choice.indices) * node_range(request.num_nodes)[1]


def rendezvous_name(request: Request) -> str:
    """How several nodes meet: "static", where each knows its rank, or a back end of torch's that gives them theirs."""
    least, most = node_range(request.num_nodes)
    if request.rendezvous == "static" and least < most:
        raise ConfigurationError(
            f'num_nodes={request.num_nodes!r} is a range, but rendezvous="static" is for a fixed number of nodes. Write'
            ' rendezvous="c10d", or leave it out.'
        )
    return request.rendezvous if request.rendezvous != "auto" else "static" if least == most else "c10d"


def check_own_start(request: Request, choice: Choice) -> None:
    """Raise `ConfigurationError` unless this process can start the ranks of this node by itself.

    Called before any process is started: what is wrong must not come out of every rank, or as a hang.
    """
    resolve(request.strategy, most_ranks(request, choice))
    _, most = node_range(request.num_nodes)
    if most == 1:
        if request.node_rank not in (None, 0):
            raise ConfigurationError(f"node_rank={request.node_rank}, but num_nodes=1. Write num_nodes=... too.")
        return
    dynamic = rendezvous_name(request) != "static"
    if request.main_address is None or (request.node_rank is None and not dynamic):
        ranks = "" if dynamic else f"node_rank=0 .. {most - 1}, a different one on each node, and "
        word = "" if dynamic else " --node-rank 0"
        raise ConfigurationError(
            f"num_nodes={request.num_nodes} needs {ranks}main_address=, the name of"
            f" {'one and the same node' if dynamic else 'the node with node_rank=0'} on all of them, when no launcher"
            f" such as torchrun sets them. On the command line: fabricfn run --num-nodes {request.num_nodes}{word}"
            " --main-address ... train.py"
        )
    if request.node_rank is not None and dynamic:
        raise ConfigurationError(
            f"node_rank={request.node_rank}, but rendezvous={rendezvous_name(request)!r} gives the nodes their ranks,"
            ' as they come. Leave node_rank out, or write rendezvous="static" and a fixed num_nodes.'
        )
    if request.node_rank is not None and not 0 <= request.node_rank < most:
        raise ConfigurationError(f"node_rank={request.node_rank} must be 0 .. {most - 1} (num_nodes - 1).")
