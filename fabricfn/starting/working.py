"""What a rank of `launch` does. It imports nothing that only its parent needs: a spawned rank pays for every import."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from fabricfn.environments import find
from fabricfn.environments.workers import FOLDER, STARTED_BY
from fabricfn.errands import finish_all
from fabricfn.failures import record
from fabricfn.starting.cargo import Call, unpack, write_result
from fabricfn.starting.joining import join, say_goodbye, shutdown
from fabricfn.starting.parents import attend
from fabricfn.starting.request import choice_of
from fabricfn.starting.words import leave_word


def run_rank(cargo: Call | bytes, folder: str, threads: int | None) -> None:
    """The life of one rank.

    Args:
        cargo: what to call.
        folder: that of the job, on this node.
        threads: how many CPU threads it computes with; None where they are set.
    """
    # A fork server gives its children the environment in which it was started, perhaps by an earlier launch.
    os.environ |= {STARTED_BY: "launch", FOLDER: folder}
    # A session of its own, so that the parent can end what the rank starts; Ctrl-C comes through the parent.
    with contextlib.suppress(PermissionError):
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    topology = find(os.environ)
    attend(topology)
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        fn, args, request = unpack(cargo)
        rt = join(request, topology, choice_of(request))
        result = fn(rt, *args)
        write_result(Path(topology.folder or ".") / f"rank-{topology.rank}.result", result, topology.rank)
        shutdown(rt)
    except BaseException as error:
        say_goodbye(error)
        leave_word(topology, record(error, topology.rank))
        finish_all()  # a save goes on to its end, after an error too
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    """End this process at once: to destroy the group could wait for a rank that hangs, and finalisation could abort."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    code = error.code if isinstance(error, SystemExit) else 1
    os._exit(code if isinstance(code, int) and code else 1)
