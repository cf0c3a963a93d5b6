"""safetensors files: the header checked to the last byte, the tensors read by position, parts of them where wanted.

safetensors' own reader maps the file, and a file that is cut off meanwhile kills the process.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fabricfn.checkpoint.foreign.values import Refused, Stored
from fabricfn.checkpoint.format.manifest import DTYPES
from fabricfn.checkpoint.storage.opening import read_at
from fabricfn.checkpoint.trees.placements import Part, view_of
from fabricfn.checkpoint.trees.reading import read_box
from fabricfn.errors import CheckpointError

HEADER_LIMIT = 100 << 20
NAMES = {name: getattr(torch, dtype) for dtype, (name, _) in DTYPES.items()} | {
    "C64": torch.complex64,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


class Stretch:
    """The bytes of one tensor in an open file."""

    def __init__(self, fd: int, begin: int, where: str) -> None:
        self.fd, self.begin, self.where = fd, begin, where

    def read(self, begin: int, into: memoryview, reach: int = 0) -> None:
        """Fill `into` from `begin`."""
        at, filled = self.begin + begin, 0
        while filled < into.nbytes and (count := os.preadv(self.fd, [into[filled:]], at + filled)):
            filled += count
        if filled < into.nbytes:
            raise CheckpointError(f"{self.where} ends before its byte {at + into.nbytes:,}: it was cut off meanwhile.")


def opened_safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Name -> tensor of a safetensors file, which stays open as long as `stack`.

    Raises:
        CheckpointError: the header is not that of a whole safetensors file; the message names the file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, fd)
    try:
        return _tensors(fd, os.fstat(fd).st_size, path)
    except (_Damaged, ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        detail = str(error) if type(error) is _Damaged else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is no whole safetensors file: {detail[:200]}.") from None


class _Damaged(Exception):
    """Says what is wrong with the header."""


def _tensors(fd: int, size: int, path: Path) -> dict[str, Any]:
    length = int.from_bytes(read_at(fd, 8, 0), "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise _Damaged(f"its header would have {length:,} bytes, the file has {size:,}")
    text: Any = json.loads(read_at(fd, length, 8), object_pairs_hook=_once)
    if type(text) is not dict:
        raise _Damaged("its header is no JSON object")
    header = cast("dict[str, Any]", text)
    header.pop("__metadata__", None)
    found = {name: _tensor(fd, 8 + length, name, entry, path) for name, entry in header.items()}
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


def _tensor(fd: int, origin: int, name: str, entry: Any, path: Path) -> Stored | Refused:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 1 << 60 for number in (begin, end, *shape)) or len(shape) > 64:
        raise _Damaged(f"the shape or place of {name[:80]!r} is not one of a tensor")
    if begin > end:
        raise _Damaged(f"{name[:80]!r} ends before it begins")
    if dtype not in NAMES:
        return Refused(text=f"it has the dtype {str(dtype)[:40]}, which is not known")
    kind: torch.dtype = NAMES[dtype]
    if math.prod(shape) * kind.itemsize != end - begin:
        raise _Damaged(f"{name[:80]!r} has {end - begin:,} bytes, which is not {dtype}{list(shape)}")
    stretch = Stretch(fd, origin + begin, str(path))

    def fill(into: torch.Tensor, parts: Sequence[Part], what: str) -> None:
        for part in parts:
            read_box(stretch, shape, part.box, view_of(into, part), 0)

    return Stored(dtype=kind, shape=shape, file=path, fill=fill, same=(fd, begin) if end > begin else None)
