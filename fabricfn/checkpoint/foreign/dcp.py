"""Folders of torch.distributed.checkpoint: FSDP2 and DTensor saves of any number of ranks, and Fabric's sharded ones.

Each entry is a torch.save of one rank's block; it is read by `weights_only=True` once somebody wants a part of it.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fabricfn.checkpoint.foreign.dcp_metadata import Chunk, Item, items_of
from fabricfn.checkpoint.foreign.kinds import METADATA
from fabricfn.checkpoint.foreign.torch_files import blob, opened_torch
from fabricfn.checkpoint.foreign.values import Later, Stored, read
from fabricfn.checkpoint.format.boxes import common, within
from fabricfn.checkpoint.storage.opening import READ, read_at
from fabricfn.checkpoint.trees.placements import Part, narrowed, view_of
from fabricfn.errors import CheckpointError

META = "meta.pt"
"""What Fabric's sharding strategies put beside it: everything that is no model and no optimizer."""


def opened_dcp(folder: Path, stack: contextlib.ExitStack) -> dict[Any, Any]:
    """The tree that was saved; where Fabric saved it, with the entries of its `meta.pt`.

    Raises:
        CheckpointError: a file is missing, cut off or damaged, or names classes; the message names it.
    """
    tree: dict[Any, Any] = {}
    fds: dict[str, tuple[int, int]] = {}
    for item in items_of(folder):
        for chunk in item.chunks:
            if chunk.file not in fds:
                fds[chunk.file] = _opened(folder / chunk.file, stack)
            if chunk.offset + chunk.length > fds[chunk.file][1]:
                raise CheckpointError(
                    f"{folder / chunk.file} has {fds[chunk.file][1]:,} bytes, {METADATA} wants"
                    f" {chunk.offset + chunk.length:,}: it is cut off or of another save."
                )
        _put(tree, item.keys, _value(folder, item, fds), folder)
    tree = _lists(tree)
    if (folder / META).exists():
        _opened(folder / META, stack)
        # what no class can be read from matters only to whoever wants an entry of it
        tree = _Beside(tree, folder / META)
    return tree


class _Beside(dict[Any, Any]):
    """The tree, whose further entries come from `meta.pt`, which is opened when one of them is asked for."""

    def __init__(self, tree: dict[Any, Any], path: Path) -> None:
        super().__init__(tree)
        self.path = path


def whole_tree(tree: Any) -> Any:
    """The tree with the entries of `meta.pt`, if there are any."""
    if not isinstance(tree, _Beside):
        return tree
    found: Any = opened_torch(tree.path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{tree.path} holds no dict; Fabric's has one entry for each thing that is no module.")
    return {**cast("dict[Any, Any]", found), **tree}


def has_more(tree: Any) -> bool:
    """Whether some entries are still in `meta.pt`."""
    return isinstance(tree, _Beside)


def _opened(path: Path, stack: contextlib.ExitStack) -> tuple[int, int]:
    try:
        fd = os.open(path, READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not whole: {path.name} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error}); it must be a plain file, no link.") from None
    stack.callback(os.close, fd)
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(f"{path} is not a plain file.")
    return fd, facts.st_size


def _put(tree: dict[Any, Any], keys: Sequence[str | int], value: Any, folder: Path) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if type(tree) is not dict:
            raise CheckpointError(f"{folder / METADATA} has an entry inside of another one, at {keys!r:.80}.")
    if keys[-1] in tree:
        raise CheckpointError(f"{folder / METADATA} has two entries at one place, {keys!r:.80}.")
    tree[keys[-1]] = value


def _lists(tree: Any) -> Any:
    """Dicts whose keys are the integers from 0 are the lists that were saved."""
    if type(tree) is not dict:
        return tree
    made = {key: _lists(item) for key, item in cast("dict[Any, Any]", tree).items()}
    if made and all(type(key) is int for key in made) and sorted(made) == list(range(len(made))):
        return [made[index] for index in range(len(made))]
    return made


def _value(folder: Path, item: Item, fds: dict[str, tuple[int, int]]) -> Stored | Later:
    name = "/".join(map(str, item.keys))

    def unpickled(chunk: Chunk) -> Any:
        where = f"{folder / chunk.file}, the entry {name!r},"
        return blob(read_at(fds[chunk.file][0], chunk.length, chunk.offset), where, folder / chunk.file)

    if item.dtype is None:
        return Later(read=lambda: unpickled(item.chunks[0]))
    dtype: torch.dtype = getattr(torch, item.dtype)

    def fill(into: torch.Tensor, parts: Sequence[Part], what: str) -> None:
        for chunk in item.chunks:
            assert chunk.box is not None
            shared = [(part, common(part.box, chunk.box)) for part in parts]
            if not any(box for _, box in shared):
                continue
            found: Any = unpickled(chunk)
            if type(found) is not Stored or found.dtype != dtype or found.shape != chunk.box.shape:
                raise CheckpointError(
                    f"{folder / chunk.file} holds something else for {what!r} than {METADATA} says: it is damaged or of"
                    " another save."
                )
            values = read(found, None, what, torch.device("cpu"))
            for part, box in shared:
                if box is not None:
                    mine = narrowed(view_of(into, part), within(box, part.box))
                    mine.copy_(narrowed(values, within(box, chunk.box)))

    file = folder / (item.chunks[0].file if item.chunks else METADATA)
    return Stored(dtype=dtype, shape=item.shape, file=file, fill=fill, at_once=True)
