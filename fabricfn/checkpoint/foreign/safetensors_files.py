"""safetensors files: the tensors read by position, parts of them where wanted.

safetensors' own reader maps the file, and a file that is cut off meanwhile kills the process.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fabricfn.checkpoint.foreign.safetensors_headers import Place, places_of
from fabricfn.checkpoint.foreign.values import Refused, Stored
from fabricfn.checkpoint.trees.placements import Part, view_of
from fabricfn.checkpoint.trees.reading import read_box
from fabricfn.errors import CheckpointError


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
    return {name: _tensor(fd, place, path) for name, place in places_of(fd, path).items()}


def _tensor(fd: int, place: Place, path: Path) -> Stored | Refused:
    if place.dtype is None:
        return Refused(text=f"it has the dtype {place.written[:40]}, which is not known")
    stretch = Stretch(fd, place.begin, str(path))

    def fill(into: torch.Tensor, parts: Sequence[Part], what: str) -> None:
        for part in parts:
            read_box(stretch, place.shape, part.box, view_of(into, part), 0)

    same = (fd, place.begin) if place.size else None
    return Stored(dtype=getattr(torch, place.dtype), shape=place.shape, file=path, fill=fill, same=same)
