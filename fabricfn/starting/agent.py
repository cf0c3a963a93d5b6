"""The workers of this node on torch's elastic agent: started, watched, restarted and, in any case, ended."""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, SubprocessContext
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # pyright: ignore

from fabricfn.environments import Topology
from fabricfn.environments.workers import FOLDER, STARTED_BY
from fabricfn.errors import ConfigurationError
from fabricfn.failures import Failure, first_cause
from fabricfn.starting.meeting import DEFAULT_PORT
from fabricfn.starting.nodes import Nodes, rendezvous_of
from fabricfn.starting.request import Request
from fabricfn.starting.signalling import own_signals
from fabricfn.world import threads_each

GRACE = 5
"""Seconds that workers have to end after a signal, before they are killed."""
PATIENCE = 1.0
"""Seconds to wait, after a rank lost the connection to another one, for that one to end and say why."""
PARENT_DIED = signal.SIGKILL
"""What the kernel sends to a worker whose parent was killed (Linux)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the workers of this node ended."""

    ranks: tuple[int, ...]
    """The global ranks of this node."""
    folder: Path
    """What the last attempt left behind."""
    failed_rank: int | None
    """The rank that failed first; None when all succeeded."""
    failure: Failure | None
    """Its exception, if it recorded one."""
    status: int
    """Its exit status (negative: a signal); 0 when all succeeded."""


class _Agent(LocalElasticAgent):
    """torch's agent, which also notes who ended before it ends the others, and a worker that leaves without a word."""

    ended: Mapping[int, int] = {}
    """The exit status of the workers that ended by themselves, by local rank."""
    patience: float = 0.0
    """When to stop waiting for the rank behind a lost connection, on the monotonic clock."""
    folder: Path = Path()
    """Where the attempts have their folders."""
    grace: float = GRACE
    """Seconds that the workers have to save and end after this process was told to end."""
    nodes: Nodes | None = None
    """How several nodes agree on restarts, where there can be any."""

    # The decorator on these methods of torch's agent loses their types; hence the ignores.

    def _rendezvous(self, worker_group: WorkerGroup) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        super()._rendezvous(worker_group)  # pyright: ignore
        if self.nodes is not None:  # a node that follows another one has used a restart too: all count alike
            self._remaining_restarts = worker_group.spec.max_restarts - self.nodes.attempt

    def _exit_barrier(self) -> None:
        if self.nodes is not None:
            self.nodes.end()
        super()._exit_barrier()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = GRACE) -> None:  # pyright: ignore
        told = isinstance(sys.exc_info()[1], SignalException)  # else a worker failed: there is nothing to save
        if told and isinstance(self._pcontext, MultiprocessContext):
            self._pcontext._worker_finished_event.set()  # a worker that returns now need not wait until we read it
        super()._shutdown(death_sig, self.grace if told else GRACE)  # pyright: ignore

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.ended = _ended(self._pcontext)
        if not any(self.ended.values()):
            self.patience = time.monotonic() + PATIENCE
        elif self._only_consequences() and time.monotonic() < self.patience:
            return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)  # pyright: ignore
        left = isinstance(self._pcontext, MultiprocessContext) and 0 in self.ended.values()
        if (
            left and result.state is WorkerState.HEALTHY
        ):  # os._exit(0): torch's agent would wait for its result for ever
            return RunResult(state=WorkerState.FAILED)
        return result  # pyright: ignore[reportUnknownVariableType]

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [] if self._pcontext is None else list(self._pcontext.pids().values())

    def attempt(self) -> Path:
        """The folder of the current attempt."""
        return self.folder / f"attempt-{self._worker_group.spec.max_restarts - self._remaining_restarts}"

    def _only_consequences(self) -> bool:
        """Whether all that failed so far lost the connection: the rank that broke it is still on its way out."""
        failures = {failure.rank: failure for failure in failures_in(self.attempt())}
        bad = [self._worker_group.workers[local].global_rank for local, status in self.ended.items() if status]
        return all(rank in failures and failures[rank].consequence for rank in bad)


def failures_in(folder: Path) -> list[Failure]:
    """What the ranks of this attempt recorded."""
    return [pickle.loads(path.read_bytes()) for path in folder.glob("rank-*.failure")]


def _ended(context: Any) -> dict[int, int]:
    """The exit status of the workers that are gone, by local rank."""
    if isinstance(context, SubprocessContext):
        statuses = {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}
    else:
        statuses = {local: process.exitcode for local, process in enumerate(context._pc.processes)}
    return {local: status for local, status in statuses.items() if status is not None}


def run_workers(
    entrypoint: Callable[..., Any] | str,
    args: tuple[Any, ...],
    *,
    request: Request,
    count: int,
    folder: Path,
    started_by: str,
    start_method: str = "spawn",
) -> Outcome:
    """Run `entrypoint(*args)` in `count` processes of this node until all succeed or one fails; none is left behind.

    Args:
        entrypoint: a top-level function, or the path of a program.
        args: its arguments; a program's are strings.
        request: nodes, addresses, restarts.
        count: the number of workers on this node.
        folder: a private, empty folder.
        started_by: the name of the environment that the workers find.
        start_method: of `multiprocessing`, for functions.

    Raises:
        SignalException: this process got SIGINT, SIGTERM, SIGHUP or SIGQUIT; the workers are gone.
    """
    before = set(multiprocessing.active_children())
    text = isinstance(entrypoint, str)
    handler = rendezvous_of(request, folder)
    agent = _Agent(
        WorkerSpec(
            role="fabricfn",
            local_world_size=count,
            entrypoint=entrypoint,
            # The agent substitutes $names in strings.
            args=tuple(arg.replace("$", "$$") if text else arg for arg in args),
            rdzv_handler=handler,
            max_restarts=request.max_restarts,
            monitor_interval=0.02,
            master_addr=request.main_address,
            master_port=None if request.num_nodes == 1 else request.main_port or DEFAULT_PORT,
            local_addr="127.0.0.1" if request.num_nodes == 1 else None,
        ),
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        start_method=start_method,
    )
    agent.folder, agent.grace = folder, request.grace
    agent.nodes = handler if isinstance(handler, Nodes) else None
    settings = {STARTED_BY: started_by, FOLDER: str(folder)}
    if request.num_nodes == 1:
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if "OMP_NUM_THREADS" not in os.environ:
        settings["OMP_NUM_THREADS"] = str(threads_each(count))
    with environment(settings), own_signals(request.stop_signals, agent.pids), _quiet():
        try:
            result: RunResult = agent.run()  # pyright: ignore
        except RendezvousClosedError:  # another node has ended, so there is no further attempt: what counts is the last
            result = RunResult(state=WorkerState.FAILED)
            agent._remaining_restarts += 1
        except SignalException:
            statuses = list(_ended(agent._pcontext).values())
            if not text or statuses != [0] * count:
                raise
            result = RunResult(state=WorkerState.SUCCEEDED)  # a script whose ranks have saved and left
        finally:
            _end(agent._pcontext, before)
            if agent.nodes is not None:
                agent.nodes.end()
            agent._rdzv_handler.shutdown()
    return _outcome(agent, result)


def _outcome(agent: _Agent, result: RunResult) -> Outcome:
    group = agent.get_worker_group()
    ranks = {worker.local_rank: worker.global_rank for worker in group.workers}
    last = agent.attempt()
    done = tuple(sorted(ranks.values()))
    if not result.is_failed():
        return Outcome(ranks=done, folder=last, failed_rank=None, failure=None, status=0)
    failures = failures_in(last)
    told = {failure.rank for failure in failures} | {rank for rank in done if (last / f"rank-{rank}.result").exists()}
    text = isinstance(group.spec.entrypoint, str)
    ended = {ranks[local]: status for local, status in agent.ended.items() if status or not text}
    reported = min(result.failures.values(), key=lambda failure: failure.timestamp, default=None)
    first = None if reported is None else ranks[reported.local_rank]
    if reported is not None and not ended:
        ended = {ranks[reported.local_rank]: reported.exitcode}
    deaths = {rank: status for rank, status in ended.items() if rank not in told}
    rank, failure = first_cause(failures, deaths, first)
    status = ended.get(-1 if rank is None else rank, 1)
    return Outcome(ranks=done, folder=last, failed_rank=rank, failure=failure, status=status)


def _end(context: Any, before: set[Any]) -> None:
    """Leave no worker behind, nor what it started in its own session, whatever was going on."""
    pids: dict[int, int] = {} if context is None else context.pids()
    for child in set(multiprocessing.active_children()) - before:
        child.kill()
        child.join(GRACE)
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def check_ready(what: str) -> None:
    """Raise `ConfigurationError` when this process cannot be the parent of the ranks."""
    if torch.cuda.is_initialized():
        raise ConfigurationError(
            f"{what} would start the ranks, but this process has initialised CUDA already, whose memory and context"
            " the ranks cannot share. Call it before anything touches a GPU."
        )


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Generator[None]:
    """These environment variables inside the block; outside it, everything as it was."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without the agent's log lines, which tell of every process that it ends; `LOGLEVEL` brings them back."""
    rooms = ("torch.distributed.elastic", "torch.multiprocessing")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(rooms)]
    loggers = [] if "LOGLEVEL" in os.environ else [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # A forked worker of a notebook or a test has a sys.stderr without a file; only torch's faulthandler minds.
            warnings.filterwarnings("ignore", message="Unable to enable fault handler")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def attend(topology: Topology) -> None:
    """In a worker: end with the parent, whatever ends it."""
    _prctl_pr_set_pdeathsig(PARENT_DIED)
    if topology.folder is not None:
        os.makedirs(topology.folder, exist_ok=True)
