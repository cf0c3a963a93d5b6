"""Running the program of this process again, once for each rank, and telling clearly how that ended."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed.elastic.multiprocessing import SignalException

from fabricfn.starting.agent import run_workers
from fabricfn.starting.request import Request
from fabricfn.starting.surroundings import check_ready


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
