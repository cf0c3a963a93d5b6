"""`launch`: a function on every rank, its results in a list."""

import encodings.idna
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing import SignalException

from fabricfn import collectives
from fabricfn.accelerators import Choice
from fabricfn.environments import find
from fabricfn.errors import ConfigurationError, LaunchError
from fabricfn.failures import exception_of
from fabricfn.starting import working
from fabricfn.starting.agent import run_workers
from fabricfn.starting.cargo import Call, pack, read_result
from fabricfn.starting.commanded import with_command_line
from fabricfn.starting.entering import enter
from fabricfn.starting.guarded import check_guarded, refuse_imports
from fabricfn.starting.joining import join, place, until_shutdown
from fabricfn.starting.outcomes import Outcome, how_it_ended
from fabricfn.starting.request import Request, check_own_start, choice_of, most_ranks, request_from, start_method_of
from fabricfn.starting.surroundings import check_ready
from fabricfn.world import threads_each

FOR_FORKS = (collectives, working, encodings.idna)
"""What is imported here, once, so that no forked rank has to; the last one by torch's agent, for the machine's name."""


def launch(fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """Run `fn(rt, *args)` on every rank and return what the ranks of this node returned.

    Laws:

    * One rank runs in this process, without any other. Under a launcher (torchrun, or inside another launch) nothing is
      started: `fn` is called once here, and the list has this rank's result alone.
    * `devices="auto"` means all devices here, in a notebook too.
    * Tensors come back on the CPU, in memory of this process; of any size.
    * The first failing rank's own exception is raised, with a note that names the rank; its traceback
      there is the cause (`__cause__`), which Python prints first.
      The errors by which the other ranks notice (a closed connection) are never taken for it.
    * No worker outlives the call, whatever ended it. (`spawn` and `forkserver` keep the small helper processes of
      Python's multiprocessing until this process ends.)
    * A forked rank computes with one CPU thread when this process has computed with several before: OpenMP would hang.

    Args:
        fn: called with the `Runtime` of its rank, then `args`. With `fork` any function; otherwise one at the top level
            of a module, or, with the extra `fabricfn[closures]`, any: a closure, one of a notebook or of the prompt.
            Keyword arguments: `functools.partial`.
        args: given to every rank.
        options: those of `init_runtime`. `start_method` is "fork", "spawn", "forkserver" or "auto": fork on CPU while
            CUDA is not initialised (0.2 s instead of several), else spawn.

    Returns:
        One value for each rank of this node, in the order of ranks.

    Raises:
        ConfigurationError: an option has no meaning here, or contradicts the launcher.
        LaunchError: a rank was killed, left by `sys.exit`, or raised or returned what cannot be pickled.

    Example:
        >>> import fabricfn as ff
        >>> ff.launch(lambda rt, x: rt.world_size * x, 21, accelerator="cpu")
        [21]
    """
    refuse_imports()
    request = with_command_line(request_from(options))
    choice = choice_of(request)
    topology = place(find(os.environ, request.environment))
    count = len(choice.indices)
    if topology.name != "single" or most_ranks(request, choice) == 1:
        with until_shutdown(join(request, topology, choice)) as rt:
            return [fn(rt, *args)]
    check_own_start(request, choice)
    method = start_method(request, choice)
    call: Call = (fn, args, request)
    cargo = call if method == "fork" else pack(call)
    folder = Path(tempfile.mkdtemp(prefix="fabricfn-"))
    stopped = None
    try:
        outcome = run_workers(
            enter,
            (method == "spawn", cargo, str(folder), _threads_of_fork(count) if method == "fork" else None),
            request=request,
            count=count,
            folder=folder,
            started_by="launch",
            start_method=method,
        )
        if outcome.failed:
            check_guarded(folder)
            _raise_cause(outcome)
        return [read_result(outcome.folder / f"rank-{rank}.result") for rank in outcome.ranks]
    except SignalException as error:
        stopped = error.sigval
    except (EOFError, ConnectionError):  # a fork server has ended
        check_guarded(folder)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if signal.getsignal(stopped) == signal.SIG_DFL:
        print(f"fabricfn: launch was stopped by {stopped.name}; no rank is left", file=sys.stderr, flush=True)
    signal.raise_signal(stopped)  # by the handler that was there before: KeyboardInterrupt, or the end of this process
    raise LaunchError(f"launch was stopped by {stopped.name}; its ranks are gone.")


def start_method(request: Request, choice: Choice, initialised: Callable[[], bool] = torch.cuda.is_initialized) -> str:
    """The start method of multiprocessing to use.

    Args:
        request: what the user wants.
        choice: the devices of this node.
        initialised: whether this process has initialised CUDA.

    Raises:
        ConfigurationError: this platform does not have it, or forking would break CUDA in the ranks.
    """
    there_are = multiprocessing.get_all_start_methods()
    method = start_method_of(request)
    if method == "auto":
        forkable = choice.accelerator == "cpu" and "fork" in there_are and not initialised()
        return "fork" if forkable else "spawn"
    if method not in there_are:
        raise ConfigurationError(f"start_method={method!r} does not exist here; there are {', '.join(there_are)}.")
    if method == "fork":
        check_ready('launch(start_method="fork")', initialised)
    return method


def _threads_of_fork(count: int) -> int | None:
    """The CPU threads of a forked rank; None where OMP_NUM_THREADS has set them.

    Where this process has computed with several threads, a child would wait for them for ever; one thread is safe.
    """
    tasks = Path("/proc/self/task")
    if torch.get_num_threads() > 1 and (not tasks.exists() or len(list(tasks.iterdir())) > 1):
        return 1
    return None if "OMP_NUM_THREADS" in os.environ else threads_each(count)


def _raise_cause(outcome: Outcome) -> NoReturn:
    if outcome.failure is not None:
        raise exception_of(outcome.failure)
    if outcome.failed_rank is None:
        raise LaunchError("another node has ended the job, and says why.")
    text = f"rank {outcome.failed_rank} {how_it_ended(outcome)}"
    raise LaunchError(f"{text}; it left no exception.") from LaunchError("\n".join(filter(None, (text, outcome.stack))))
