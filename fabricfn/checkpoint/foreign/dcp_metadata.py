"""The `.metadata` of torch.distributed.checkpoint, a pickle: read without torch, and without any class.

The few names that it may hold are looked up in a table of inert stand-ins, made anew for every file; any other name is
an error before anything is called. What comes out is checked like a stranger's file.
"""

import dataclasses
import io
import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, cast

from fabricfn.checkpoint.foreign.kinds import METADATA, Keys
from fabricfn.checkpoint.format.boxes import Box, flaw
from fabricfn.checkpoint.format.manifest import DTYPES, RAW_DTYPES, array_bytes
from fabricfn.errors import CheckpointError

LIMIT = 1 << 30
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.distcp")
LARGE = 1 << 60


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A stretch of a `.distcp` file: one torch.save of a block of a tensor, or of a value."""

    box: Box | None
    """The block; None for a value."""
    file: str
    offset: int
    length: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One entry of the checkpoint."""

    keys: Keys
    """Its place in the tree that was saved."""
    dtype: str | None
    """As torch names it; None for a value that is no tensor."""
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Invalid(Exception):
    """Says what is wrong; `items_of` adds where."""


class Thing:
    """Stands for an object of torch's: its state as it was pickled."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Dtype(str):
    """Stands for a dtype of torch's, by its name."""

    __slots__ = ()


IN_METADATA = (
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
    *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
)
OTHERS = (
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "StorageInfo")),
    *(("torch.serialization", "_get_layout"), ("torch", "Size"), ("collections", "OrderedDict")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
)
HOMES = ("torch.distributed.checkpoint.metadata", "torch.distributed._shard.sharded_tensor.metadata")


class _Unpickler(pickle.Unpickler):
    """Knows stand-ins only."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self.where = where
        # new ones for each file: a pickle may set attributes of a class that it was given
        names = (*((home, name) for home in HOMES for name in IN_METADATA), *OTHERS)
        self.known: dict[tuple[str, str], Any] = {pair: type(pair[1], (Thing,), {}) for pair in names}
        self.known["torch", "Size"] = type("Size", (tuple,), {})
        self.known["collections", "OrderedDict"] = type("OrderedDict", (dict,), {})

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = self.known.get((module_name, global_name))
        if found is not None:
            return found
        if module_name == "torch" and (global_name in DTYPES or global_name in RAW_DTYPES):
            return Dtype(global_name)
        raise CheckpointError(
            f"{self.where} wants to unpickle {module_name}.{global_name}, and unpickling a class can run code. The"
            f" metadata of torch.distributed.checkpoint has only {', '.join(IN_METADATA[:5])} and what they are made"
            " of. If you know the writer and trust it, convert the checkpoint in a process of its own: python -m"
            " torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE, then ff.load_raw(rt, FILE, ...)."
        )


def items_of(folder: Path) -> list[Item]:
    """The entries of a checkpoint of torch.distributed.checkpoint, each tensor covered once by its chunks.

    Raises:
        CheckpointError: `.metadata` is damaged, names other classes, or contradicts itself or the files.
    """
    path = folder / METADATA
    if path.stat().st_size > LIMIT:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, more than {LIMIT:,}.")
    try:
        return _items(_Unpickler(path.read_bytes(), str(path)).load())
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # damaged bytes lead an unpickler to any of them
        detail = str(error) if type(error) is Invalid else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is no whole metadata of torch.distributed.checkpoint: {detail[:300]}.") from None


def _invalid(text: str) -> NoReturn:
    raise Invalid(text)


def _named(thing: Any, name: str) -> dict[str, Any]:
    if type(thing).__name__ != name or not isinstance(thing, Thing):
        _invalid(f"it has a {type(thing).__name__} where a {name} belongs")
    state: Any = {} if thing.state is None else thing.state
    if type(state) is not dict:
        _invalid(f"a {name} is not made as torch makes it")
    return cast("dict[str, Any]", state)


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        _invalid("a size is no row of numbers")
    row = cast("Iterable[Any]", value)
    return tuple(_number(item) for item in row)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < LARGE:
        _invalid(f"{value!r:.40} is not a size or an offset")
    return value


def _items(metadata: Any) -> list[Item]:
    fields = _named(metadata, "Metadata")
    places: dict[tuple[str, tuple[int, ...] | None], tuple[str, int, int]] = {}
    for index, info in fields["storage_data"].items():
        at, stored = _named(index, "MetadataIndex"), _named(info, type(info).__name__)
        offset = None if at.get("offset") is None else _numbers(at["offset"])
        name = stored["relative_path"]
        if type(name) is not str or not FILE.fullmatch(name):
            _invalid(f"the file name {name!r:.80} is not of the form __0_0.distcp")
        if stored.get("transform_descriptors"):
            _invalid(f"{name} was written through {stored['transform_descriptors']!r:.80}, which cannot be undone here")
        places[at["fqn"], offset] = name, _number(stored["offset"]), _number(stored["length"])
    planner: Any = fields.get("planner_data")
    paths = cast("dict[Any, Any]", planner) if isinstance(planner, dict) else {}
    found: list[Item] = []
    for fqn, entry in fields["state_dict_metadata"].items():
        if type(fqn) is not str:
            _invalid(f"{fqn!r:.40} is not a name")
        found.append(_item(fqn, entry, _keys(paths.get(fqn, (fqn,))), places))
    return found


def _keys(path: Any) -> Keys:
    keys = tuple(cast("Iterable[Any]", path)) if isinstance(path, tuple | list) else ()
    if not keys or any(type(key) not in (str, int) for key in keys):
        _invalid(f"{path!r:.80} is not a place in a tree")
    return keys


def _item(fqn: str, entry: Any, keys: Keys, places: dict[Any, tuple[str, int, int]]) -> Item:
    if type(entry).__name__ == "BytesStorageMetadata":
        file, offset, length = _place(fqn, None, places)
        return Item(keys=keys, dtype=None, shape=(), chunks=(Chunk(box=None, file=file, offset=offset, length=length),))
    fields = _named(entry, "TensorStorageMetadata")
    properties, shape = fields["properties"], _numbers(fields["size"])
    state: Any = properties.state if isinstance(properties, Thing) else None
    dtype: Any = cast("tuple[Any, ...]", state)[0] if isinstance(state, tuple) else None
    if type(dtype) is not Dtype or len(shape) > 64:
        _invalid(f"{fqn!r:.80} has no dtype or no shape")
    chunks: list[Chunk] = []
    for chunk in fields["chunks"]:
        cut = _named(chunk, "ChunkStorageMetadata")
        box = Box(_numbers(cut["offsets"]), _numbers(cut["sizes"]))
        if not len(box.offset) == len(box.shape) == len(shape) or any(
            begin + length > n for begin, length, n in zip(box.offset, box.shape, shape, strict=True)
        ):
            _invalid(f"a piece of {fqn!r:.80} lies outside of it")
        file, offset, length = _place(fqn, box.offset, places)
        if array_bytes(dtype, box.shape) > length:
            _invalid(f"a piece of {fqn!r:.80} has {length:,} bytes, fewer than its elements")
        chunks.append(Chunk(box=box, file=file, offset=offset, length=length))
    fault = flaw([chunk.box for chunk in chunks if chunk.box is not None], shape) if math.prod(shape) else ""
    if fault:
        _invalid(f"{fqn!r:.80}: {fault}")
    return Item(keys=keys, dtype=str(dtype), shape=shape, chunks=tuple(chunks))


def _place(fqn: str, offset: Any, places: dict[Any, tuple[str, int, int]]) -> tuple[str, int, int]:
    if (fqn, offset) not in places:
        _invalid(f"it does not say in which file {fqn!r:.80} lies")
    return places[fqn, offset]
