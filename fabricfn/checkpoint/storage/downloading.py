"""Opening a checkpoint at a URL: requests for what is needed, each patient, every byte checked. No torch."""

import functools
from collections.abc import Sequence

from fabricfn.checkpoint.format.manifest import DATA, MANIFEST, MANIFEST_LIMIT, Manifest, path_text, paths_of
from fabricfn.checkpoint.format.pieces import Source, data_origin
from fabricfn.checkpoint.format.validation import from_bytes
from fabricfn.checkpoint.format.writing import Entry, entries_of
from fabricfn.checkpoint.storage.objects import Objects, Options, at_once, get, is_object, listed, objects_at, size_of
from fabricfn.errors import CheckpointError

TURNS = 10
"""How often a checkpoint that is replaced while it is opened or loaded is opened again."""


class Replaced(CheckpointError):
    """Another checkpoint took this one's place while it was read."""


def open_url(url: str, options: Options) -> Source:
    """The checkpoint at a URL, whose manifest, file sizes and file headers were checked.

    Raises:
        CheckpointError: there is none, it is not whole, or the store does not answer.
    """
    objects = objects_at(url, options)
    for _ in range(TURNS):
        data = manifest_bytes(objects)
        if data is None:
            raise _missing(objects)
        manifest = from_bytes(data, f"{url}/{MANIFEST}")
        try:
            found = _origins(objects, manifest)
        except FileNotFoundError as gone:
            if manifest_bytes(objects) == data:
                raise CheckpointError(
                    f"{url} is not a whole checkpoint: {gone.filename} is missing. Load another one: ff.latest(folder)"
                    " finds the newest whole one."
                ) from None
            continue  # another checkpoint took the place meanwhile
        return _source(objects, data, manifest, found)
    raise CheckpointError(f"{url} was replaced {TURNS} times while it was opened. Save to a new name each time.")


def _source(objects: Objects, data: bytes, manifest: Manifest, origins: tuple[int, ...]) -> Source:
    def read(file: int, begin: int, into: memoryview) -> int:
        name = manifest.files[file][0]
        try:
            part = get(objects, name, begin, begin + into.nbytes)
        except FileNotFoundError:
            raise _vanished(objects, name, data) from None
        into[: len(part)] = part
        return len(part)

    total = len(data) + sum(size for _, size in manifest.files)
    return Source(path=objects.url, manifest=manifest, size=total, origins=origins, read=read, remote=True)


def manifest_bytes(objects: Objects) -> bytes | None:
    """What `manifest.json` holds, one byte more than is allowed at most; None when there is none."""
    try:
        return get(objects, MANIFEST, 0, MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        return None


def inside(manifest: Manifest, name: str, entries: Sequence[Entry]) -> str:
    """What was in a data file that is missing."""
    paths = paths_of(manifest.tree)
    places = [path_text(paths[int(key.partition(".")[0])]) for key, _, _ in entries]
    return f"{name} with {', '.join(places[:4]) or 'nothing'}{', ...' if len(places) > 4 else ''}"


def _origins(objects: Objects, manifest: Manifest) -> tuple[int, ...]:
    """Where the data section of each file begins, when their sizes and headers are what the manifest says."""
    entries = entries_of(manifest.leaves, len(manifest.files))
    numbers = range(len(entries))
    return tuple(at_once(lambda number: _origin(objects, manifest, number, entries[number]), numbers))


def _origin(objects: Objects, manifest: Manifest, number: int, entries: Sequence[Entry]) -> int:
    name, size = manifest.files[number]
    try:
        begin = functools.partial(get, objects, name, 0)
        return data_origin(f"{objects.url}/{name}", manifest, size, entries, size_of(objects, name) or 0, begin)
    except FileNotFoundError as gone:
        raise FileNotFoundError(gone.errno, "", inside(manifest, name, entries)) from None


def _vanished(objects: Objects, name: str, manifest: bytes) -> CheckpointError:
    """An object was there when the checkpoint was opened, and is gone."""
    if manifest_bytes(objects) == manifest:
        return CheckpointError(
            f"{objects.url}/{name} is missing; it was there a moment ago. Load another checkpoint: ff.latest(folder)"
            " finds the newest whole one."
        )
    return Replaced(
        f"{objects.url} was replaced by another checkpoint while it was read. Load it again; to read checkpoints"
        " while others are saved, give each save a name of its own."
    )


def _missing(objects: Objects) -> CheckpointError:
    url, names = objects.url, listed(objects)
    if not names:
        parent, _, name = url.rpartition("/")
        return CheckpointError(f"there is no checkpoint at {url}: nothing in {parent} has the name {name!r}.")
    within = [name for name in sorted(names)[-20:] if names[name] and is_object(objects, f"{name}/{MANIFEST}")]
    if within:
        return CheckpointError(
            f"{url} is a folder of checkpoints ({', '.join(within[-3:])}), not one. Write"
            f" ff.load(rt, ff.latest({url!r}), ...)."
        )
    there = f"; {DATA} without one is what a killed save leaves" if DATA in names else ""
    return CheckpointError(
        f"{url} is not a whole checkpoint: {MANIFEST} is missing{there}. Load another one: ff.latest(folder) finds the"
        " newest whole one."
    )
