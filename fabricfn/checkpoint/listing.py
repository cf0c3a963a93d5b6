"""What is there: the checkpoints of a folder, the newest whole one, and what one contains. Imports no torch."""

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fabricfn.checkpoint.format.manifest import ARRAYS, Piece, array_bytes, path_text, paths_of, plain_value
from fabricfn.checkpoint.format.pieces import PieceReader, Source
from fabricfn.checkpoint.storage.objects import Options, at_once
from fabricfn.checkpoint.storage.opening import opened
from fabricfn.checkpoint.storage.shelves import Shelf, in_order, shelf_at
from fabricfn.errors import CheckpointError


def plain_text(value: Any) -> str:
    """A plain value as messages have it; Python writes no longer integers out."""
    return hex(value) if type(value) is int and value.bit_length() > 4096 else repr(value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One leaf of a checkpoint."""

    path: str
    """Where it is in the tree: "model/params/0.weight"."""
    kind: str
    """ "tensor", "array", "number" (of numpy), or the type of a plain value."""
    dtype: str
    """ "float32", ...; empty for a plain value."""
    shape: tuple[int, ...]
    bytes: int
    """What it takes in the data files; 0 for a plain value, and for an array that is stored at another entry."""
    value: Any
    """A plain value; None for an array."""

    def __str__(self) -> str:
        if self.kind not in ARRAYS:
            return f"{self.path} = {plain_text(self.value)}"
        return f"{self.path}: {self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a checkpoint contains. `print` shows it as a table."""

    path: Path | str
    """A string for a URL."""
    save_id: str
    """32 hexadecimal digits that no other save has."""
    created: datetime
    """When it was committed, in UTC."""
    world_size: int
    """How many ranks wrote it."""
    strategy: str
    """The strategy that they used."""
    bytes: int
    """The size of all files together."""
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        head = f"{self.path}: {self.bytes:,} bytes, {len(self.entries)} entries, saved {self.created:%Y-%m-%d %H:%M:%S}"
        by = f"by {self.world_size} rank{'s' if self.world_size > 1 else ''} ({self.strategy})"
        return "\n".join([f"{head} UTC {by}", *(f"  {entry}" for entry in self.entries)])


def inspect_checkpoint(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Summary:
    """What a checkpoint contains, from its manifest; its arrays are not read. Not collective, imports no torch.

    Args:
        path: the checkpoint's folder, or its URL.
        storage_options: arguments of fsspec's file system for a URL.

    Returns:
        A `Summary`: when and by how many ranks it was saved, its size in bytes, and an `Entry` for each leaf; `print`
        shows it as a table.

    Raises:
        CheckpointError: there is no checkpoint, or its manifest, a file's size or a file's header is damaged.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     receipt = ff.save(rt, folder + "/last", {"w": torch.ones(2), "epoch": 3})
        ...     summary = ff.inspect_checkpoint(receipt.path)
        >>> for entry in summary.entries:
        ...     print(entry)
        w: float32[2]
        epoch = 3
    """
    with opened(path, options=storage_options) as source:
        return _summary(source)


def _summary(source: Source) -> Summary:
    manifest = source.manifest
    entries: list[Entry] = []
    for index, place in paths_of(manifest.tree).items():
        leaf = manifest.leaves[index]
        plain = leaf.kind not in ARRAYS
        stored = not plain and leaf.alias is None
        entries.append(
            Entry(
                path=path_text(place),
                kind=leaf.kind,
                dtype=leaf.dtype,
                shape=leaf.shape,
                bytes=array_bytes(leaf.dtype, leaf.shape) if stored else 0,
                value=plain_value(leaf) if plain else None,
            )
        )
    return Summary(
        path=source.path,
        save_id=manifest.save_id,
        created=datetime.fromtimestamp(manifest.created, UTC),
        world_size=manifest.world_size,
        strategy=manifest.strategy,
        bytes=source.size,
        entries=tuple(entries),
    )


def verify_checkpoint(path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Summary:
    """Read every byte of a checkpoint and check it. Not collective, imports no torch.

    It needs 4 MiB of memory; at a URL, where it waits for 16 requests at once, up to 256 MiB.

    Args:
        path: the checkpoint's folder, or its URL.
        storage_options: arguments of fsspec's file system for a URL.

    Returns:
        What it contains, as `inspect_checkpoint` does.

    Raises:
        CheckpointError: something is missing or damaged; the message names every damaged entry and its file.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     receipt = ff.save(rt, folder + "/last", {"w": torch.ones(2), "epoch": 3})
        ...     summary = ff.verify_checkpoint(receipt.path)
        >>> len(summary.entries), summary.world_size
        (2, 1)
    """
    with opened(path, options=storage_options) as source:
        summary = _summary(source)
        pieces = [
            (piece, path_text(place))
            for index, place in paths_of(source.manifest.tree).items()
            for piece in source.manifest.leaves[index].pieces
        ]

        def check(item: tuple[Piece, str]) -> str | None:
            try:
                PieceReader(source, *item).check()
            except CheckpointError as error:
                return str(error)
            return None

        found = at_once(check, pieces) if source.remote else list(map(check, pieces))
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise CheckpointError("\n".join(problems[:20]))
    return summary


def _candidates(shelf: Shelf) -> Sequence[str]:
    """The names of what may be a checkpoint, oldest first: by the numbers in a name, left to right, then by time."""
    return in_order(shelf, lambda name: [int(digits) for digits in re.findall(r"\d{1,4000}", name)])


def list_checkpoints(
    folder: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> list[Path | str]:
    """The whole checkpoints in a folder, oldest first: by the numbers in their names, then by time.

    Manifests, file sizes and file headers are checked, the arrays are not read (`verify_checkpoint` does). A folder
    that does not exist has none. Not collective, imports no torch.

    Args:
        folder: the folder that holds checkpoints, or its URL.
        storage_options: arguments of fsspec's file system for a URL.

    Returns:
        Their paths, strings for URLs; on every rank what that rank sees on its own disk.

    Raises:
        CheckpointError: the store of a URL does not answer.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     for step in (2, 10):
        ...         receipt = ff.save(rt, f"{folder}/step-{step}", {"w": torch.ones(2)})
        ...     [path.name for path in ff.list_checkpoints(folder)]
        ['step-2', 'step-10']
    """
    shelf = shelf_at(folder, storage_options)
    places = map(shelf.place, _candidates(shelf))
    return [place for place in places if _trouble(place, storage_options) is None]


def latest(folder: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Path | str | None:
    """The newest whole checkpoint in a folder, by the numbers in its name, then by time. Not collective.

    A newer one that is unfinished or damaged is passed over with a warning that says why.

    Args:
        folder: the folder that holds checkpoints, or its URL; of a folder that is one itself, take the parent.
        storage_options: arguments of fsspec's file system for a URL.

    Raises:
        CheckpointError: the folder is a checkpoint itself, or the store of a URL does not answer.

    Returns:
        Its path, a string for a URL, or None when there is none:
        `if path := ff.latest(folder): state = ff.load(rt, path, state)`.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     for step in (2, 10):
        ...         receipt = ff.save(rt, f"{folder}/step-{step}", {"w": torch.ones(2)})
        ...     ff.latest(folder).name
        'step-10'
    """
    shelf = shelf_at(folder, storage_options)
    if shelf.is_checkpoint():
        raise CheckpointError(
            f"{os.fspath(folder)} is a checkpoint itself: pass it to ff.load, or the folder that holds it to ff.latest."
        )
    passed: list[str] = []
    for name in reversed(_candidates(shelf)):
        place = shelf.place(name)
        trouble = _trouble(place, storage_options)
        if trouble is None:
            if passed:
                warnings.warn(f"ff.latest falls back to {place}. {' '.join(passed)}", stacklevel=2)
            return place
        if shelf.begun(name):
            passed.append(trouble)
    if passed:
        warnings.warn(f"ff.latest finds no whole checkpoint in {os.fspath(folder)}. {' '.join(passed)}", stacklevel=2)
    return None


def _trouble(place: Path | str, options: Options) -> str | None:
    """Why a folder is no whole checkpoint; None when it is one."""
    try:
        with opened(place, say=False, options=options):
            return None
    except CheckpointError as error:
        return str(error)
