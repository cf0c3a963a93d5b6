"""What a worker leaves for its parent to read, and how it ends when it can do nothing else."""

import os
import pickle
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from fabricfn.environments import Topology
from fabricfn.errors import FabricfnError
from fabricfn.failures import Failure, record


def leave_word(topology: Topology, failure: Failure) -> None:
    """In a worker: tell the parent what happened; only the first failure of a rank counts."""
    path = Path(topology.folder or ".") / f"rank-{topology.rank}.failure"
    if not path.exists():
        draft = path.with_suffix(".draft")
        draft.write_bytes(pickle.dumps(failure))
        draft.rename(path)


def give_up(topology: Topology, error: FabricfnError) -> NoReturn:
    """End this rank, whose main thread waits in vain inside a library, with the reason."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits = "".join(traceback.format_stack(frame)) if frame is not None else ""
    error.add_note(f"This rank could only be ended. It waited at\n{waits}")
    failure = record(error, topology.rank)
    if topology.folder is not None:
        leave_word(topology, failure)
    if topology.name != "launch":  # whose parent raises it
        print(failure.text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
