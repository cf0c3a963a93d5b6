"""One save, in two halves: what all ranks agree on (`planned`), and the writing of it up to the rename (`carried_out`).

The first half reads the tree; the second one only what the first found, so that it may run beside the training.
"""

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.differences import digest, raise_mismatch
from fabricfn.checkpoint.format.manifest import Leaf, Manifest, Node, Piece, array_bytes
from fabricfn.checkpoint.format.writing import Entry, header
from fabricfn.checkpoint.meters import Progress, meter, told
from fabricfn.checkpoint.sharing import (
    Chore,
    Draft,
    agreed_leaves,
    drafted,
    from_plain,
    held,
    owners_of,
    shares,
    to_plain,
)
from fabricfn.checkpoint.storage.store import Store
from fabricfn.checkpoint.stores import store_at
from fabricfn.checkpoint.trees.arrays import chunks
from fabricfn.checkpoint.trees.custom import CheckpointType
from fabricfn.checkpoint.trees.outline import Only
from fabricfn.checkpoint.trees.riding import stated
from fabricfn.errors import ConfigurationError
from fabricfn.runtimes import Runtime
from fabricfn.world import World


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a save did. The same on all ranks."""

    path: Path | str
    """The folder that is the checkpoint; a string for a URL."""
    save_id: str
    """32 hexadecimal digits that no other save has."""
    bytes: int
    """The size of all files together."""
    rank_bytes: tuple[int, ...]
    """The size of each rank's data file; 0 for a rank that had nothing to write."""
    seconds: float
    """From the call to the commit, on rank 0."""
    seconds_stalled: float
    """For how long `save` held up its caller, on the rank where that took longest."""
    seconds_writing: float
    """Writing and flushing a rank's data file, on the rank where that took longest."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A save that all ranks have agreed on."""

    what: str
    """Begins the messages of errors."""
    store: Store
    save_id: str
    strategy: str
    tree: Node | int
    leaves: tuple[Leaf, ...]
    """Without pieces."""
    chores: Sequence[Sequence[Chore]]
    """What each rank writes."""
    arrays: Sequence[Any]
    """This rank's values, one for each of its chores."""
    export: str | None
    """The other layout that shall stand beside it."""
    clear: Callable[[], None]
    """Removes what a save leaves that came to no end; on rank 0, nothing elsewhere."""


def planned(
    rt: Runtime,
    path: str | os.PathLike[str],
    tree: Any,
    only: Only,
    types: Sequence[CheckpointType] = (),
    export: str | None = None,
    options: Mapping[str, Any] | None = None,
    earlier: BaseException | None = None,
    blocking: bool = True,
) -> Job:
    """What `save` shall do; rank 0 has a place for it. Collective; see `save` for the arguments and errors.

    Args:
        earlier: the error of the save before, of which nobody on this rank has been told.
        blocking: as the call has it, which is the same on all ranks.
    """
    world, what = rt.world, f"ff.save to {path!s:.300}"
    if earlier is not None:
        together(world, what, lambda: _raise(earlier))
    store = store_at(path, options)
    call = {"the path": store.name, "export=": repr(export), "blocking=": repr(blocking)}
    undo = contextlib.ExitStack()
    plan = stated(world, what, tree, only, types)

    def prepare() -> tuple[Draft, tuple[str, str, Any]]:
        if export not in (None, "hf"):
            raise ConfigurationError(f"export={export!r} is not known. Write export='hf', or leave it out.")
        if export is not None and isinstance(store.path, str):
            raise ConfigurationError(
                f"{store.path} is a URL, and an export is written to a disk. Leave export out, and call"
                " ff.consolidate(url, folder) afterwards."
            )
        draft = drafted(plan, world.device.type != "cpu")
        save_id = secrets.token_hex(16)
        if world.rank == 0:
            undo.callback(store.begin(save_id))
        return draft, (save_id, "" if world.group is None else digest(call, draft), to_plain(draft.holding))

    try:
        draft, answers = together(world, what, prepare)
        if len({found for _, found, _ in answers}) > 1:
            raise_mismatch(world, what, call, draft)
        holdings = [from_plain(holding) for _, _, holding in answers]
        leaves = agreed_leaves(draft, holdings)
        chores = shares(leaves, owners_of(draft, leaves, holdings), world.world_size)
    except BaseException:
        undo.close()
        raise
    return Job(
        what=what,
        store=store,
        save_id=answers[0][0],
        strategy=rt.strategy.name,
        tree=draft.plan.tree,
        leaves=leaves,
        chores=chores,
        arrays=[held(draft.plan.values[chore.leaf], chore.box) for chore in chores[world.rank]],
        export=export,
        clear=undo.close,
    )


def _raise(error: BaseException) -> tuple[None, None]:
    raise error


def carried_out(
    world: World,
    job: Job,
    began: float,
    *,
    stalled: float | None = None,
    failure: BaseException | None = None,
    progress: Progress = None,
) -> Receipt:
    """Write, and commit when all ranks have written. Collective over `world.group`.

    Args:
        world: the ranks; its group may be another one than the job was agreed on.
        job: of `planned`.
        began: when the save was called, as `time.perf_counter` tells.
        stalled: for how long the caller was held up; None when it still is.
        failure: why this rank has nothing to write, which all ranks shall learn.
        progress: see `save`.
    """

    def write() -> tuple[None, Written]:
        if failure is not None:
            raise failure
        start = time.perf_counter()
        size, checksums = _write(world, job, progress if world.rank == 0 else None)
        return None, (size, checksums, time.perf_counter() - start, stalled or 0.0)

    def commit() -> tuple[None, tuple[int, float]]:
        if world.rank:
            return None, (0, 0.0)
        manifest = _manifest(world, job, written)
        size = job.store.export(job.save_id, manifest) if job.export else 0
        size += job.store.commit(job.save_id, manifest)
        return None, (size, time.perf_counter() - began)

    try:
        written = together(world, job.what, write)[1]
        size, seconds = together(world, job.what, commit)[1][0]
    finally:
        job.clear()
    rank_bytes = tuple(size for size, _, _, _ in written)
    return Receipt(
        path=job.store.path,
        save_id=job.save_id,
        bytes=size + sum(rank_bytes),
        rank_bytes=rank_bytes,
        seconds=seconds,
        seconds_stalled=seconds if stalled is None else max(stalled for _, _, _, stalled in written),
        seconds_writing=max(writing for _, _, writing, _ in written),
    )


Written = tuple[int, Sequence[Sequence[int]], float, float]
"""The size of a rank's data file, the checksums of its pieces, how long it took, how long the caller was held up."""


def _pieces(job: Job, rank: int) -> list[Piece]:
    """What lies in the data file of a rank, one piece for each of its chores."""
    start = 0
    found: list[Piece] = []
    for chore in job.chores[rank]:
        size = array_bytes(job.leaves[chore.leaf].dtype, chore.box.shape)
        # the number of the file is known once all ranks have said whether they write one
        found.append(Piece(file=-1, offset=chore.box.offset, shape=chore.box.shape, start=start, size=size))
        start += size
    return found


def _write(world: World, job: Job, progress: Progress) -> tuple[int, list[tuple[int, ...]]]:
    """Write this rank's share into a file of its own, on the disk when this returns: its size and checksums."""
    chores, pieces = job.chores[world.rank], _pieces(job, world.rank)
    if not chores:
        return 0, []
    entries: list[Entry] = [
        (f"{chore.leaf}.{chore.number}", job.leaves[chore.leaf], piece)
        for chore, piece in zip(chores, pieces, strict=True)
    ]
    total = sum(piece.size for piece in pieces)

    def parts() -> Iterable[Iterable[memoryview]]:  # a store may ask for them again
        found = (iter(()) if array is None else chunks(array) for array in job.arrays)
        if not progress:
            return found
        tell = meter(progress, job.what, total)
        return (told(part, tell) for part in found)

    name = job.store.file_name(job.save_id, world.rank)
    return job.store.write(job.save_id, name, header(job.save_id, entries), total, parts)


def _manifest(world: World, job: Job, written: Sequence[Written]) -> Manifest:
    files: list[tuple[str, int]] = []
    pieces: list[dict[int, Piece]] = [{} for _ in job.leaves]
    for rank, (size, checksums, _, _) in enumerate(written):
        if not job.chores[rank]:
            continue
        for chore, piece, crcs in zip(job.chores[rank], _pieces(job, rank), checksums, strict=True):
            pieces[chore.leaf][chore.number] = dataclasses.replace(piece, file=len(files), crc32=tuple(crcs))
        files.append((job.store.file_name(job.save_id, rank), size))
    return Manifest(
        save_id=job.save_id,
        created=time.time(),
        world_size=world.world_size,
        strategy=job.strategy,
        tree=job.tree,
        leaves=tuple(
            dataclasses.replace(leaf, pieces=tuple(found[number] for number in sorted(found)))
            for leaf, found in zip(job.leaves, pieces, strict=True)
        ),
        files=tuple(files),
    )
