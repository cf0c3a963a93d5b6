"""What a worker leaves for its parent to read, and how it ends when it can do nothing else."""

import os
import pickle
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fabricfn.environments import Topology
from fabricfn.errors import FabricfnError, LeftError
from fabricfn.failures import Failure, record


def leave_word(topology: Topology, failure: Failure) -> None:
    """In a worker: tell the parent what happened; only the first failure of a rank counts."""
    path = Path(topology.folder or ".") / f"rank-{topology.rank}.failure"
    if not path.exists():
        draft = path.with_suffix(".draft")
        draft.write_bytes(pickle.dumps(failure))
        draft.rename(path)


def tell_uncaught(topology: Topology) -> None:
    """In a rank: an exception that nobody catches is told by the parent that started it, which knows who was the first.

    Under another launcher this rank tells it: whose it is in the first line, the traceback only where it is its own.
    A hook of the user's that was there before is called, too.
    """
    before = sys.excepthook
    if before.__module__ == __name__:  # of an earlier runtime of this process
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failure = record(error, topology.rank)
        parent_tells = topology.name == "script" and told(topology, failure)
        if not parent_tells:
            own = "" if failure.consequence and not isinstance(error, LeftError) else f"\n{failure.text}"
            print(f"fabricfn: rank {topology.rank} {failure.summary}{own}", file=sys.stderr, flush=True)
        if topology.name == "torchrun" and not failure.consequence and isinstance(error, Exception):
            try:
                raise error  # its traceback is taken where it is handled
            except Exception:
                get_error_handler().record_exception(error)  # for the summary of torchrun
        if before is not sys.__excepthook__:
            before(kind, error, trace)

    sys.excepthook = hook


def told(topology: Topology, failure: Failure) -> bool:
    """Whether the parent could be told."""
    try:
        leave_word(topology, failure)
    except OSError:  # it is gone, and its folder with it; or the disk is full
        return False
    return True


def give_up(topology: Topology, error: FabricfnError) -> NoReturn:
    """End this rank, whose main thread waits in vain inside a library, with the reason."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = "".join(traceback.format_stack(frame)) if frame is not None else ""
    error.add_note(f"This rank could only be ended. It waited at\n{waits}")
    failure = record(error, topology.rank)
    if topology.folder is not None:
        leave_word(topology, failure)
    if topology.name not in ("launch", "script"):  # whose parent tells it
        print(failure.text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
