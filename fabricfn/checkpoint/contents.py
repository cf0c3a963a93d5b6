"""What a file or folder says of itself, whoever wrote it: the tree, each array's place, the writer. No torch."""

import dataclasses
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fabricfn.checkpoint.foreign.dcp_metadata import items_of
from fabricfn.checkpoint.foreign.hub_indexes import inside, weight_map
from fabricfn.checkpoint.foreign.kinds import INDEXES, METADATA, SINGLES, Keys, is_foreign, is_safetensors
from fabricfn.checkpoint.foreign.safetensors_headers import places_of
from fabricfn.checkpoint.foreign.torch_outlines import torch_outline
from fabricfn.checkpoint.format.manifest import MANIFEST, Leaf, Node, Piece, array_bytes
from fabricfn.checkpoint.storage.objects import unresolved
from fabricfn.checkpoint.storage.opening import opened


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A checkpoint of anybody's, but for the numbers."""

    path: str = ""
    """As the caller named it."""
    writer: str
    """A line: the format, and by whom and when it was written, as far as the files say it."""
    tree: Node | int
    leaves: tuple[Leaf, ...]
    """An object of a class that cannot be read has the kind "object" and its class as the value."""
    files: tuple[tuple[str, int], ...]
    """The name and size of each file that holds arrays, as pieces count them."""


def contents_of(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Contents:
    """What a checkpoint of ours, or what other tools wrote, has in it.

    Raises:
        CheckpointError: there is none, or what describes it is damaged.
    """
    found = _foreign(unresolved(path)) if is_foreign(path) else _ours(path, storage_options)
    return dataclasses.replace(found, path=os.fspath(path))


def _foreign(place: Path) -> Contents:
    if place.is_dir() and os.path.lexists(place / METADATA):
        return _distributed(place)
    names = [*INDEXES, *SINGLES] if place.is_dir() else []
    place = next((place / name for name in names if os.path.lexists(place / name)), place)
    if place.name.endswith(".index.json"):
        return _sharded(place)
    file = inside(place.parent, place.name) if names else place
    return _safetensors(place, file) if is_safetensors(file, place.name) else _torch(place, file)


def _ours(path: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Contents:
    with opened(path, options=options) as source:
        manifest = source.manifest
    ranks = f"{manifest.world_size} rank{'s' if manifest.world_size > 1 else ''}"
    time = f"{datetime.fromtimestamp(manifest.created, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return Contents(
        writer=f"fabricfn, {time}, by {ranks} under {manifest.strategy}, save {manifest.save_id[:8]}",
        tree=manifest.tree,
        leaves=manifest.leaves,
        files=((MANIFEST, source.size - sum(size for _, size in manifest.files)), *manifest.files),
    )


def _torch(place: Path, file: Path) -> Contents:
    tree, leaves = torch_outline(file)
    files = ((place.name, file.stat().st_size),)
    return Contents(writer="PyTorch, torch.save", tree=tree, leaves=leaves, files=files)


def _safetensors(place: Path, file: Path) -> Contents:
    names, leaves = _header(file, 0)
    tree = Node(kind="dict", keys=names, children=tuple(range(len(names))))
    files = ((place.name, file.stat().st_size),)
    return Contents(writer="safetensors", tree=tree, leaves=leaves, files=files)


def _header(file: Path, number: int) -> tuple[tuple[str, ...], tuple[Leaf, ...]]:
    with file.open("rb") as opened_file:
        found = places_of(opened_file.fileno(), file)
    leaves = tuple(
        _leaf(place.dtype or place.written, place.shape, [_whole(number, place.shape, place.size)])
        for place in found.values()
    )
    return tuple(found), leaves


def _sharded(index: Path) -> Contents:
    placed = weight_map(index)
    found: dict[str, Leaf] = {}
    files: list[tuple[str, int]] = []
    for number, name in enumerate(dict.fromkeys(placed.values())):
        file = inside(index.parent, name)
        files.append((name, file.stat().st_size))
        if is_safetensors(file, name):
            found |= zip(*_header(file, number), strict=True)
        else:
            tree, leaves = torch_outline(file)
            keys = tree.keys if type(tree) is Node else ()
            found |= {str(key): _moved(leaf, number) for key, leaf in zip(keys, leaves, strict=False)}
    names = tuple(name for name in placed if name in found)
    return Contents(
        writer="Hugging Face, shards and their index",
        tree=Node(kind="dict", keys=names, children=tuple(range(len(names)))),
        leaves=tuple(found[name] for name in names),
        files=tuple(files),
    )


def _distributed(folder: Path) -> Contents:
    tree: dict[str | int, Any] = {}
    leaves: list[Leaf] = []
    names: dict[str, int] = {}
    for item in items_of(folder):
        pieces = [
            Piece(file=names.setdefault(chunk.file, len(names)), start=chunk.offset,
                  size=array_bytes(item.dtype, chunk.box.shape),
                  offset=chunk.box.offset, shape=chunk.box.shape)
            for chunk in item.chunks if chunk.box is not None and item.dtype
        ]  # fmt: skip
        leaf = _leaf(item.dtype, item.shape, pieces) if item.dtype else Leaf(kind="object", value="a pickled value")
        _put(tree, item.keys, len(leaves))
        leaves.append(leaf)
    files = tuple((name, (folder / name).stat().st_size) for name in names)
    writer = f"torch.distributed.checkpoint, {len(files)} file{'s' if len(files) > 1 else ''}"
    return Contents(writer=writer, tree=_nodes(tree), leaves=tuple(leaves), files=files)


def _put(tree: dict[str | int, Any], keys: Keys, number: int) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = number


def _nodes(tree: Any) -> Node | int:
    if type(tree) is int:
        return tree
    return Node(kind="dict", keys=tuple(tree), children=tuple(map(_nodes, tree.values())))


def _leaf(dtype: str, shape: tuple[int, ...], pieces: list[Piece]) -> Leaf:
    return Leaf(kind="tensor", dtype=dtype, shape=shape, pieces=tuple(pieces))


def _whole(number: int, shape: tuple[int, ...], size: int) -> Piece:
    return Piece(file=number, offset=(0,) * len(shape), shape=shape, start=0, size=size)


def _moved(leaf: Leaf, number: int) -> Leaf:
    pieces = tuple(dataclasses.replace(piece, file=number) for piece in leaf.pieces)
    return dataclasses.replace(leaf, pieces=pieces, alias=None)
