"""The index of a folder in Hugging Face's layout: which tensor is in which file. No torch."""

import json
import os
import re
from pathlib import Path
from typing import Any, cast

from fabricfn.errors import CheckpointError

INDEX_LIMIT = 64 << 20
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.(?:safetensors|bin|pt|pth)")


def weight_map(path: Path) -> dict[str, str]:
    """Name of a tensor -> its file, as an index of shards says.

    Raises:
        CheckpointError: the index is damaged, or names a file that is none of the folder's.
    """
    file = inside(path.parent, path.name)
    try:
        if file.stat().st_size > INDEX_LIMIT:
            raise ValueError(f"it has more than {INDEX_LIMIT:,} bytes")
        placed: Any = json.loads(file.read_bytes())["weight_map"]
        if type(placed) is not dict or not placed:
            raise ValueError('its "weight_map" names no tensor')
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no whole index of shards: {type(error).__name__}: {str(error)[:200]}."
        ) from None
    found = cast("dict[str, Any]", placed)
    for name in found.values():
        if type(name) is not str or not SHARD.fullmatch(name):
            raise CheckpointError(
                f"{path} names the file {name!r:.100}; shards lie beside their index, so a name is plain, without '/',"
                " '..' or a drive, and ends in .safetensors or .bin."
            )
    return found


def inside(folder: Path, name: str) -> Path:
    """A file of the folder; a link is followed where it stays in the folder, or in the cache of the hub that it is in.

    Raises:
        CheckpointError: it is missing, no plain file, or a link that leads elsewhere.
    """
    home = Path(os.path.realpath(folder))
    found = Path(os.path.realpath(home / name))
    # <repository>/snapshots/<revision>/<name> -> ../../blobs/<digest>
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if found.parent not in (home, blobs):
        raise CheckpointError(f"{folder / name} is a link that leads out of the folder, to {found}. Copy the file.")
    if not found.is_file():
        raise CheckpointError(f"{folder / name} is missing, or is not a plain file.")
    return found
