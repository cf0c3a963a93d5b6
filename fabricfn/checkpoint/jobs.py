"""One save, in two halves: what all ranks agree on (`planned`), and the writing of it up to the rename (`carried_out`).

The first half reads the tree; the second one only what the first found, so that it may run beside the training.
"""

import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.custom import CheckpointType
from fabricfn.checkpoint.differences import digest, raise_mismatch
from fabricfn.checkpoint.manifest import DATA, Leaf, Manifest, Node, Piece, array_bytes
from fabricfn.checkpoint.outline import Only
from fabricfn.checkpoint.riding import stated
from fabricfn.checkpoint.sharing import (
    Chore,
    Draft,
    Holding,
    agreed_leaves,
    drafted,
    owners_of,
    piece_chunks,
    shares,
)
from fabricfn.checkpoint.stores import Store, store_at
from fabricfn.checkpoint.writing import Entry, header
from fabricfn.errors import ConfigurationError
from fabricfn.runtimes import Runtime
from fabricfn.world import World


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a save did. The same on all ranks."""

    path: Path
    """The folder that is the checkpoint."""
    save_id: str
    """32 hexadecimal digits that no other save has."""
    bytes: int
    """The size of all files together."""
    seconds: float
    """From the call to the commit, on rank 0."""


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
    values: tuple[Any, ...]
    """This rank's values of the leaves."""
    chores: Sequence[Chore]
    """What this rank writes."""
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
) -> Job:
    """What `save` shall do; rank 0 has a place for it. Collective; see `save` for the arguments and errors."""
    world, what = rt.world, f"ff.save to {os.fspath(path)}"
    store = store_at(path)
    undo = contextlib.ExitStack()
    plan = stated(world, what, tree, only, types)

    def prepare() -> tuple[Draft, tuple[str, str, Holding]]:
        if export not in (None, "hf"):
            raise ConfigurationError(f"export={export!r} is not known. Write export='hf', or leave it out.")
        draft = drafted(plan, world.device.type != "cpu")
        save_id = secrets.token_hex(16)
        if world.rank == 0:
            undo.callback(store.begin(save_id))
        return draft, (save_id, "" if world.group is None else digest(store.name, draft), draft.holding)

    try:
        draft, answers = together(world, what, prepare)
        if len({found for _, found, _ in answers}) > 1:
            raise_mismatch(world, what, store.name, draft)
        holdings = [holding for _, _, holding in answers]
        leaves = agreed_leaves(draft, holdings)
        chores = shares(leaves, owners_of(draft, leaves, holdings), world.world_size)[world.rank]
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
        values=draft.plan.values,
        chores=chores,
        export=export,
        clear=undo.close,
    )


def carried_out(world: World, job: Job, began: float) -> Receipt:
    """Write, and commit when all ranks have written. Collective over `world.group`.

    Args:
        world: the ranks; its group may be another one than the job was agreed on.
        job: of `planned`.
        began: when the save was called, as `time.perf_counter` tells.
    """
    try:
        written = together(world, job.what, lambda: (None, _write(world, job)))[1]

        def commit() -> tuple[None, tuple[int, float]]:
            if world.rank:
                return None, (0, 0.0)
            manifest = _manifest(world, job, written)
            size = job.store.export(job.save_id, manifest) if job.export else 0
            size += job.store.commit(job.save_id, manifest)
            return None, (size + sum(size for _, size in manifest.files), time.perf_counter() - began)

        size, seconds = together(world, job.what, commit)[1][0]
        return Receipt(path=job.store.path, save_id=job.save_id, bytes=size, seconds=seconds)
    finally:
        job.clear()


Written = tuple[str, int, list[tuple[int, int, Piece]]] | None
"""A data file's name and size, and (leaf, number, piece) for each piece; None for a rank that writes nothing."""


def _write(world: World, job: Job) -> Written:
    """Write this rank's share into a file of its own, on the disk when this returns."""
    chores, leaves = job.chores, job.leaves
    if not chores:
        return None
    start = 0
    entries: list[Entry] = []
    for chore in chores:
        leaf, box = leaves[chore.leaf], chore.box
        size = array_bytes(leaf.dtype, box.shape)
        # the number of the file is known once all ranks have said whether they write one
        piece = Piece(file=-1, offset=box.offset, shape=box.shape, start=start, size=size)
        entries.append((f"{chore.leaf}.{chore.number}", leaf, piece))
        start += size
    name = f"{DATA}/r{world.rank:05d}-000.safetensors"
    parts = (piece_chunks(job.values[chore.leaf], chore.box) for chore in chores)
    size, checksums = job.store.write(job.save_id, name, header(job.save_id, entries), parts)
    pieces = (dataclasses.replace(piece, crc32=crcs) for (_, _, piece), crcs in zip(entries, checksums, strict=True))
    return name, size, [(chore.leaf, chore.number, piece) for chore, piece in zip(chores, pieces, strict=True)]


def _manifest(world: World, job: Job, written: Sequence[Written]) -> Manifest:
    files: list[tuple[str, int]] = []
    pieces: list[dict[int, Piece]] = [{} for _ in job.leaves]
    for part in written:
        if part is None:
            continue
        name, size, found = part
        for leaf, number, piece in found:
            pieces[leaf][number] = dataclasses.replace(piece, file=len(files))
        files.append((name, size))
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
