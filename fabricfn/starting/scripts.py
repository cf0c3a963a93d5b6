"""Running the program of this process again, once for each rank, and telling clearly how that ended."""

import atexit
import builtins
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import SignalException

from fabricfn.environments import Topology
from fabricfn.starting.agent import run_workers
from fabricfn.starting.parents import attend
from fabricfn.starting.request import Request
from fabricfn.starting.surroundings import check_ready
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


def command(orig_argv: Sequence[str], script: str | None) -> list[str]:
    """The arguments of Python that run this program again: flags, `-m` or the file, and the user's arguments.

    Args:
        orig_argv: `sys.orig_argv`.
        script: the absolute path of the file that runs; None under `-m` and `-c`. It stands in for a relative one
            that cannot be found any more because the program has changed its folder.

    Example:
        >>> command(["python", "-X", "dev", "train.py", "--lr", "1"], "/home/me/train.py")
        ['-X', 'dev', '/home/me/train.py', '--lr', '1']
    """
    arguments = list(orig_argv[1:])
    if script is not None:
        same = (at for at, word in enumerate(arguments) if os.path.basename(word) == os.path.basename(script))
        at = next(same, None)
        if at is not None and not os.path.exists(arguments[at]):
            arguments[at] = script
    return arguments


def run_again(request: Request, count: int) -> NoReturn:
    """Run this program once for each rank of this node, and end this process as they ended. Never returns."""
    check_ready("init_runtime")
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None) if getattr(main, "__spec__", None) is None else None
    folder = Path(tempfile.mkdtemp(prefix="fabricfn-"))
    try:
        arguments = tuple(command(sys.orig_argv, script))
        outcome = run_workers(
            sys.executable, arguments, request=request, count=count, folder=folder, started_by="script", aloud=True
        )
        # as a shell counts them
        status = 0 if not outcome.failed else 128 - outcome.status if outcome.status < 0 else outcome.status or 1
    except (SignalException, KeyboardInterrupt) as error:
        number = error.sigval if isinstance(error, SignalException) else signal.SIGINT
        print(f"fabricfn: stopped by {number.name}; no rank is left", file=sys.stderr)
        status = 128 + number
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    # SystemExit would run the caller's `finally` blocks, in which the runtime does not exist.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def attend_script(topology: Topology) -> None:
    """In a rank of a script that runs again: end with the parent, and tell it of an exception that nobody catches."""
    attend(topology)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tell_uncaught(topology)
