"""`consolidate`: the models of a checkpoint in Hugging Face's layout, which other tools open. A block at a time.

The bytes go from the pieces, checked, through one buffer into the new files: no tensor is ever whole in memory.
"""

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fabricfn.checkpoint.exportable import Tensor, chosen, exportable
from fabricfn.checkpoint.foreign.values import Stored, read
from fabricfn.checkpoint.format.boxes import Box, whole
from fabricfn.checkpoint.format.manifest import DTYPES, EXPORTED, Manifest
from fabricfn.checkpoint.format.writing import sync_folder, write_file
from fabricfn.checkpoint.storage.commit import make_folders
from fabricfn.checkpoint.storage.objects import local_path
from fabricfn.checkpoint.storage.opening import unfinished
from fabricfn.checkpoint.trees.arrays import bytes_of
from fabricfn.checkpoint.trees.outline import Only
from fabricfn.checkpoint.trees.placements import Part
from fabricfn.errors import CheckpointError

BUFFER = 32 << 20
SHARD_SIZE = 5_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
UNFINISHED = re.compile(r"\.export-[0-9a-f]{32}-.+")


def consolidate(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    only: Only = None,
    max_shard_size: int = SHARD_SIZE,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[Path, ...]:
    """Write the model of a checkpoint for other tools: safetensors in Hugging Face's layout, one file, or PyTorch.

    Laws: the values are those of the checkpoint, bit for bit, each block of ours checked. It needs less than 100 MiB,
    whatever the size of the model; but a PyTorch file is made in memory, and one tensor of torch.distributed.checkpoint
    is. After a crash there is a whole export at `target`, or none that could be taken for one.

    `safetensors.torch.load_file` reads the files; `transformers` and the hub do once the model's own `config.json` is
    beside them (`config.save_pretrained(target)`). Not collective: one process calls it, of a run or of none.

    Args:
        path: the folder that `save` made, or its URL, by whatever strategy and number of ranks. Or what `load_raw`
            reads: a file of PyTorch or safetensors, a folder of Hugging Face's or torch.distributed.checkpoint's.
        target: a folder, made if it is missing. An older export there is replaced; other files stay as they are. A name
            that ends in `.safetensors` is one file; in `.pt`, `.pth`, `.bin` or `.ckpt` a state dict by `torch.save`.
        only: which entries, by path ("model", "ema/params/*"). By default the models of the tree, or another tool's
            state dicts. Parameters and buffers of one Model bear their own names; of several, the path before them
            ("student.0.weight"). Where no Model is selected, tensors bear the path below what they have in common.
        max_shard_size: bytes, for a folder. Where all tensors fit, there is one file, `model.safetensors`; otherwise
            files of at most this size and `model.safetensors.index.json`. A larger tensor has a file of its own.
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
    one = {".safetensors": _safetensors, **dict.fromkeys(TORCH_FILES, _torch)}.get(place.suffix)
    if one is None and place.exists() and not place.is_dir():
        raise CheckpointError(
            f"{place} is a file; an export is a folder, or a name that ends in .safetensors, {', '.join(TORCH_FILES)}."
        )
    if one is not None and place.is_dir():
        raise CheckpointError(f"{place} is a folder, and its name is that of a file. Choose another name.")
    with contextlib.ExitStack() as stack:
        tensors = exportable(path, only, stack, storage_options)
        if one is None:
            shards = sharded(tensors, max_shard_size)
            make_folders(place)
            return export(place, shards)
        make_folders(place.parent)
        return _put_in_place(place, lambda work: one(work, tensors))


def export_beside(folder: Path, manifest: Manifest) -> int:
    """Write the models of a checkpoint into its own folder, before it is committed; returns the bytes of the files."""
    with unfinished(folder, manifest) as source:
        files = export(folder, sharded(chosen(source, None, "this tree"), SHARD_SIZE))
    return sum(file.stat().st_size for file in files)


def _put_in_place(place: Path, write: Callable[[Path], object]) -> tuple[Path, ...]:
    """One file, whole or not there."""
    work = place.with_name(f".export-{secrets.token_hex(16)}-{place.name}")
    try:
        write(work)
        os.replace(work, place)
        sync_folder(str(place.parent))
    finally:
        work.unlink(missing_ok=True)
    return (place,)


def _safetensors(work: Path, tensors: Sequence[Tensor]) -> None:
    tensors = _aligned(tensors)
    write_file(str(work), _header(tensors), map(_chunks, tensors))


def _torch(work: Path, tensors: Sequence[Tensor]) -> None:
    """A state dict; what is one array in the checkpoint is one here."""
    first: dict[Any, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        same = tensor.name if tensor.stored.same is None else (tensor.stored.file, tensor.stored.same)
        if same not in first:
            first[same] = read(tensor.stored, None, tensor.path, torch.device("cpu"))
        values[tensor.name] = first[same]
    with work.open("xb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())


def export(folder: Path, shards: Sequence[Sequence[Tensor]]) -> tuple[Path, ...]:
    """Write tensors into a folder that stands, a file a shard, flushed; the index, or the only file, appears last."""
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    mark = secrets.token_hex(16)
    made = [(folder / f".export-{mark}-{name}", name) for name in names]
    try:
        for (work, _), shard in zip(made, shards, strict=True):
            write_file(str(work), _header(shard), map(_chunks, shard))
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
    return list(map(_aligned, shards))


def _aligned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Readers map the file: numbers of 8 bytes first, so that each tensor is aligned."""
    return sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype][1])


def _header(tensors: Sequence[Tensor]) -> bytes:
    text: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        dtype = DTYPES[tensor.dtype][0]
        text[tensor.name] = {
            "dtype": dtype, "shape": list(tensor.stored.shape), "data_offsets": [start, start + tensor.size],
        }  # fmt: skip
        start += tensor.size
    body = json.dumps(text, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def _index(names: Sequence[str], shards: Sequence[Sequence[Tensor]]) -> bytes:
    placed = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.size for shard in shards for tensor in shard)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2) + "\n").encode()


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its elements, a buffer at a time, checked."""
    return map(bytes_of, blocks(tensor.stored, tensor.path, block_of(tensor.stored)))


def block_of(*tensors: Stored) -> int:
    """How many elements of each are read at once, when these tensors of one shape are read side by side."""
    if any(tensor.at_once for tensor in tensors):
        return max(1, math.prod(tensors[0].shape))
    return max(1, BUFFER // max(tensor.dtype.itemsize for tensor in tensors))


def blocks(stored: Stored, what: str, most: int) -> Iterator[torch.Tensor]:
    """A tensor in slices of at most so many elements, in the order of its elements."""
    for box in boxes(whole(stored.shape), most):
        into = torch.empty(box.shape, dtype=stored.dtype, device="cpu")
        stored.fill(into, [Part(box=box, at=whole(box.shape))], what)
        yield into


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
