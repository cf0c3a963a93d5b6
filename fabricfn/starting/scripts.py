"""Whether this program can be run again for each rank, and what a rank does that was started so."""

import builtins
import multiprocessing
import os
import signal
import sys
import threading

from fabricfn.environments import Topology
from fabricfn.starting.parents import attend
from fabricfn.starting.words import tell_uncaught


def why_no_script() -> str | None:
    """Why this program cannot be run again for each rank; None when it can."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if hasattr(builtins, "__IPYTHON__"):
        return "a notebook or IPython"
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return "an interactive Python"
    if multiprocessing.parent_process() is not None:
        return "a worker process of another program"
    if "_pytest" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ:
        return "a test"
    if spec is not None and spec.name.partition(".")[0] in ("pytest", "unittest", "doctest"):
        return "a test"
    if threading.current_thread() is not threading.main_thread():
        return "a thread"
    if not hasattr(main, "__file__") and "-c" not in sys.orig_argv:
        return "a program without a file"
    return None


def attend_script(topology: Topology) -> None:
    """In a rank of a script that runs again: end with the parent, and tell it of an exception that nobody catches."""
    attend(topology)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tell_uncaught(topology)
