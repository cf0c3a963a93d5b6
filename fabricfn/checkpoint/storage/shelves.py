"""A folder of checkpoints, on a disk or at a URL: what may be a checkpoint there. No torch."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fabricfn.checkpoint.format.manifest import DATA, MANIFEST
from fabricfn.checkpoint.storage.objects import (
    Objects,
    Options,
    is_object,
    listed,
    local_path,
    modified,
    objects_at,
    url_of,
)
from fabricfn.checkpoint.storage.opening import ASIDE, standing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """A folder that may hold checkpoints."""

    path: Path | str
    names: Callable[[], list[str]]
    """The names of what may be a checkpoint in it, in any order; nothing where the folder does not exist."""
    place: Callable[[str], Path | str]
    """name -> its path or URL."""
    time: Callable[[str], float]
    """name -> when it was committed; 0 where that is not known."""
    begun: Callable[[str], bool]
    """name -> it has at least a manifest or data."""
    is_checkpoint: Callable[[], bool]
    """Whether the folder is a checkpoint itself."""


def shelf_at(folder: str | os.PathLike[str], options: Options) -> Shelf:
    """The shelf at a path or URL."""
    url = url_of(folder)
    if url is not None:
        return _shelf_at_url(objects_at(url, options))
    place = local_path(folder)

    def names() -> list[str]:
        if not place.is_dir():
            return []
        found: set[str] = set()
        for entry in place.iterdir():
            aside = ASIDE.fullmatch(entry.name)
            if aside is not None:
                found.add(aside[1])  # a killed save had put it aside; `opened` finds it by its true name
            elif entry.name[0] != "." and entry.is_dir():
                found.add(entry.name)
        return list(found)

    def time(name: str) -> float:
        with contextlib.suppress(OSError):
            return (standing(place / name, False) / MANIFEST).stat().st_mtime
        return 0.0

    return Shelf(
        path=place,
        names=names,
        place=lambda name: place / name,
        time=time,
        begun=lambda name: any((standing(place / name, False) / part).exists() for part in (MANIFEST, DATA)),
        is_checkpoint=(place / MANIFEST).exists,
    )


def _shelf_at_url(objects: Objects) -> Shelf:
    def time(name: str) -> float:
        found = modified(objects, f"{name}/{MANIFEST}")
        return 0.0 if found is None else found.timestamp()

    return Shelf(
        path=objects.url,
        names=lambda: [name for name, folder in listed(objects).items() if folder and name[0] != "."],
        place=lambda name: f"{objects.url.rstrip('/')}/{name}" if objects.root else f"{objects.url}{name}",
        time=time,
        begun=lambda name: not {MANIFEST, DATA}.isdisjoint(listed(objects, name)),
        is_checkpoint=lambda: is_object(objects, MANIFEST),
    )


def name_of(place: Path | str) -> str:
    """The last part of a path or URL."""
    return os.fspath(place).rstrip("/").rpartition("/")[2]


def in_order(shelf: Shelf, numbers: Callable[[str], list[int]]) -> Sequence[str]:
    """The names, by their numbers; by the time of the commit where those are the same. Times may cost a request."""
    by_numbers: dict[tuple[int, ...], list[str]] = {}
    for name in shelf.names():
        by_numbers.setdefault(tuple(numbers(name)), []).append(name)
    same = [by_numbers[key] for key in sorted(by_numbers)]
    return [name for names in same for name in (sorted(names, key=shelf.time) if len(names) > 1 else names)]
