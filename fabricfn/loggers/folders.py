"""The folder of a run: `folder/name/version_N`, with a number that no other run has."""

import dataclasses
import os
import re
from pathlib import Path

VERSION = re.compile(r"version_(\d{1,9})")


@dataclasses.dataclass(slots=True, kw_only=True)
class RunFolder:
    """Where one run writes. Nothing is made, and no number taken, before `open_folder`."""

    folder: str
    name: str
    version: int | str | None
    path: Path | None = None
    """The folder, once it is there."""


def run_folder(folder: str | os.PathLike[str], name: str, version: int | str | None) -> RunFolder:
    """The folder of a run; `~` is expanded."""
    return RunFolder(folder=os.path.expanduser(os.fspath(folder)), name=name, version=version)


def open_folder(run: RunFolder) -> Path:
    """Make the folder. With no version given it is a new one, also when two runs begin at once."""
    if run.path is not None:
        return run.path
    parent = Path(run.folder, run.name)
    parent.mkdir(parents=True, exist_ok=True)
    if run.version is not None:
        run.path = parent / (f"version_{run.version}" if isinstance(run.version, int) else run.version)
        run.path.mkdir(parents=True, exist_ok=True)
        return run.path
    taken = (VERSION.fullmatch(entry.name) for entry in parent.iterdir())
    number = max((int(found[1]) for found in taken if found), default=-1)
    while run.path is None:
        number += 1
        try:
            (parent / f"version_{number}").mkdir()
        except FileExistsError:  # by another run, meanwhile
            continue
        run.path = parent / f"version_{number}"
    return run.path
