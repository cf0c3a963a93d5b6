"""From the bytes of a `manifest.json` to a `Manifest` that can be trusted: every number bounded, every byte accounted.

A manifest that passes promises: each leaf is at one place of the tree; the pieces of an array cover each element once;
the pieces in a file cover its data section once, so that no small checkpoint can ask for much memory.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from fabricfn.checkpoint.format.boxes import flaw
from fabricfn.checkpoint.format.manifest import (
    ARRAYS,
    BLOCK,
    CONTAINERS,
    DEPTH_LIMIT,
    DTYPES,
    FILE_NAME,
    FORMAT,
    LARGEST,
    MANIFEST_LIMIT,
    NUMPY,
    RAW_DTYPES,
    TRAILER,
    TRAILER_BYTES,
    VERSION,
    Leaf,
    Manifest,
    Node,
    Piece,
    array_bytes,
    plain_value,
    too_large,
)
from fabricfn.errors import CheckpointError

LARGE = 1 << 62
LAST_YEAR = 253_370_764_800  # the beginning of 9999


class Invalid(Exception):
    """Says what is wrong; `from_bytes` adds where."""


def from_bytes(data: bytes, where: str) -> Manifest:
    """The manifest in `data`.

    Raises:
        CheckpointError: it is damaged, of another format or version, or contradicts itself; the message names `where`.
    """
    try:
        return _manifest(_parsed(data))
    except (Invalid, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        detail = str(error) if type(error) is Invalid else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{where} is no whole manifest of a checkpoint: {detail[:300]}. Load another checkpoint:"
            " ff.latest(folder) finds the newest whole one."
        ) from None


def _invalid(text: str) -> NoReturn:
    raise Invalid(text)


def _parsed(data: bytes) -> dict[str, Any]:
    if len(data) > MANIFEST_LIMIT:
        _invalid(f"it has {len(data):,} bytes, more than {MANIFEST_LIMIT:,}")
    body, trailer = memoryview(data)[:-TRAILER_BYTES], TRAILER.fullmatch(data[-TRAILER_BYTES:])
    if trailer is None:
        _invalid("its last line is not its SHA-256, so its end is missing or damaged")
    if hashlib.sha256(body).hexdigest().encode() != trailer[1]:
        _invalid("its SHA-256 is not the one in its last line, so it is damaged or was edited")
    text = json.loads(str(body, "utf-8") + "}", object_pairs_hook=_object)
    if type(text) is not dict or text.get("format") != FORMAT:
        _invalid(f'its "format" is not {FORMAT!r}')
    found = cast("dict[str, Any]", text)
    version = found.get("version")
    if version != VERSION:
        _invalid(
            f"it has format version {version!r}, this fabricfn reads version {VERSION};"
            " install the version of fabricfn that wrote it, or a newer one"
        )
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        _invalid("an object has one key twice, which readers understand differently")
    return found


def _integer(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        _invalid(f"{what} is {value!r}, not an integer between {low} and {high}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if type(value) is not list:
        _invalid(f"{what} is not a list")
    return cast("list[Any]", value)


def _text(value: Any, what: str) -> str:
    if type(value) is not str:
        _invalid(f"{what} is not a string")
    return value


def _integers(value: Any, high: int, what: str) -> tuple[int, ...]:
    return tuple(_integer(item, 0, high, what) for item in _list(value, what))


def _manifest(text: dict[str, Any]) -> Manifest:
    if text["block"] != BLOCK:
        _invalid(f'"block" is {text["block"]!r}, not {BLOCK}')
    save_id = _text(text["save_id"], "save_id")
    if len(save_id) != 32 or not set(save_id) <= set("0123456789abcdef"):
        _invalid("save_id is not 32 hexadecimal digits")
    if type(text["created"]) not in (int, float) or not 0 <= text["created"] <= LAST_YEAR:
        _invalid("created is not a number of seconds between 1970 and 9999")
    files: list[tuple[str, int]] = []
    for item in _list(text["files"], "files"):
        name = _text(item["name"], "a file's name")
        if not FILE_NAME.fullmatch(name):
            _invalid(f"the file name {name!r} is not of the form data/r00000-000.safetensors")
        files.append((name, _integer(item["bytes"], 0, LARGE, f"the size of {name}")))
    if len({name for name, _ in files}) != len(files):
        _invalid("two files have one name")
    leaves: list[Leaf] = []
    for item in _list(text["leaves"], "leaves"):
        try:
            leaves.append(_leaf(item, leaves, len(files)))
        except Invalid as error:
            raise Invalid(f"entry {str(item.get('path'))[:80]!r}: {error}") from None
    seen: set[int] = set()
    tree = _node(text["tree"], len(leaves), seen, 0)
    if len(seen) != len(leaves):
        _invalid("a leaf has no place in the tree")
    _check_sections(leaves, len(files))
    return Manifest(
        save_id=save_id,
        created=float(text["created"]),
        world_size=_integer(text["world_size"], 1, 1 << 32, "world_size"),
        strategy=_text(text["strategy"], "strategy"),
        tree=tree,
        leaves=tuple(leaves),
        files=tuple(files),
    )


def _node(text: Any, count: int, seen: set[int], depth: int) -> Node | int:
    if type(text) is int:
        if _integer(text, 0, count - 1, "a leaf's number") in seen:
            _invalid(f"leaf {text} is at two places of the tree")
        seen.add(text)
        return text
    if type(text) is not dict or depth > DEPTH_LIMIT:
        _invalid("the tree has a node that is no container, or is too deep")
    node = cast("dict[str, Any]", text)
    kind = node["t"]
    if kind not in CONTAINERS:
        _invalid(f"the tree has a container of kind {kind!r}")
    children = tuple(_node(child, count, seen, depth + 1) for child in _list(node["c"], "children"))
    keys: tuple[str | int, ...] = ()
    if kind in ("dict", "record"):
        keys = tuple(_list(node["k"], "keys"))
        if len(keys) != len(children) or len(set(keys)) != len(keys) or {type(key) for key in keys} - {str, int}:
            _invalid("the keys of a container are not one different string or integer for each child")
    name = _text(node["name"], "a record's name") if kind == "record" else ""
    return Node(kind=kind, name=name, keys=keys, children=children)


def _leaf(text: dict[str, Any], earlier: Sequence[Leaf], num_files: int) -> Leaf:
    kind = text["kind"]
    if kind not in ARRAYS:
        if not text.keys().isdisjoint(("alias", "dtype", "pieces", "shape")):
            _invalid(f"a leaf of kind {kind!r} has what arrays have")
        leaf = Leaf(kind=kind, value=text.get("v"))
        plain_value(leaf)
        return leaf
    dtype, shape = text["dtype"], _integers(text["shape"], LARGEST, "a shape")
    if dtype not in DTYPES and dtype not in RAW_DTYPES:
        _invalid(f"a leaf has the unknown dtype {dtype!r}")
    if kind != "tensor" and dtype not in NUMPY:
        _invalid(f"{kind} is numpy's, which has no {dtype}")
    if kind == "number" and shape:
        _invalid("a number has a shape")
    if too_large(shape):
        _invalid("a leaf has more than 64 dimensions or too many elements")
    whole = Leaf(kind=kind, dtype=dtype, shape=shape, host=text.get("host", False) is True)
    if "alias" in text:
        alias = _integer(text["alias"], 0, len(earlier) - 1, "an alias")
        other = earlier[alias]
        if other.alias is not None or (other.kind, other.dtype, other.shape) != (kind, dtype, shape):
            _invalid(f"an alias of leaf {alias} is not like it")
        return Leaf(kind=kind, dtype=dtype, shape=shape, host=whole.host, alias=alias)
    pieces = tuple(_piece(item, whole, num_files) for item in _list(text["pieces"], "pieces"))
    fault = flaw([piece.box for piece in pieces], shape)
    if fault:
        _invalid(fault)
    return Leaf(kind=kind, dtype=dtype, shape=shape, host=whole.host, pieces=pieces)


def _piece(text: dict[str, Any], leaf: Leaf, num_files: int) -> Piece:
    offset, shape = _integers(text["offset"], LARGE, "an offset"), _integers(text["shape"], LARGE, "a piece's shape")
    inside = len(offset) == len(shape) == len(leaf.shape) and all(
        o + s <= n for o, s, n in zip(offset, shape, leaf.shape, strict=True)
    )
    if not inside:
        _invalid("a piece lies outside its array")
    piece = Piece(
        file=_integer(text["file"], 0, num_files - 1, "a piece's file"),
        offset=offset,
        shape=shape,
        start=_integer(text["start"], 0, LARGE, "a piece's start"),
        size=_integer(text["bytes"], 0, LARGE, "a piece's size"),
        crc32=_integers(text["crc32"], (1 << 32) - 1, "a crc32"),
    )
    if piece.size != array_bytes(leaf.dtype, shape) or len(piece.crc32) != -(-piece.size // BLOCK):
        _invalid("the bytes or the number of checksums of a piece do not follow from its shape")
    return piece


def _check_sections(leaves: Sequence[Leaf], num_files: int) -> None:
    """The pieces lie one after the other in the data section of their file."""
    spans: list[list[tuple[int, int]]] = [[] for _ in range(num_files)]
    for leaf in leaves:
        for piece in leaf.pieces:
            spans[piece.file].append((piece.start, piece.size))
    for found in spans:
        end = 0
        for start, size in sorted(found):
            if start != end:
                _invalid("the pieces in a data file leave a hole or overlap")
            end = start + size
