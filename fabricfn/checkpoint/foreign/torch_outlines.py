"""What a PyTorch file says of itself: its pickle, read by stand-ins that are inert for every class. No torch."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, NoReturn, cast

from fabricfn.checkpoint.format.manifest import (
    DTYPES,
    RAW_DTYPES,
    Leaf,
    Node,
    Piece,
    array_bytes,
    class_of,
    plain_leaf,
    too_large,
)
from fabricfn.errors import CheckpointError

LIMIT = 256 << 20
PER_BYTE = 16
"""Entries that one byte of a pickle may stand for; a hostile one names a container twice, and again, and again."""
DEPTH_LIMIT = 100
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}  # fmt: skip


class Thing:
    """Stands for an object of any class; it takes all that a pickle does to one, and keeps none of it."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Made of anything."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """As a list's."""

    def extend(self, items: Any) -> None:
        """As a list's."""


class Tensor:
    """What is known of a tensor."""

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> None:
        key, dtype = storage
        self.shape, self.dtype = shape, dtype if dtype else str(rest[2])
        self.same = (key, str(offset), str(shape), str(stride), self.dtype)


class Dtype(str):
    """Stands for a dtype of torch's, by its name."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """As torch writes it."""
        return f"torch.{self}"


class _Unpickler(pickle.Unpickler):
    """Calls nothing but what stands in this file, made anew for each: a pickle may set attributes of it."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name == "torch._utils" and global_name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return type("Fresh", (Tensor,), {})
        if module_name == "torch._utils" and global_name.startswith("_rebuild_parameter"):

            def parameter(data: Any, *rest: Any) -> Any:
                return data

            return parameter
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return type("OrderedDict", (dict,), {})
        if (module_name, global_name) == ("torch", "Size"):
            return type("Size", (tuple,), {})
        if module_name == "torch" and (global_name in DTYPES or global_name in RAW_DTYPES):
            return Dtype(global_name)
        return type(global_name, (Thing,), {"name": f"{module_name}.{global_name}"})

    def persistent_load(self, pid: Any, /) -> Any:
        _, kind, key, *_ = pid
        name = getattr(kind, "name", "").rpartition(".")[2]
        return str(key), STORAGES.get(name, "")


def torch_outline(path: Path) -> tuple[Node | int, tuple[Leaf, ...]]:
    """The tree of a PyTorch file, and its leaves; an object of a class is a leaf that names it.

    Raises:
        CheckpointError: it is no such file, of before torch 1.6, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (found for found in archive.infolist() if found.filename.rpartition("/")[2] == "data.pkl")
            if entry.file_size > LIMIT or entry.compress_type != zipfile.ZIP_STORED:
                _damaged(path, f"its pickle has {entry.file_size:,} bytes, or is compressed, which torch never does")
            with archive.open(entry) as file:
                tree = _Unpickler(file).load()
        return _Outline(1000 + PER_BYTE * entry.file_size).of(tree)
    except zipfile.BadZipFile:
        _damaged(path, "no file of torch.save in a format since torch 1.6; ff.load_raw reads the older ones")
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # damaged bytes lead an unpickler to any of them
        _damaged(path, f"{type(error).__name__}: {error}")


def _damaged(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path} cannot be read as a PyTorch file: {why[:300]}.") from None


class _Outline:
    def __init__(self, most: int) -> None:
        self.room = most
        """So many entries may still come."""
        self.leaves: list[Leaf] = []
        self.first: dict[Any, int] = {}

    def of(self, tree: Any) -> tuple[Node | int, tuple[Leaf, ...]]:
        return self.node(tree, 0), tuple(self.leaves)

    def node(self, value: Any, depth: int) -> Node | int:
        self.room -= 1
        if depth > DEPTH_LIMIT or self.room < 0:
            raise ValueError("it nests too deep, or has too many entries")
        if isinstance(value, dict):
            items = cast("dict[Any, Any]", value)
            keys = tuple(key if type(key) in (str, int) else f"{key!r:.40}" for key in items)
            return Node(kind="dict", keys=keys, children=tuple(self.node(item, depth + 1) for item in items.values()))
        if isinstance(value, list | tuple):
            row = cast("list[Any]", value)
            kind = "list" if isinstance(value, list) else "tuple"
            return Node(kind=kind, children=tuple(self.node(item, depth + 1) for item in row))
        self.leaves.append(self.leaf(value))
        return len(self.leaves) - 1

    def leaf(self, value: Any) -> Leaf:
        if not isinstance(value, Tensor):
            name = getattr(value, "name", class_of(value).__name__)
            return plain_leaf(value) or Leaf(kind="object", value=name)
        shape = tuple(value.shape)
        if any(type(length) is not int or length < 0 for length in shape) or too_large(shape):
            raise ValueError("a tensor has no shape")
        first = self.first.setdefault(value.same, len(self.leaves))
        if first != len(self.leaves):
            return Leaf(kind="tensor", dtype=value.dtype, shape=shape, alias=first)
        size = array_bytes(value.dtype, shape)
        piece = Piece(file=0, offset=(0,) * len(shape), shape=shape, start=0, size=size)
        return Leaf(kind="tensor", dtype=value.dtype, shape=shape, pieces=(piece,))
