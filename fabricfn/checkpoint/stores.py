"""Where a checkpoint is written: the functions of one place, by its path."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from fabricfn.checkpoint import commit
from fabricfn.checkpoint.exporting import export_beside
from fabricfn.checkpoint.manifest import Manifest
from fabricfn.checkpoint.opening import local_path
from fabricfn.checkpoint.writing import write_file

Parts = Iterable[Iterable[memoryview]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """How a checkpoint comes to stand at one place."""

    path: Path
    """The place."""
    name: str
    """The same on all ranks that mean the same place."""
    begin: Callable[[str], Callable[[], None]]
    """save id -> what removes all traces of an unfinished save. On rank 0, before any rank writes: what stands there
    may be replaced, and killed saves are swept."""
    write: Callable[[str, str, bytes, Parts], tuple[int, list[tuple[int, ...]]]]
    """(save id, file name, header, parts) -> its size and checksums; safe from a power failure when it returns."""
    export: Callable[[str, Manifest], int]
    """(save id, manifest) -> the bytes of the files for other tools, which it writes. On rank 0, before the commit."""
    commit: Callable[[str, Manifest], int]
    """(save id, manifest) -> the manifest's size. On rank 0, after all ranks have written: the checkpoint stands."""


def store_at(path: str | os.PathLike[str]) -> Store:
    """The store of a path."""
    target = local_path(path)

    def begin(save_id: str) -> Callable[[], None]:
        commit.check_target(target)
        work, lock = commit.work_folder(target, save_id)
        return lambda: commit.clear(work, target, lock)

    return Store(
        path=target,
        name=str(target),
        begin=begin,
        write=lambda save_id, name, head, parts: write_file(str(commit.work_at(target, save_id) / name), head, parts),
        export=lambda save_id, manifest: export_beside(commit.work_at(target, save_id), manifest),
        commit=lambda save_id, manifest: commit.commit(commit.work_at(target, save_id), target, manifest),
    )
