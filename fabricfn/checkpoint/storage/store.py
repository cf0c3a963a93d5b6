"""What a place must do so that a checkpoint can be written there. No torch."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fabricfn.checkpoint.format.manifest import DATA, EXPORTED, FILE_NAME, MANIFEST, Manifest

Clear = Callable[[], None]
Parts = Callable[[], Iterable[Iterable[memoryview]]]
"""The parts of a file in their order, each in chunks; from the beginning at each call."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """How a checkpoint comes to stand at one place."""

    path: Path | str
    """The place: a folder, or a URL."""
    name: str
    """The same on all ranks that mean the same place."""
    file_name: Callable[[str, int], str]
    """(save id, rank) -> the name of the rank's data file in the manifest."""
    begin: Callable[[str], Clear]
    """save id -> what removes all traces of an unfinished save. On rank 0, before any rank writes: what stands there
    may be replaced, and killed saves are swept."""
    write: Callable[[str, str, bytes, int, Parts], tuple[int, list[tuple[int, ...]]]]
    """(save id, file name, header, bytes of all parts, parts) -> its size and checksums; safe from a power failure when
    it returns."""
    export: Callable[[str, Manifest], int]
    """(save id, manifest) -> the bytes of the files for other tools, which it writes. On rank 0, before the commit."""
    commit: Callable[[str, Manifest], int]
    """(save id, manifest) -> the manifest's size. On rank 0, after all ranks have written: the checkpoint stands."""


def foreign(names: Sequence[str], data: Callable[[], Iterable[str]]) -> list[str]:
    """What no checkpoint has, among the names at its place and those in its data folder, which are asked for last."""
    # an export belongs to a checkpoint only where there is one
    ours = (MANIFEST, DATA, *(name for name in names if MANIFEST in names and EXPORTED.fullmatch(name)))
    found = sorted(name for name in names if name not in ours and name[0] != ".")
    if found or DATA not in names:
        return found
    return sorted(name for name in (f"{DATA}/{name}" for name in data()) if not FILE_NAME.fullmatch(name))
