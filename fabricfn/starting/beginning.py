"""`init_runtime` and `runtime`: the first line of a training script."""

import contextlib
import os
from collections.abc import Generator, Sequence
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal

from fabricfn.accelerators import Choice, choose
from fabricfn.environments import Topology, find
from fabricfn.errors import ConfigurationError
from fabricfn.interrupts import STOP_SIGNALS
from fabricfn.loggers.logger import Logger
from fabricfn.precision import Precision
from fabricfn.runtimes import Runtime
from fabricfn.starting.commanded import with_command_line
from fabricfn.starting.joining import join, place, until_shutdown
from fabricfn.starting.request import Request, check_own_start, choice_of, most_ranks, request_from
from fabricfn.starting.scripts import attend_script, why_no_script
from fabricfn.strategy import Strategy


def init_runtime(
    *,
    accelerator: str = "auto",
    devices: int | str | Sequence[int] | None = "auto",
    strategy: str | Strategy = "auto",
    num_nodes: int | str = 1,
    precision: str | int | Precision = "32-true",
    environment: str | Topology | None = None,
    loggers: Logger | Sequence[Logger] = (),
    callbacks: Any = (),
    seed: int | None = None,
    timeout: float | timedelta = 1800.0,
    debug: bool = False,
    stop_signals: Sequence[str | int] = STOP_SIGNALS,
    grace: float = 30.0,
    backend: str | None = None,
    node_rank: int | None = None,
    main_address: str | None = None,
    main_port: int | None = None,
    rendezvous: str = "auto",
    max_restarts: int = 0,
    start_method: str = "auto",
    spawn: Literal["script", "never"] = "script",
) -> Runtime:
    """The place and the manner in which this process computes; every rank calls it with the same arguments.

    Laws:

    * Under a launcher (torchrun, srun, mpirun, jsrun, submitit, Ray, `launch`) it joins the processes that exist. What
      was omitted or is "auto" is left to the launcher; anything else that differs from it is an error that names both.
    * What is at its default is set by the options of `fabricfn run`; anything else that differs from them is an error.
    * Without one, a script that asks for several ranks is run again, once for each, with the same Python flags and
      arguments; this process waits and exits as they did, so it never returns. On one node nothing listens beyond the
      loopback interface. OMP_NUM_THREADS becomes cores / ranks when unset.
    * Outside a script (notebook, interactive Python, test) "auto" devices are one device, and more are an error:
      there `launch` starts ranks.
    * A second call in the same process gives a second runtime, of another precision for instance, in the same group.

    Args:
        accelerator: "auto" (the first of tpu, cuda, mps, cpu that exists), "cpu", "gpu" (cuda, else mps), "cuda",
            "mps", "tpu", "xla" (what torch_xla computes on: docs/strategies.md), or the name of another
            `torch.accelerator` back end.
        devices: per node: a number; a list of indices, also as "1, 4" (not on CPU); "auto", -1 or "-1" for all (on CPU
            one process); None or 0 for the CPU.
        strategy: "auto" (single for one rank, else ddp), "single", "dp", "ddp", "fsdp", "functional", another name
            (docs/strategies.md), a `Strategy` record, or "package.module:factory".
        num_nodes: the number of machines; or a range, "1:4": the job runs while so many are there, and when one comes
            or goes it begins a new attempt with those that are there (to go on from the last checkpoint).
        precision: "32-true", "64-true", "bf16-true", "bf16-mixed", "16-true", "16-mixed" (not on CPU), an alias or a
            record, as `Precision.parse` takes.
        environment: the launcher, if it is not to be found out: "workers", "torchrun", "submitit", "slurm",
            "lsf", "mpi", "kubeflow", "single" (which ignores any), or a `fabricfn.environments.Topology` of your own.
        loggers: where `log` writes: one of `ff.loggers`, or several. What they hold back is written by `shutdown`, and
            when Python ends.
        callbacks: whose hooks `call` calls: any object, or a list or tuple of them.
        seed: any integer, `rt.seed`; None is 0. Global generators are left alone.
        timeout: how long a collective waits for the other ranks, in seconds or as a timedelta; then it is a `HangError`
            that names the rank which does not come, and the line where that one stands. Half an hour.
        debug: compare everything that travels between ranks before it does (kind of call, dtypes, shapes, reduction),
            what DDP, FSDP and calls of `torch.distributed` send included; and every 100 steps the ranks' replicas.
            Small collectives take about twice as long: docs/failures.md.
        stop_signals: names or numbers of the signals that `should_stop` answers; () for none. Handlers are installed in
            the main thread alone, until `shutdown`; before the first call of `should_stop` they change nothing.
        grace: where this process starts the ranks: how many seconds they may go on after it got SIGTERM, to save.
        backend: of torch.distributed; None is gloo for CPU tensors and the device's own for its tensors.
        node_rank: which machine this is, 0 .. num_nodes - 1; needed without a launcher when num_nodes > 1, unless the
            rendezvous gives the machines their ranks.
        main_address: the host name of the machine with node_rank 0, or where the rendezvous is held; likewise. It
            replaces what a rule gave (SLURM's first node), and must agree with what a launcher said.
        main_port: its port; 29500 when omitted and nobody says otherwise.
        rendezvous: how several nodes meet where no launcher started them: "static" (each knows its rank), "c10d" or
            another back end of torch's elastic agent; "auto" is static for a number of nodes, c10d for a range.
        max_restarts: how often all ranks are started again after one failed; on a range of nodes each of them counts
            what it had to restart itself, and a node that joins costs nothing.
        start_method: used by `launch`.
        spawn: "script" as above; "never" makes it an error to need other processes.

    Returns:
        The runtime of this rank.

    Raises:
        ConfigurationError: an argument has no meaning here or contradicts the launcher; CUDA is initialised in the
            process that would start the ranks.

    Example:
        >>> import fabricfn as ff
        >>> ff.init_runtime(accelerator="cpu")
        Runtime(rank 0 of 1 on cpu, single, float32, seed 0)
    """
    request = Request(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        num_nodes=num_nodes,
        precision=precision,
        environment=environment,
        loggers=loggers,
        callbacks=callbacks,
        seed=seed,
        timeout=timeout,
        debug=debug,
        stop_signals=stop_signals,
        grace=grace,
        backend=backend,
        node_rank=node_rank,
        main_address=main_address,
        main_port=main_port,
        rendezvous=rendezvous,
        max_restarts=max_restarts,
        start_method=start_method,
        spawn=spawn,
    )
    request = with_command_line(request)
    choice = choice_of(request)
    topology = place(find(os.environ, request.environment))
    if topology.name == "script":
        attend_script(topology)
    if topology.name == "single":
        choice = _start_ranks(request, choice)
    return join(request, topology, choice)


def _start_ranks(request: Request, choice: Choice) -> Choice:
    """Without a launcher: the choice when one rank is asked for; else the script runs again, and this never returns."""
    count, ranks = len(choice.indices), most_ranks(request, choice)
    if ranks == 1:
        return choice
    outside = why_no_script()
    if outside is not None and choice.open and ranks == count and request.devices not in (-1, "-1"):
        return choose(choice.accelerator, 1, {choice.accelerator: count, "cpu": 1})
    wish = f"devices={request.devices!r}" + f", num_nodes={request.num_nodes!r}" * (ranks > count)
    if outside is not None:
        raise ConfigurationError(
            f"{wish} asks for {ranks} ranks, but this is {outside}, which cannot be run again for"
            f" each of them. Write ff.launch(fn, devices={request.devices!r}), where fn(rt) does the work."
        )
    if request.spawn == "never":
        raise ConfigurationError(
            f'{wish} asks for {ranks} ranks, but spawn="never" and no launcher started them. Start'
            f' with: torchrun --nproc-per-node={count} train.py, or write spawn="script".'
        )
    check_own_start(request, choice)
    again: Any = import_module("fabricfn.starting.again")  # not at the top: torch's agent takes long to import
    return again.run_again(request, count)


@contextlib.contextmanager
def runtime(**options: Any) -> Generator[Runtime]:
    """`init_runtime(**options)` for a block; `shutdown` at its end, after an error too.

    Every rank must enter it.

    Args:
        options: those of `init_runtime`.

    Returns:
        A context manager that gives the `Runtime`.

    Raises:
        ConfigurationError: as `init_runtime`.

    Example:
        >>> import fabricfn as ff
        >>> with ff.runtime(accelerator="cpu", precision="bf16-mixed") as rt:
        ...     rt.device
        device(type='cpu')
    """
    request_from(options)
    with until_shutdown(init_runtime(**options)) as rt:
        yield rt
