"""Folders in Hugging Face's layout: one file, or shards and the index that says which tensor is in which."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, cast

from fabricfn.checkpoint.foreign.safetensors_files import opened_safetensors
from fabricfn.checkpoint.foreign.torch_files import opened_torch
from fabricfn.errors import CheckpointError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
INDEX_LIMIT = 64 << 20
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.(?:safetensors|bin|pt|pth)")


def opened_file(path: Path, stack: contextlib.ExitStack, name: str = "") -> Any:
    """The tree of one file, PyTorch's or safetensors', by its name (links lose it) or by what it begins with."""
    with path.open("rb") as file:
        begin = file.read(9)
    if (name or path.name).endswith(".safetensors") or (begin[8:] == b"{" and begin[:2] != b"PK"):
        return opened_safetensors(path, stack)
    return opened_torch(path)


def opened_index(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Name -> tensor of all shards that an index names.

    Raises:
        CheckpointError: the index is damaged or names a file that is none of the folder's; a shard is missing or lacks
            a tensor.
    """
    placed = _weight_map(path, inside(path.parent, path.name))
    shards: dict[str, Any] = {}
    for shard in dict.fromkeys(placed.values()):
        found = opened_file(inside(path.parent, shard), stack, shard)
        shards[shard] = found if isinstance(found, dict) else {}
    lacking = [f"{name} in {shard}" for name, shard in placed.items() if name not in shards[shard]]
    if lacking:
        raise CheckpointError(
            f"{path} names tensors that are not in their files: {', '.join(lacking[:5])}. The files are of different"
            " saves; fetch or write the folder again."
        )
    return {name: shards[shard][name] for name, shard in placed.items()}


def _weight_map(path: Path, file: Path) -> dict[str, str]:
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
