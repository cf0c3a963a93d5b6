"""`save`: every rank writes its share, all agree, and the checkpoint appears by one rename."""

import dataclasses
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.commit import check_target, clear, put_in_place, work_folder
from fabricfn.checkpoint.differences import digest, raise_mismatch
from fabricfn.checkpoint.manifest import DATA, MANIFEST, Leaf, Manifest, Node, Piece, array_bytes, to_bytes
from fabricfn.checkpoint.opening import local_path
from fabricfn.checkpoint.outline import Only, outline
from fabricfn.checkpoint.riding import with_states
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
from fabricfn.checkpoint.writing import Entry, header, sync_folder, write_file
from fabricfn.errors import CheckpointError
from fabricfn.runtimes import Runtime


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


def save(rt: Runtime, path: str | os.PathLike[str], tree: Any, *, only: Only = None) -> Receipt:
    """Write a tree as a checkpoint, so that a crash at any instant leaves the old one or the new one.

    Laws: `load(rt, path, like=tree)` is `tree` bit for bit, at every world size. When any rank fails, nobody commits,
    and what stood at `path` is intact.

    Args:
        rt: the runtime. Collective: every rank calls it.
        path: the folder that shall be the checkpoint, of whatever name; missing parents are made. A checkpoint that
            stands there is replaced in one step; a folder with anything else is refused.
        tree: dicts, lists, tuples, named tuples, dataclasses, `Model`, `Optimizer`, `Grads`, `Cursor`, `Key`; torch
            tensors of any dtype and device, numpy arrays; numbers, strings, bytes, None. Keys are strings or integers.
            All ranks hold the same tree; its tensors are written once, by the ranks together. Of a DTensor each rank
            writes its own part; nothing is gathered. The same memory at two places is written once. An object with
            `state_dict` and `load_state_dict` (a loader of torchdata) rides along: the state of every rank is written.
        only: what to save, by path ("model", "model/params/*.weight", several of them, or a predicate of a leaf's
            path); everything by default.

    Returns:
        A `Receipt`, the same on every rank.

    Raises:
        CheckpointError: a value cannot be stored (all of them are named), a DTensor is not whole on these ranks, or a
            rank failed (named on every rank).
        MismatchError: the ranks' trees, plain values or shardings differ; the message names the entries.
        DonatedError: a record in the tree was given away.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     receipt = ff.save(rt, folder + "/last", {"w": torch.arange(3), "epoch": 2})
        ...     ff.load(rt, receipt.path)
        {'w': tensor([0, 1, 2]), 'epoch': 2}
    """
    began = time.perf_counter()
    world, what = rt.world, f"ff.save to {os.fspath(path)}"
    target = local_path(path)
    held: list[tuple[Path, int]] = []
    tree = with_states(world, what, tree)

    def prepare() -> tuple[Draft, tuple[str, str, Holding]]:
        draft = drafted(outline(tree, only), world.device.type != "cpu")
        save_id = secrets.token_hex(16)
        if world.rank == 0:
            check_target(target)
            held.append(work_folder(target, save_id))
        return draft, (save_id, "" if world.group is None else digest(target, draft), draft.holding)

    try:
        draft, answers = together(world, what, prepare)
        save_id = answers[0][0]
        if len({found for _, found, _ in answers}) > 1:
            raise_mismatch(world, what, target, draft)
        holdings = [holding for _, _, holding in answers]
        leaves = agreed_leaves(draft, holdings)
        mine = shares(leaves, owners_of(draft, leaves, holdings), world.world_size)[world.rank]
        work = target.parent / f".tmp-{target.name}-{save_id}"
        name = f"{DATA}/r{world.rank:05d}-000.safetensors"
        values = draft.plan.values
        written = together(world, what, lambda: (None, _write(work, name, save_id, leaves, values, mine)))[1]

        def commit() -> tuple[None, tuple[int, float]]:
            if world.rank:
                return None, (0, 0.0)
            manifest = _manifest(rt, save_id, draft.plan.tree, leaves, written)
            size = _commit(work, target, manifest)
            return None, (size + sum(size for _, size in manifest.files), time.perf_counter() - began)

        size, seconds = together(world, what, commit)[1][0]
        return Receipt(path=target, save_id=save_id, bytes=size, seconds=seconds)
    finally:
        for work, lock in held:
            clear(work, target, lock)


Written = tuple[str, int, list[tuple[int, int, Piece]]] | None
"""A data file's name and size, and (leaf, number, piece) for each piece; None for a rank that writes nothing."""


def _write(
    work: Path, name: str, save_id: str, leaves: Sequence[Leaf], values: Sequence[Any], chores: Sequence[Chore]
) -> Written:
    """Write this rank's share into a file of its own, on the disk when this returns."""
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
    parts = (piece_chunks(values[chore.leaf], chore.box) for chore in chores)
    size, checksums = write_file(str(work / name), header(save_id, entries), parts)
    pieces = (dataclasses.replace(piece, crc32=crcs) for (_, _, piece), crcs in zip(entries, checksums, strict=True))
    return name, size, [(chore.leaf, chore.number, piece) for chore, piece in zip(chores, pieces, strict=True)]


def _manifest(
    rt: Runtime, save_id: str, tree: Node | int, leaves: Sequence[Leaf], written: Sequence[Written]
) -> Manifest:
    files: list[tuple[str, int]] = []
    pieces: list[dict[int, Piece]] = [{} for _ in leaves]
    for part in written:
        if part is None:
            continue
        name, size, found = part
        for leaf, number, piece in found:
            pieces[leaf][number] = dataclasses.replace(piece, file=len(files))
        files.append((name, size))
    return Manifest(
        save_id=save_id,
        created=time.time(),
        world_size=rt.world.world_size,
        strategy=rt.strategy.name,
        tree=tree,
        leaves=tuple(
            dataclasses.replace(leaf, pieces=tuple(found[number] for number in sorted(found)))
            for leaf, found in zip(leaves, pieces, strict=True)
        ),
        files=tuple(files),
    )


def _commit(work: Path, target: Path, manifest: Manifest) -> int:
    """Write the manifest, flush everything, put the folder in its place; returns the manifest's size."""
    for name, size in manifest.files:
        if os.stat(work / name).st_size != size:
            raise CheckpointError(
                f"{work / name} has not the {size:,} bytes that its rank wrote. All ranks must see one file system at"
                f" {target.parent}."
            )
    size, _ = write_file(str(work / MANIFEST), to_bytes(manifest), ())
    sync_folder(str(work / DATA))
    put_in_place(work, target)
    try:
        sync_folder(str(target.parent))
    except OSError as error:
        raise CheckpointError(
            f"{target} was written and renamed, but {target.parent} could not be flushed ({error}); the checkpoint is"
            " whole, and may be gone after a power failure."
        ) from error
    return size
