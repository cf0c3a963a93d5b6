"""The header of a safetensors file, checked to the last byte. No torch."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, cast

from fabricfn.checkpoint.format.manifest import DTYPES
from fabricfn.checkpoint.storage.opening import read_at
from fabricfn.errors import CheckpointError

HEADER_LIMIT = 100 << 20
NAMES = {name: (dtype, size) for dtype, (name, size) in DTYPES.items()} | {
    "C64": ("complex64", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
}
"""Name of a dtype -> its name here, and its bytes per element."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one tensor lies."""

    dtype: str | None
    """As torch names it; None for one that is not known."""
    written: str
    """The dtype as the file names it."""
    shape: tuple[int, ...]
    begin: int
    """Its first byte in the file."""
    size: int
    """Its bytes."""


def places_of(fd: int, path: Path) -> dict[str, Place]:
    """Name -> place of the tensors of an open safetensors file.

    Raises:
        CheckpointError: the header is not that of a whole safetensors file; the message names the file.
    """
    try:
        return _places(fd, os.fstat(fd).st_size)
    except (_Damaged, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        detail = str(error) if type(error) is _Damaged else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is no whole safetensors file: {detail[:200]}.") from None


class _Damaged(Exception):
    """Says what is wrong with the header."""


def _places(fd: int, size: int) -> dict[str, Place]:
    length = int.from_bytes(read_at(fd, 8, 0), "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise _Damaged(f"its header would have {length:,} bytes, the file has {size:,}")
    text: Any = json.loads(read_at(fd, length, 8), object_pairs_hook=_once)
    if type(text) is not dict:
        raise _Damaged("its header is no JSON object")
    header = cast("dict[str, Any]", text)
    header.pop("__metadata__", None)
    found = {name: _place(8 + length, name, entry) for name, entry in header.items()}
    end = 0
    for begin, stop in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if begin != end:
            raise _Damaged("its tensors overlap or leave a hole")
        end = stop
    if end != size - 8 - length:
        raise _Damaged(f"its tensors have {end:,} bytes, the file has {size - 8 - length:,} for them; it is cut off")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Damaged("its header has a name twice")
    return found


def _place(origin: int, name: str, entry: Any) -> Place:
    written, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 1 << 60 for number in (begin, end, *shape)) or len(shape) > 64:
        raise _Damaged(f"the shape or place of {name[:80]!r} is not one of a tensor")
    if begin > end:
        raise _Damaged(f"{name[:80]!r} ends before it begins")
    dtype, itemsize = NAMES.get(written, (None, 0))
    if dtype is not None and math.prod(shape) * itemsize != end - begin:
        raise _Damaged(f"{name[:80]!r} has {end - begin:,} bytes, which is not {written}{list(shape)}")
    return Place(dtype=dtype, written=str(written), shape=shape, begin=origin + begin, size=end - begin)
