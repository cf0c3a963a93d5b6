"""`consolidate`: the models of a checkpoint in Hugging Face's layout, which other tools open. A block at a time.

The bytes go from the pieces, checked, through one buffer into the new files: no tensor is ever whole in memory.
"""

import dataclasses
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fabricfn.checkpoint.format.boxes import Box, whole
from fabricfn.checkpoint.format.manifest import ARRAYS, DTYPES, EXPORTED, Leaf, Manifest, Node, array_bytes, path_text
from fabricfn.checkpoint.format.pieces import Source
from fabricfn.checkpoint.format.writing import sync_folder, write_file
from fabricfn.checkpoint.storage.commit import make_folders
from fabricfn.checkpoint.storage.objects import local_path
from fabricfn.checkpoint.storage.opening import opened, unfinished
from fabricfn.checkpoint.trees.arrays import bytes_of
from fabricfn.checkpoint.trees.outline import Only, Path as Keys, listing, nothing_selected, prune
from fabricfn.checkpoint.trees.placements import Part
from fabricfn.checkpoint.trees.reading import read_parts, torch_dtype
from fabricfn.errors import CheckpointError

BUFFER = 32 << 20
SHARD_SIZE = 5_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
UNFINISHED = re.compile(r"\.export-[0-9a-f]{32}-.+")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of an export."""

    name: str
    leaf: Leaf
    """The one that has the pieces."""
    path: str
    """In the checkpoint, for messages."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return array_bytes(self.leaf.dtype, self.leaf.shape)


def consolidate(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    only: Only = None,
    max_shard_size: int = SHARD_SIZE,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Write the model of a checkpoint for other tools: safetensors files in Hugging Face's layout.

    Laws: the values are those of the checkpoint, bit for bit, each block checked. It needs less than 100 MiB, whatever
    the size of the model. After a crash there is a whole export at `target`, or none that could be taken for one.

    `safetensors.torch.load_file` reads the files; `transformers` and the hub do once the model's own `config.json` is
    beside them (`config.save_pretrained(target)`). Not collective: one process calls it, of a run or of none.

    Args:
        path: the folder that `save` made, or its URL, by whatever strategy and number of ranks.
        target: a folder, made if it is missing. An older export there is replaced; other files stay as they are.
        only: which entries, by path ("model", "ema/params/*"). By default the `Model`s of the tree. Parameters and
            buffers of one Model bear their own names; of several, the path before them ("student.0.weight"). Where no
            Model is selected, tensors bear the path below what they have in common.
        max_shard_size: bytes. Where all tensors fit, there is one file, `model.safetensors`; otherwise files of at most
            this size and `model.safetensors.index.json`. A larger tensor has a file of its own.
        storage_options: arguments of fsspec's file system for a URL.

    Returns:
        The files, in order; on any rank the same.

    Raises:
        CheckpointError: there is no whole checkpoint, it holds no model, `only` selects nothing, two entries would have
            one name, or a tensor has a dtype that safetensors lacks; a block is damaged.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> from safetensors.torch import load_file
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        ...     receipt = ff.save(rt, folder + "/last", {"model": model, "epoch": 3})
        ...     files = ff.consolidate(receipt.path, folder + "/hub")
        ...     [file.name for file in files], sorted(load_file(files[0]))
        (['model.safetensors'], ['bias', 'weight'])
    """
    place = local_path(target)
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"{place} is a file; an export is a folder. Name a folder.")
    with opened(path, options=storage_options) as source:
        shards = sharded(chosen(source.manifest, only, str(source.path)), max_shard_size)
        make_folders(place)
        return export(source, place, shards)


def export_beside(folder: Path, manifest: Manifest) -> int:
    """Write the models of a checkpoint into its own folder, before it is committed; returns the bytes of the files."""
    with unfinished(folder, manifest) as source:
        files = export(source, folder, sharded(chosen(manifest, None, "this tree"), SHARD_SIZE))
    return sum(file.stat().st_size for file in files)


def export(source: Source, folder: Path, shards: Sequence[Sequence[Tensor]]) -> tuple[Path, ...]:
    """Write tensors into a folder that stands, a file a shard, flushed; the index, or the only file, appears last."""
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    mark = secrets.token_hex(16)
    made = [(folder / f".export-{mark}-{name}", name) for name in names]
    try:
        for (work, _), shard in zip(made, shards, strict=True):
            write_file(str(work), _header(shard), (_chunks(source, tensor) for tensor in shard))
        if len(shards) > 1:
            made.append((folder / f".export-{mark}-{INDEX}", INDEX))
            write_file(str(made[-1][0]), _index(names, shards), ())
        _replace(folder, made)
    finally:
        for work, _ in made:
            work.unlink(missing_ok=True)
    return tuple(folder / name for _, name in made)


def _replace(folder: Path, made: Sequence[tuple[Path, str]]) -> None:
    """Put finished files in the place of an older export. What a reader looks for first goes first and comes last."""
    for name in (INDEX, SINGLE):
        (folder / name).unlink(missing_ok=True)
    sync_folder(str(folder))
    for name in os.listdir(folder):
        mine = any(name == work.name for work, _ in made)
        if EXPORTED.fullmatch(name) or (UNFINISHED.fullmatch(name) and not mine):
            (folder / name).unlink(missing_ok=True)
    for work, name in made[:-1]:
        os.rename(work, folder / name)
    sync_folder(str(folder))
    os.rename(made[-1][0], folder / made[-1][1])
    sync_folder(str(folder))


def chosen(manifest: Manifest, only: Only, where: str) -> list[Tensor]:
    """The tensors of an export and their names.

    Raises:
        CheckpointError: there are none, two have one name, or one cannot be written.
    """
    tree = prune(manifest.tree, only)
    if tree is None:
        raise nothing_selected(only, manifest.tree)
    models = list(_models(tree, ()))
    if not models and only is None:
        raise CheckpointError(
            f"{where} holds no Model; say which entries are meant: ff.consolidate(path, target, only='...'). The"
            f" checkpoint has {', '.join(_heads(manifest.tree)) or 'a single leaf'}."
        )
    named: list[tuple[str, Keys, int]] = []
    for keys, fields in models:
        head = ".".join(map(str, keys)) + "." if len(models) > 1 and keys else ""
        named += [
            (head + str(place[1]), (*keys, *place), leaf) for place, leaf in _leaves(fields, ()) if place[0] in _OURS
        ]
    if not models:
        named = _relative(list(_leaves(tree, ())))
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, keys, number in named:
        leaf = manifest.leaves[number]
        if leaf.kind not in ARRAYS:
            continue
        if name in found:
            problems.append(f"{path_text(keys)}: the name {name} is that of {found[name].path}, too")
        if leaf.dtype not in DTYPES:
            problems.append(f"{path_text(keys)}: not every safetensors reads the dtype {leaf.dtype}")
        base = leaf if leaf.alias is None else manifest.leaves[leaf.alias]
        found[name] = Tensor(name=name, leaf=base, path=path_text(keys))
    if problems:
        raise CheckpointError(
            f"{where} cannot be written for other tools; leave out what is meant by only=:{listing(problems)}"
        )
    if not found:
        raise CheckpointError(f"{where}: what is selected has no tensors.")
    return list(found.values())


_OURS = ("params", "buffers")


def _models(node: Node | int | None, keys: Keys) -> Iterator[tuple[Keys, Node]]:
    """(path, record) of the Models of a tree."""
    if type(node) is not Node:
        return
    if node.kind == "record" and node.name == "Model":
        yield keys, node
        return
    for key, child in _children(node):
        yield from _models(child, (*keys, key))


def _leaves(node: Node | int | None, keys: Keys) -> Iterator[tuple[Keys, int]]:
    if type(node) is int:
        yield keys, node
    elif type(node) is Node:
        for key, child in _children(node):
            yield from _leaves(child, (*keys, key))


def _children(node: Node) -> Iterator[tuple[str | int, Any]]:
    return zip(node.keys or range(len(node.children)), node.children, strict=True)


def _heads(node: Node | int) -> list[str]:
    return [str(key) for key, _ in _children(node)][:8] if type(node) is Node else []


def _relative(leaves: Sequence[tuple[Keys, int]]) -> list[tuple[str, Keys, int]]:
    """Named by the path below what all have in common."""
    heads = [keys[:-1] for keys, _ in leaves]
    shared = 0
    while heads and all(len(head) > shared and head[shared] == heads[0][shared] for head in heads):
        shared += 1
    return [(".".join(map(str, keys[shared:])) or "value", keys, leaf) for keys, leaf in leaves]


def sharded(tensors: Sequence[Tensor], max_shard_size: int) -> list[list[Tensor]]:
    """The tensors in order, dealt out to files of at most this many bytes."""
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size is a number of bytes, it is {max_shard_size}. Write 5_000_000_000.")
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    # readers map the file: numbers of 8 bytes first, so that each tensor is aligned
    return [sorted(shard, key=lambda tensor: -DTYPES[tensor.leaf.dtype][1]) for shard in shards]


def _header(tensors: Sequence[Tensor]) -> bytes:
    text: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        dtype = DTYPES[tensor.leaf.dtype][0]
        text[tensor.name] = {
            "dtype": dtype, "shape": list(tensor.leaf.shape), "data_offsets": [start, start + tensor.size],
        }  # fmt: skip
        start += tensor.size
    body = json.dumps(text, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def _index(names: Sequence[str], shards: Sequence[Sequence[Tensor]]) -> bytes:
    placed = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.size for shard in shards for tensor in shard)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2) + "\n").encode()


def _chunks(source: Source, tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its elements, a buffer at a time, checked."""
    leaf, dtype = tensor.leaf, torch_dtype(tensor.leaf)
    for box in boxes(whole(leaf.shape), max(1, BUFFER // dtype.itemsize)):
        into = torch.empty(box.shape, dtype=dtype, device="cpu")
        read_parts(source, leaf, into, [Part(box=box, at=whole(box.shape))], tensor.path)
        yield bytes_of(into)


def boxes(box: Box, most: int) -> Iterator[Box]:
    """A box in slices of at most so many elements, in the order of the elements."""
    if box.size <= most:
        if box.size:
            yield box
        return
    dim = next(dim for dim, length in enumerate(box.shape) if length > 1)
    rows = max(1, most // math.prod(box.shape[dim + 1 :]))
    for begin in range(0, box.shape[dim], rows):
        length = min(rows, box.shape[dim] - begin)
        offset = (*box.offset[:dim], box.offset[dim] + begin, *box.offset[dim + 1 :])
        part = Box(offset, (*box.shape[:dim], length, *box.shape[dim + 1 :]))
        yield from boxes(part, most)
