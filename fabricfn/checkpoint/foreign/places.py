"""What stands at a path, and its tree."""

import contextlib
import os
from pathlib import Path
from typing import Any

from fabricfn.checkpoint.foreign.dcp import opened_dcp
from fabricfn.checkpoint.foreign.deepspeed import opened_deepspeed
from fabricfn.checkpoint.foreign.deepspeed_files import tagged
from fabricfn.checkpoint.foreign.hub_folders import opened_file, opened_index
from fabricfn.checkpoint.foreign.hub_indexes import inside
from fabricfn.checkpoint.foreign.kinds import INDEXES, METADATA, SINGLES
from fabricfn.checkpoint.format.manifest import MANIFEST
from fabricfn.errors import CheckpointError


def opened_raw(path: Path, stack: contextlib.ExitStack) -> Any:
    """The tree of a file or folder that another tool wrote; files stay open as long as `stack`.

    Raises:
        CheckpointError: there is nothing, nothing that is known, or it is damaged.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return opened_index(path, stack)
        return opened_file(path, stack)
    if not path.is_dir():
        raise CheckpointError(f"there is no file or folder {path}.")
    if (path / METADATA).exists():
        return opened_dcp(path, stack)
    if (path / MANIFEST).exists():
        raise CheckpointError(f"{path} was written by ff.save. Write ff.load(rt, {str(path)!r}, like).")
    for name in INDEXES:
        if os.path.lexists(path / name):
            return opened_index(path / name, stack)
    for name in SINGLES:
        if os.path.lexists(path / name):
            return opened_file(inside(path, name), stack, name)
    tag = tagged(path)
    if tag is not None:
        return opened_deepspeed(tag)
    there = sorted(found.name for found in path.iterdir())
    raise CheckpointError(
        f"{path} holds no checkpoint that is known: {', '.join((*INDEXES, *SINGLES, METADATA))}, or a file that you"
        f" name. There is {', '.join(there[:8]) or 'nothing'}."
    )
