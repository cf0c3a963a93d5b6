"""A script that calls `launch` without `if __name__ == "__main__":`, found out by the ranks that import it."""

import multiprocessing
import os
from pathlib import Path

from fabricfn.environments.workers import FOLDER
from fabricfn.errors import ConfigurationError

FOUND = "unguarded"
"""The file by which a rank tells its parent."""
LAW = (
    "launch is called while the script is imported, and every spawned rank imports it, so it would never end."
    ' Put the call under: if __name__ == "__main__": (or write start_method="fork").'
)


def refuse_imports() -> None:
    """Where a rank, or the fork server that makes ranks, imports the user's script: it must not come to `launch`.

    Raises:
        ConfigurationError: it does, in a process that somebody else has spawned.
        SystemExit: it does, in a rank; the parent tells it, once.
    """
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        return
    folder = os.environ.get(FOLDER)
    if folder is None:
        raise ConfigurationError(LAW)
    Path(folder, FOUND).touch()
    raise SystemExit(1)


def check_guarded(folder: Path) -> None:
    """Raise `ConfigurationError` when a rank of this folder came to `launch` while it imported the script."""
    if (folder / FOUND).exists():
        raise ConfigurationError(LAW) from None
