"""An open checkpoint, and parts of it by position: every block that is read is checked. No torch."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from fabricfn.checkpoint.format.checksums import crc32
from fabricfn.checkpoint.format.manifest import BLOCK, Manifest, Piece
from fabricfn.checkpoint.format.writing import Entry, header
from fabricfn.errors import CheckpointError

AHEAD = 2
"""Blocks that one request to a store fetches at most: a store is slow to answer, not to send."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An open checkpoint. On a disk it stays readable when another one takes its place."""

    path: Path | str
    """Where it was found: a local folder, or a URL."""
    manifest: Manifest
    size: int
    """The bytes of all its files."""
    origins: tuple[int, ...]
    """Where the data section of each data file begins."""
    read: Callable[[int, int, memoryview], int]
    """(number of a file, position, into) -> how many bytes there were, fewer than wanted only where the file ends."""
    remote: bool
    """Each read is a request over a network: many at once pay off, and neighbouring blocks are read together."""


def data_origin(
    where: str, manifest: Manifest, size: int, entries: Sequence[Entry], found: int, begin: Callable[[int], bytes]
) -> int:
    """Where the data section of a data file begins, when its size and its header are what the manifest says.

    Args:
        where: the file, for messages.
        manifest: of the checkpoint.
        size: what the manifest says that the file has, in bytes.
        entries: its pieces, as `entries_of` has them.
        found: what it has.
        begin: n -> its first n bytes.

    Raises:
        CheckpointError: it is of another save, or damaged.
    """
    expected = header(manifest.save_id, entries)
    end = len(expected) + (entries[-1][2].start + entries[-1][2].size if entries else 0)
    if found != size:
        raise CheckpointError(
            f"{where} has {found:,} bytes, the manifest says {size:,}: it is cut off or of another save."
        )
    if found != end:
        raise CheckpointError(
            f"{where} has {found:,} bytes, its pieces in the manifest take {end:,}: one of them is damaged or was"
            " edited."
        )
    if begin(len(expected)) != expected:
        raise CheckpointError(f"{where} begins otherwise than the manifest says: it is damaged or of another save.")
    return len(expected)


class PieceReader:
    """Reads a piece by position and checks every block it touches; blocks that were wanted in part are kept."""

    def __init__(self, source: Source, piece: Piece, what: str) -> None:
        self.source, self.piece = source, piece
        self.what = what
        """The leaf's path, for the message."""
        self.origin = source.origins[piece.file] + piece.start
        self.ahead = AHEAD if source.remote else 1
        self.scratch = memoryview(b"")
        self.first = self.last = 0
        """The blocks that `scratch` holds."""

    def read(self, begin: int, into: memoryview, reach: int = 0) -> None:
        """Fill `into` with the bytes of the piece from `begin`; blocks that are wanted whole go straight there.

        Args:
            begin: where in the piece.
            into: what to fill.
            reach: how far the caller will go on reading, if further; what lies up to there may be fetched already.
        """
        end, number = begin + into.nbytes, begin // BLOCK
        after = -(-max(end, reach) // BLOCK)
        while number * BLOCK < end:
            held = self.first <= number < self.last
            last = self.last if held else min(number + self.ahead, after)
            at, stop = number * BLOCK, min(last * BLOCK, self.piece.size)
            if not held and begin <= at and stop <= end:
                self._fill(number, into[at - begin : stop - begin])
            else:
                low, high = max(at, begin), min(stop, end)
                into[low - begin : high - begin] = self._blocks(number, last)[low - at : high - at]
            number = last

    def check(self) -> None:
        """Read and check the whole piece."""
        for number in range(0, len(self.piece.crc32), self.ahead):
            self._blocks(number, min(number + self.ahead, len(self.piece.crc32)))

    def _blocks(self, first: int, last: int) -> memoryview:
        """Blocks in the buffer."""
        start, stop = first * BLOCK, min(last * BLOCK, self.piece.size)
        if not self.first <= first < last <= self.last:
            if self.scratch.nbytes < stop - start:
                self.scratch = memoryview(bytearray(stop - start))
            self.first = self.last = 0
            self._fill(first, self.scratch[: stop - start])
            self.first, self.last = first, last
        return self.scratch[start - self.first * BLOCK : stop - self.first * BLOCK]

    def _fill(self, first: int, blocks: memoryview) -> None:
        """Read whole blocks, the first of which has this number."""
        begin = self.origin + first * BLOCK
        filled = self.source.read(self.piece.file, begin, blocks)
        for at in range(0, blocks.nbytes, BLOCK):
            block, number = blocks[at : at + BLOCK], first + at // BLOCK
            if at + block.nbytes <= filled and crc32(block, 0) == self.piece.crc32[number]:
                continue
            name = self.source.manifest.files[self.piece.file][0]
            raise CheckpointError(
                f"{self.source.path}/{name} is damaged: the checksum of block {number} of {self.what!r} (bytes"
                f" {begin + at:,} to {begin + at + block.nbytes:,}) is wrong. Load another checkpoint:"
                " ff.latest(folder) finds the newest whole one, ff.verify_checkpoint(path) reads one completely."
            )
