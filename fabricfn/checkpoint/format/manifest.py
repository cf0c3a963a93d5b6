"""The format `fabricfn-checkpoint` 1 as plain data: what a `manifest.json` says. No torch, no input or output.

[Note: layout] A checkpoint is a folder: `manifest.json` and `data/r<rank>-<number>.safetensors`. The tree is kept in
the manifest; its leaves are numbered in the order of the tree. Python values are in the manifest too, arrays in the
safetensors files under the keys "<leaf>.<piece>". A piece is a block of an array's elements, so that ranks can write
their shards; every 4 MiB of a piece have a crc32. The manifest names nothing that could be imported.
"""

import base64
import dataclasses
import hashlib
import json
import math
import re
from typing import Any

from fabricfn.checkpoint.format.boxes import Box
from fabricfn.errors import CheckpointError

FORMAT = "fabricfn-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
DATA = "data"
BLOCK = 4 << 20
"""Bytes under one checksum."""
MANIFEST_LIMIT = 64 << 20
DEPTH_LIMIT = 100
FILE_NAME = re.compile(r"data/(?:[0-9a-f]{32}-)?r\d{5}-\d{3}\.safetensors")
"""The save id in front is that of object stores, where the files of two saves stand side by side for a moment."""
EXPORTED = re.compile(r"model(?:-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json")
"""The names of an export's files, which may stand beside the manifest: see `exporting`."""
TRAILER = re.compile(rb',\n"sha256":"([0-9a-f]{64})"}\n')
TRAILER_BYTES = 79

RAW = ("U8", 1)
DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
}
"""dtype -> its name in safetensors and its bytes per element: those that every safetensors since 0.4 reads."""
RAW_DTYPES = {
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}
"""dtype -> bytes per element: stored as a row of bytes; one unknown dtype would make a whole file unreadable."""

NUMPY = {"bool", "complex64", "complex128", "float16", "float32", "float64"} | {
    f"{kind}{size}" for kind in ("int", "uint") for size in (8, 16, 32, 64)
}
"""The dtypes that numpy has without packages of others."""
LARGEST = 1 << 58
"""Elements of an array, empty dimensions counted as 1."""
SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""Two characters that come back from JSON as one."""

ARRAYS = ("tensor", "array", "number")
"""The kinds of leaves whose values are in the data files: torch tensors, numpy arrays, numpy scalars."""
CONTAINERS = ("dict", "list", "tuple", "record")
ANY = "any"
"""A container that the template makes a dict, a list, a tuple or a record (in memory only)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One container of the tree."""

    kind: str
    """One of CONTAINERS."""
    name: str = ""
    """A record's tag. The class comes from the template of the caller."""
    keys: tuple[str | int, ...] = ()
    """The keys of a dict, the fields of a record; nothing for a list or tuple."""
    children: tuple["Node | int | None", ...]
    """A container, the number of a leaf, or None for a place that `only=` left out (in memory only)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of an array's elements."""

    file: int
    """Which of the manifest's files holds it."""
    offset: tuple[int, ...]
    """Where it begins in the array."""
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin in the data section of the file."""
    size: int
    """Its bytes."""
    crc32: tuple[int, ...] = ()
    """One checksum for each BLOCK bytes."""

    @property
    def box(self) -> Box:
        """The block of elements."""
        return Box(self.offset, self.shape)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One value of the tree."""

    kind: str
    """One of ARRAYS, or of the kinds of `plain_leaf`."""
    value: Any = None
    """A plain value as JSON holds it."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    host: bool = False
    """The tensor was in host memory though the run computed on an accelerator."""
    alias: int | None = None
    """An earlier leaf that is the very same array; then there are no pieces."""
    pieces: tuple[Piece, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a checkpoint is, but for the bytes of its arrays."""

    save_id: str
    """32 hexadecimal digits, new for each save; every data file carries it."""
    created: float
    """Seconds since 1970, UTC."""
    world_size: int
    """How many ranks wrote it."""
    strategy: str
    """The strategy's name when it was written."""
    tree: Node | int
    """The root; a number when the tree is a single leaf."""
    leaves: tuple[Leaf, ...]
    files: tuple[tuple[str, int], ...]
    """The name and the size of each data file."""


def class_of(value: object) -> type[Any]:
    """The exact class, typed."""
    return type(value)


def path_text(path: tuple[str | int, ...]) -> str:
    """A path as messages and patterns have it: `model/params/0.weight`."""
    return "/".join(map(str, path)) or "."


def paths_of(tree: Node | int | None) -> dict[int, tuple[str | int, ...]]:
    """Number of a leaf -> its path, in the order of the tree."""
    found: dict[int, tuple[str | int, ...]] = {}

    def walk(node: Node | int | None, path: tuple[str | int, ...]) -> None:
        if node is None:
            return
        if type(node) is int:
            found[node] = path
            return
        assert type(node) is Node
        for key, child in zip(node.keys or range(len(node.children)), node.children, strict=True):
            walk(child, (*path, key))

    walk(tree, ())
    return found


def stored_as(dtype: str) -> tuple[str, int]:
    """The dtype in the safetensors header and its bytes per element there."""
    return DTYPES.get(dtype, RAW)


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes of an array."""
    return math.prod(shape) * (DTYPES[dtype][1] if dtype in DTYPES else RAW_DTYPES[dtype])


def too_large(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape is none that a manifest holds."""
    return len(shape) > 64 or math.prod(max(1, length) for length in shape) > LARGEST


def plain_leaf(value: Any) -> Leaf | None:
    """The leaf of a Python value that the manifest holds; None when it is not such a value."""
    if value is None:
        return Leaf(kind="none")
    kind = class_of(value)
    if kind is bool:
        return Leaf(kind="bool", value=value)
    if kind is int:
        return Leaf(kind="int", value=str(value) if value.bit_length() <= 4096 else hex(value))
    if kind is float:
        return Leaf(kind="float", value=value.hex())
    if kind is complex:
        return Leaf(kind="complex", value=[value.real.hex(), value.imag.hex()])
    if kind is str:
        return None if SURROGATES.search(value) else Leaf(kind="str", value=value)
    if kind is bytes:
        return Leaf(kind="bytes", value=base64.b64encode(value).decode())
    return None


def plain_value(leaf: Leaf) -> Any:
    """The Python value of a leaf made by `plain_leaf`. Raises ValueError or TypeError when it is none."""
    match leaf.kind:
        case "none":
            return None
        case "bool" if type(leaf.value) is bool:
            return leaf.value
        case "str" if type(leaf.value) is str:
            return leaf.value
        case "int":
            return int(leaf.value, 0)
        case "float":
            return float.fromhex(leaf.value)
        case "complex":
            real, imag = leaf.value
            return complex(float.fromhex(real), float.fromhex(imag))
        case "bytes":
            return base64.b64decode(leaf.value, validate=True)
        case _:
            raise ValueError(f"a leaf of kind {leaf.kind!r} cannot be {leaf.value!r}")


def node_json(node: Node | int | None) -> Any:
    """The tree as JSON has it: a leaf is its number."""
    if node is None or type(node) is int:
        return node
    assert type(node) is Node
    text: dict[str, Any] = {"t": node.kind}
    if node.kind == "record":
        text["name"] = node.name
    if node.kind in ("dict", "record"):
        text["k"] = list(node.keys)
    return {**text, "c": [node_json(child) for child in node.children]}


def leaf_json(leaf: Leaf, path: tuple[str | int, ...]) -> dict[str, Any]:
    """A leaf as JSON has it; its path is for human readers."""
    text: dict[str, Any] = {"path": path_text(path), "kind": leaf.kind}
    if leaf.kind not in ARRAYS:
        return text if leaf.kind == "none" else {**text, "v": leaf.value}
    text |= {"dtype": leaf.dtype, "shape": list(leaf.shape)}
    if leaf.host:
        text["host"] = True
    if leaf.alias is not None:
        return {**text, "alias": leaf.alias}
    return {**text, "pieces": [_piece_json(piece) for piece in leaf.pieces]}


def _piece_json(piece: Piece) -> dict[str, Any]:
    return {
        "file": piece.file,
        "offset": list(piece.offset),
        "shape": list(piece.shape),
        "start": piece.start,
        "bytes": piece.size,
        "crc32": list(piece.crc32),
    }


def to_bytes(manifest: Manifest) -> bytes:
    """The file's content: JSON whose last entry is the SHA-256 of everything before it."""
    paths = paths_of(manifest.tree)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "save_id": manifest.save_id,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "strategy": manifest.strategy,
        "block": BLOCK,
        "files": [{"name": name, "bytes": size} for name, size in manifest.files],
    }
    leaves = ",\n".join(_dump(leaf_json(leaf, paths[i])) for i, leaf in enumerate(manifest.leaves))
    body = f'{_dump(head)[:-1]},\n"tree":{_dump(node_json(manifest.tree))},\n"leaves":[\n{leaves}]'.encode()
    if len(body) > MANIFEST_LIMIT - TRAILER_BYTES:
        raise CheckpointError(
            f"the manifest would have {len(body):,} bytes, the limit is {MANIFEST_LIMIT:,}. Long strings, bytes and"
            " lists of numbers belong into a tensor: torch.tensor(numbers), torch.frombuffer(data, dtype=torch.uint8)."
        )
    return body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
