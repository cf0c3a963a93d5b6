"""Folders in Hugging Face's layout: one file, or shards and the index that says which tensor is in which."""

import contextlib
from pathlib import Path
from typing import Any

from fabricfn.checkpoint.foreign.hub_indexes import inside, weight_map
from fabricfn.checkpoint.foreign.kinds import is_safetensors
from fabricfn.checkpoint.foreign.safetensors_files import opened_safetensors
from fabricfn.checkpoint.foreign.torch_files import opened_torch
from fabricfn.errors import CheckpointError


def opened_file(path: Path, stack: contextlib.ExitStack, name: str = "") -> Any:
    """The tree of one file, PyTorch's or safetensors'."""
    if is_safetensors(path, name):
        return opened_safetensors(path, stack)
    return opened_torch(path)


def opened_index(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Name -> tensor of all shards that an index names.

    Raises:
        CheckpointError: the index is damaged or names a file that is none of the folder's; a shard is missing or lacks
            a tensor.
    """
    placed = weight_map(path)
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
