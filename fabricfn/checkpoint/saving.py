"""`save`: every rank writes its share, all agree, and the checkpoint appears by one rename."""

import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.arrays import chunks
from fabricfn.checkpoint.commit import check_target, clear, put_in_place, work_folder
from fabricfn.checkpoint.manifest import (
    ARRAYS,
    DATA,
    MANIFEST,
    Leaf,
    Manifest,
    Piece,
    array_bytes,
    leaf_json,
    node_json,
    path_text,
    stored_as,
    to_bytes,
)
from fabricfn.checkpoint.opening import local_path
from fabricfn.checkpoint.outline import Only, Outline, leaves_of, listing, outline
from fabricfn.checkpoint.riding import with_states
from fabricfn.checkpoint.writing import Entry, header, sync_folder, write_file
from fabricfn.errors import CheckpointError, MismatchError
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
class Draft:
    """What this rank is about to save."""

    plan: Outline
    leaves: tuple[Leaf, ...]


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
            All ranks hold the same tree; its tensors are written once, by the ranks together. The same memory at two
            places is written once. An object with `state_dict` and `load_state_dict` (a loader of torchdata) rides
            along: the state of every rank is written.
        only: what to save, by path ("model", "model/params/*.weight", several of them, or a predicate of a leaf's
            path); everything by default.

    Returns:
        A `Receipt`, the same on every rank.

    Raises:
        CheckpointError: a value cannot be stored (all of them are named), or a rank failed (named on every rank).
        MismatchError: the ranks' trees or plain values differ; the message names the entries.
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

    def prepare() -> tuple[Draft, tuple[str, str]]:
        plan = outline(tree, only)
        draft = Draft(plan=plan, leaves=leaves_of(plan, world.device.type != "cpu"))
        save_id = secrets.token_hex(16)
        if world.rank == 0:
            check_target(target)
            held.append(work_folder(target, save_id))
        return draft, (save_id, "" if world.group is None else _digest(target, draft))

    try:
        draft, answers = together(world, what, prepare)
        save_id = answers[0][0]
        if len({digest for _, digest in answers}) > 1:
            _raise_mismatch(world, what, target, draft)
        work = target.parent / f".tmp-{target.name}-{save_id}"
        written = together(world, what, lambda: (None, _write(work, save_id, draft.leaves, draft.plan.values, world)))[
            1
        ]

        def commit() -> tuple[None, tuple[int, float]]:
            if world.rank:
                return None, (0, 0.0)
            manifest = _manifest(rt, save_id, draft, written)
            size = _commit(work, target, manifest)
            return None, (size + sum(size for _, size in manifest.files), time.perf_counter() - began)

        size, seconds = together(world, what, commit)[1][0]
        return Receipt(path=target, save_id=save_id, bytes=size, seconds=seconds)
    finally:
        for work, lock in held:
            clear(work, target, lock)


def _digest(target: Path, draft: Draft) -> str:
    text = json.dumps([str(target), node_json(draft.plan.tree), _descriptions(draft)])
    return hashlib.sha256(text.encode()).hexdigest()


def _descriptions(draft: Draft) -> dict[str, str]:
    """What must be equal on all ranks: for each leaf its place, kind, dtype, shape, alias, or its plain value."""
    pairs = zip(draft.plan.paths, draft.leaves, strict=True)
    return {path_text(path): json.dumps(leaf_json(leaf, path)) for path, leaf in pairs}


def _raise_mismatch(world: World, what: str, target: Path, draft: Draft) -> None:
    """Raise on every rank the error that says which entries differ, and where. Collective."""
    mine = {"the path": str(target), **_descriptions(draft)}
    everyone = together(world, what, lambda: (None, mine))[1]
    lines: list[str] = []
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        by_value: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            by_value.setdefault(_shown(theirs.get(name)), []).append(rank)
        if len(by_value) > 1:
            parts = (f"ranks {', '.join(map(str, ranks))} have {value}" for value, ranks in by_value.items())
            lines.append(f"{name}: {'; '.join(parts)}")
    raise MismatchError(
        f"{what}: the ranks do not hold the same tree (this is rank {world.rank}). Tensors that differ in shape and"
        " plain values that differ cannot be saved as one; make them equal: ff.broadcast(rt, tree), or leave them out:"
        f" only=....{listing(lines or ['the order of the keys of a dict differs'])}"
    )


def _shown(description: str | None) -> str:
    if description is None:
        return "nothing"
    if description[0] != "{":
        return description
    leaf = json.loads(description)
    if leaf["kind"] in ARRAYS:
        alias = f", the same as entry {leaf['alias']}" if "alias" in leaf else ""
        return f"a {leaf['kind']} {leaf['dtype']}{leaf['shape']}{alias}"
    return f"{str(leaf.get('v'))[:40]} ({leaf['kind']})"


def shares(leaves: Sequence[Leaf], world_size: int) -> list[list[int]]:
    """For each rank the arrays that it writes: the largest first, each to the rank that has the least so far.

    Within a rank's file they are ordered by the size of their elements, so that each is aligned.
    """
    sizes = {i: array_bytes(leaf.dtype, leaf.shape) for i, leaf in enumerate(leaves) if _is_stored(leaf)}
    loads = [0] * world_size
    found: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(sizes, key=lambda i: (-sizes[i], i)):
        rank = loads.index(min(loads))
        found[rank].append(index)
        loads[rank] += sizes[index]
    for indices in found:
        indices.sort(key=lambda i: (-stored_as(leaves[i].dtype)[1], i))
    return found


def _is_stored(leaf: Leaf) -> bool:
    return leaf.kind in ARRAYS and leaf.alias is None


Written = tuple[str, int, list[tuple[int, Piece]]] | None
"""A data file's name and size, and (leaf, piece) for each of its arrays; None for a rank that writes nothing."""


def _write(work: Path, save_id: str, leaves: Sequence[Leaf], values: Sequence[Any], world: World) -> Written:
    """Write this rank's share into a file of its own, on the disk when this returns."""
    share = shares(leaves, world.world_size)
    mine = share[world.rank]
    if not mine:
        return None
    number = sum(map(bool, share[: world.rank]))
    name = f"{DATA}/r{world.rank:05d}-000.safetensors"
    start = 0
    entries: list[Entry] = []
    for index in mine:
        leaf = leaves[index]
        size = array_bytes(leaf.dtype, leaf.shape)
        piece = Piece(file=number, offset=(0,) * len(leaf.shape), shape=leaf.shape, start=start, size=size)
        entries.append((f"{index}.0", leaf, piece))
        start += size
    parts = (chunks(values[index]) for index in mine)
    size, checksums = write_file(str(work / name), header(save_id, entries), parts)
    pieces = (dataclasses.replace(piece, crc32=crcs) for (_, _, piece), crcs in zip(entries, checksums, strict=True))
    return name, size, list(zip(mine, pieces, strict=True))


def _manifest(rt: Runtime, save_id: str, draft: Draft, written: Sequence[Written]) -> Manifest:
    leaves = list(draft.leaves)
    files: list[tuple[str, int]] = []
    for part in written:
        if part is None:
            continue
        name, size, pieces = part
        files.append((name, size))
        for index, piece in pieces:
            leaves[index] = dataclasses.replace(leaves[index], pieces=(*leaves[index].pieces, piece))
    return Manifest(
        save_id=save_id,
        created=time.time(),
        world_size=rt.world.world_size,
        strategy=rt.strategy.name,
        tree=draft.plan.tree,
        leaves=tuple(leaves),
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
