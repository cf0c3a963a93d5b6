"""The workers of this node on torch's elastic agent: started, watched, restarted and, in any case, ended."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, SubprocessContext
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from fabricfn.environments.workers import FOLDER, STARTED_BY
from fabricfn.errors import LaunchError
from fabricfn.starting.meeting import DEFAULT_PORT
from fabricfn.starting.nodes import Elastic, Nodes, rendezvous_of
from fabricfn.starting.outcomes import Outcome, failures_in, outcome_of, story
from fabricfn.starting.parents import bound, bound_spawn, marked
from fabricfn.starting.request import Request, seconds
from fabricfn.starting.signalling import end_sessions, own_signals, signal_all
from fabricfn.starting.surroundings import environment, quiet
from fabricfn.world import threads_each

GRACE = 5
"""Seconds that workers have to end after a signal, before they are killed."""
STOPPING = 3.0
"""Seconds that they have once a rank has failed: for a save in flight that does not need it."""
PATIENCE = 3.5
"""Seconds to wait, after a rank lost the connection to another one, for that one to end and say why."""


_TorchAgent: Any = LocalElasticAgent
"""A decorator on its methods loses their types."""


class _Agent(_TorchAgent):
    """torch's agent, with one more judge: what a worker left behind says more than the order in which they end."""

    folder: Path = Path()
    """Where the attempts have their folders."""
    aloud: bool = False
    """Whether a failure is told on stderr as soon as it is known; a restart always is."""
    grace: float = GRACE
    """Seconds that the workers have to save and end after this process was told to end."""
    nodes: Nodes | Elastic | None = None
    """How several nodes agree on attempts, where there can be several."""
    outcome: Outcome | None = None
    """How the last attempt failed."""
    seen: Mapping[int, int] | None = None
    """Who had ended, with which status, before any of the last attempt was told to."""
    patience: float = 0.0
    """When to stop waiting for the rank behind a lost connection, on the monotonic clock."""

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        super()._rendezvous(worker_group)
        if self.nodes is not None:  # all nodes count the attempts alike
            spec = worker_group.spec
            counted = self.nodes.restarts(spec.max_restarts, self._remaining_restarts)
            spec.max_restarts, self._remaining_restarts = counted

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with bound_spawn():
            started = cast("dict[int, Any]", super()._start_workers(worker_group))
        context: Any = self._pcontext
        close: Callable[..., None] = context.close

        def soon(death_sig: signal.Signals | None = None, timeout: float = STOPPING) -> None:  # torch: half a minute
            self.seen = _ended(context) if self.seen is None else self.seen
            close(death_sig, timeout)

        context.close, self.seen = soon, None
        return started

    def _exit_barrier(self) -> None:
        if self.nodes is not None:
            self.nodes.end()
        super()._exit_barrier()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: float = GRACE) -> None:
        told = isinstance(sys.exc_info()[1], SignalException)  # else a worker failed: there is nothing to save
        if told and isinstance(self._pcontext, MultiprocessContext):
            self._pcontext._worker_finished_event.set()  # a worker that returns now need not wait until we read it
        if death_sig == signal.SIGINT and not all(
            marked(self.attempt(), rank, "joined") for rank in self.ranks().values()
        ):
            death_sig = signal.SIGTERM  # KeyboardInterrupt in the middle of an import is a traceback of each rank
        context: Any = self._pcontext
        if context is not None:  # torch 2.9 has no time limit for its own call of this
            context.close(death_sig, self.grace if told else GRACE)
        super()._shutdown(death_sig)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        failed = self._has_failed()
        if failed is not False:
            return RunResult(state=WorkerState.FAILED if failed else WorkerState.HEALTHY)
        result = cast("RunResult", super()._monitor_workers(worker_group))
        if result.state is WorkerState.FAILED:  # since we looked
            self._settle(self._untold(result.failures))
        return result

    def _untold(self, failures: Mapping[int, Any]) -> dict[int, int]:
        """Who ended by themselves, where torch saw a failure before we did and told all others to end by SIGTERM."""
        ranks, seen = self.ranks(), self.seen or {}
        lost = {failure.rank for failure in failures_in(self.attempt()) if failure.consequence}
        alone = lost.issuperset(failures)  # then what they lost had ended before
        return {
            local: status
            for local, status in seen.items()
            if alone or ranks[local] in failures or status != -signal.SIGTERM
        }

    def _has_failed(self) -> bool | None:
        """Whether a rank failed: then the first one is known, and no worker is left. None: it is too early to say."""
        ended, failures = _ended(self._pcontext), failures_in(self.attempt())
        lost = {failure.rank for failure in failures if failure.consequence}
        ranks = self.ranks()
        bad = {ranks[local] for local, status in ended.items() if status} - lost
        early = {ranks[local] for local, status in ended.items() if not status and self._too_early(ranks[local])}
        if bad or early or len(failures) > len(lost):
            return self._settle(ended)
        if not lost:
            self.patience = time.monotonic() + PATIENCE
            return False
        # The rank that broke the connection may be on its way out still, if there is one that could be.
        others = set(ranks.values()) - lost - {ranks[local] for local in ended}
        return None if others and time.monotonic() < self.patience else self._settle(ended)

    def _too_early(self, rank: int) -> bool:
        """Whether a rank that ended with status 0 should have gone on: another one waits for it."""
        if isinstance(self._pcontext, MultiprocessContext):  # os._exit(0): it waits until we have its result
            return not (self.attempt() / f"rank-{rank}.result").exists()
        others = set(self.ranks().values()) - {rank}
        return not marked(self.attempt(), rank, "joined") and any(
            marked(self.attempt(), other, "came") for other in others
        )

    def _settle(self, ended: Mapping[int, int]) -> bool:
        """Say who failed first, and end all workers. A rank that says why is let go to its end, if that is near."""
        ranks = self.ranks()
        by_rank = {ranks[local]: status for local, status in ended.items()}
        self.outcome = outcome_of(self.attempt(), list(ranks.values()), by_rank)
        if self.aloud or self._remaining_restarts:
            again = f"\nfabricfn: restart {self._restarts() + 1} of {self._worker_group.spec.max_restarts}"
            print(story(self.outcome) + again * bool(self._remaining_restarts), file=sys.stderr, flush=True)
        context: Any = self._pcontext
        pids: dict[int, int] = {} if context is None else context.pids()
        first = next((local for local in pids if ranks[local] == self.outcome.failed_rank), None)
        signal_all(pid for local, pid in pids.items() if local not in (first, *_ended(context)))
        deadline = time.monotonic() + STOPPING
        while first is not None and first not in _ended(context) and time.monotonic() < deadline:
            time.sleep(0.005)
        if context is not None:
            context.close(timeout=max(0.1, deadline - time.monotonic()))
        end_sessions(pids.values())
        return True

    def _restarts(self) -> int:
        return self._worker_group.spec.max_restarts - self._remaining_restarts

    def ranks(self) -> dict[int, int]:
        """Local rank -> global rank."""
        return {worker.local_rank: worker.global_rank for worker in self._worker_group.workers}

    def pids(self) -> list[int]:
        """The processes of the workers."""
        return [] if self._pcontext is None else list(self._pcontext.pids().values())

    def attempt(self) -> Path:
        """The folder of the current attempt."""
        return self.folder / f"attempt-{self._restarts()}"


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
    aloud: bool = False,
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
        aloud: whether a failure is told on stderr; it is there before the last worker is gone.

    Raises:
        SignalException: this process got SIGINT, SIGTERM, SIGHUP or SIGQUIT; the workers are gone.
    """
    before = set(multiprocessing.active_children())
    text = isinstance(entrypoint, str)
    words = list(bound((entrypoint, *args))) if text else []
    handler = rendezvous_of(request)
    agent = _Agent(
        WorkerSpec(
            role="fabricfn",
            local_world_size=count,
            entrypoint=words[0] if text else entrypoint,
            # The agent substitutes $names in strings.
            args=tuple(word.replace("$", "$$") for word in words[1:]) if text else args,
            rdzv_handler=handler,
            max_restarts=request.max_restarts,
            monitor_interval=0.02,
        ),
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        start_method=start_method,
    )
    agent.folder, agent.grace, agent.aloud = folder, request.grace, aloud
    agent.nodes = handler if isinstance(handler, Nodes | Elastic) else None
    settings = {STARTED_BY: started_by, FOLDER: str(folder), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if "OMP_NUM_THREADS" not in os.environ:
        settings["OMP_NUM_THREADS"] = str(threads_each(count))
    with environment(settings), own_signals(request.stop_signals, agent.pids), quiet():
        try:
            result = _run(agent, request)
        except SignalException:
            statuses = list(_ended(agent._pcontext).values())
            if not text or statuses != [0] * count:
                raise
            result = RunResult(state=WorkerState.SUCCEEDED)  # a script whose ranks have saved and left
        finally:
            _end(agent._pcontext, before)
            told = isinstance(sys.exc_info()[1], SignalException)
            if not (told and isinstance(handler, Elastic)):  # else the other nodes go on without this one
                if agent.nodes is not None:
                    agent.nodes.end()
                handler.shutdown()
    ranks = tuple(sorted(agent.ranks().values()))
    if not result.is_failed():
        return Outcome(ranks=ranks, folder=agent.attempt())
    if agent.outcome is None and aloud:
        print(story(Outcome(ranks=ranks, folder=folder, status=1)), file=sys.stderr, flush=True)
    return agent.outcome or Outcome(ranks=ranks, folder=agent.attempt(), status=1)


def _run(agent: _Agent, request: Request) -> RunResult:
    """Run the workers until all have succeeded, or there is no further attempt.

    Raises:
        LaunchError: several nodes did not meet, or lost the one that keeps the list of them.
    """
    where = f"{request.main_address}:{request.main_port or DEFAULT_PORT}"
    try:
        return agent.run()
    except RendezvousClosedError:  # another node has ended, so there is no further attempt: what counts is the last
        agent._remaining_restarts += 1
        return RunResult(state=WorkerState.FAILED)
    except RendezvousTimeoutError as error:
        raise LaunchError(
            f"num_nodes={request.num_nodes}: too few nodes came to {where} within {seconds(request.timeout):g} s"
            " (timeout=). Start the same command on each of them."
        ) from error
    except RendezvousConnectionError as error:
        raise LaunchError(
            f"the node at {where}, which keeps the list of nodes, is gone; no rank of this node is left. Start the same"
            " command again on each of them."
        ) from error


def _end(context: Any, before: set[Any]) -> None:
    """Leave no worker behind, nor what it started in its own session, whatever was going on."""
    pids: dict[int, int] = {} if context is None else context.pids()
    for child in set(multiprocessing.active_children()) - before:
        child.kill()
        child.join(GRACE)
    end_sessions(pids.values())
