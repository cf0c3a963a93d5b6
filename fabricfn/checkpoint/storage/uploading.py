"""How a checkpoint appears at a URL: data under names of its own, then `manifest.json` by one put. No torch.

A store has no rename, but it replaces one object in one step. So a save writes data objects whose names begin with its
save id, which touch nothing that is there; the manifest is the commit; and only then the data of the checkpoint that it
replaced are deleted. A kill at any instant leaves the old or the new one whole. Data that no manifest names are what a
killed save left, or what a living one is writing: there are no locks, so they are deleted when the store says that they
are a day older than those of a save that has just ended.
"""

import contextlib
from collections.abc import Iterable
from datetime import timedelta

from fabricfn.checkpoint.format.manifest import DATA, EXPORTED, FILE_NAME, MANIFEST, Manifest, to_bytes
from fabricfn.checkpoint.format.validation import from_bytes
from fabricfn.checkpoint.format.writing import put_parts
from fabricfn.checkpoint.storage.downloading import manifest_bytes
from fabricfn.checkpoint.storage.objects import (
    Objects,
    Options,
    at_once,
    delete,
    is_object,
    listed,
    make_folder,
    modified,
    objects_at,
    put,
    size_of,
    upload,
)
from fabricfn.checkpoint.storage.retrying import patient
from fabricfn.checkpoint.storage.store import Clear, Parts, Store, foreign
from fabricfn.errors import CheckpointError

DEAD = timedelta(hours=24)
"""No save takes so long; data of this age that no manifest names belong to none that lives."""


def store_at_url(url: str, options: Options) -> Store:
    """The store of a URL; no request is made, and fsspec is not imported, before its functions are called."""
    sent: set[str] = set()  # the saves whose manifest may stand: their data stay

    def begin(save_id: str) -> Clear:
        objects = objects_at(url, options)
        check_target(objects)
        make_folder(objects, DATA)

        def clear() -> None:
            if save_id not in sent:
                with contextlib.suppress(CheckpointError):  # then a later save sweeps them
                    delete(objects, (name for name in data_names(objects) if name.startswith(f"{DATA}/{save_id}-")))

        return clear

    def write(save_id: str, name: str, head: bytes, size: int, parts: Parts) -> tuple[int, list[tuple[int, ...]]]:
        total = len(head) + size
        objects = objects_at(url, options)
        return total, upload(objects, name, total, lambda write: put_parts(write, write, head, parts()))

    def commit(save_id: str, manifest: Manifest) -> int:
        objects = objects_at(url, options)
        _check_sizes(objects, manifest)
        data = to_bytes(manifest)
        replaced = _replaced(objects)
        sent.add(save_id)
        _put_manifest(objects, data)
        with contextlib.suppress(CheckpointError):  # it stands; a later save sweeps what is left
            _tidy(objects, {name for name, _ in manifest.files}, replaced)
        return len(data)

    def export(save_id: str, manifest: Manifest) -> int:
        raise CheckpointError(f"{url}: an export is written to a disk: ff.consolidate(url, folder).")

    return Store(
        path=url,
        name=url,
        file_name=lambda save_id, rank: f"{DATA}/{save_id}-r{rank:05d}-000.safetensors",
        begin=begin,
        write=write,
        export=export,
        commit=commit,
    )


def check_target(objects: Objects) -> None:
    """Refuse a place that is no prefix of its own, and to replace what cannot be replaced in one step."""
    url = objects.url
    if not objects.root.strip("/"):
        raise CheckpointError(f"{url} cannot be a checkpoint. Name a prefix of its own: {url}step-1.")
    names = listed(objects)
    if not names and is_object(objects):
        raise CheckpointError(f"{url} is an object; a checkpoint is a prefix with objects of its own: {url}/step-1.")
    check_foreign(objects)
    if MANIFEST in names and not objects.replaces:
        raise CheckpointError(
            f"{url} has a checkpoint already, and {url.partition('://')[0]}:// cannot replace a file in one step: a"
            " crash would leave neither. Save under a name that is free, and remove the old one afterwards."
        )


def check_foreign(objects: Objects) -> None:
    """Refuse a prefix that holds objects of others."""
    found = foreign(list(listed(objects)), lambda: listed(objects, DATA))
    if found:
        raise CheckpointError(
            f"{objects.url} holds objects that no checkpoint has ({', '.join(found[:3])}). Name a prefix of its own:"
            f" {objects.url}/step-1."
        )


def data_names(objects: Objects) -> list[str]:
    """The data objects, by their names in a manifest."""
    return list(filter(FILE_NAME.fullmatch, (f"{DATA}/{name}" for name in listed(objects, DATA))))


def _check_sizes(objects: Objects, manifest: Manifest) -> None:
    def check(file: tuple[str, int]) -> None:
        name, size = file
        try:
            found = size_of(objects, name)
        except FileNotFoundError:
            found = None
        if found != size:
            has = "is not there" if found is None else f"has {found:,} bytes"
            raise CheckpointError(
                f"{objects.url}/{name} {has}; its rank wrote {size:,} bytes. All ranks must see one store at"
                f" {objects.url}; memory:// is another one in each process."
            )

    at_once(check, manifest.files)


def _replaced(objects: Objects) -> set[str]:
    """The data objects of the checkpoint that stands; none where it is damaged: then `_tidy` sweeps them by age."""
    data = manifest_bytes(objects)
    try:
        return set() if data is None else {name for name, _ in from_bytes(data, MANIFEST).files}
    except CheckpointError:
        return set()


def _put_manifest(objects: Objects, data: bytes) -> None:
    """The commit. A put whose answer was lost may have done its work: look, before it is done again."""
    tries = 0

    def once() -> None:
        nonlocal tries
        tries += 1
        if tries == 1 or manifest_bytes(objects) != data:
            put(objects, MANIFEST, data)

    try:
        patient(f"writing {objects.url}/{MANIFEST}", once)
    except (FileNotFoundError, CheckpointError) as error:
        with contextlib.suppress(CheckpointError):
            if manifest_bytes(objects) == data:
                return
        raise CheckpointError(
            f"{error} What stood there is whole; if the store did take the manifest, the new checkpoint is."
        ) from error


def _tidy(objects: Objects, mine: set[str], replaced: Iterable[str]) -> None:
    """Delete the data of the checkpoint that was replaced, and of saves that are surely dead."""
    delete(objects, set(replaced) - mine)
    delete(objects, exported(objects))
    strays = [name for name in data_names(objects) if name not in mine]
    now = modified(objects, min(mine)) if strays and mine else None
    if now is None:
        return
    times = at_once(lambda name: modified(objects, name), strays)
    delete(objects, (name for name, time in zip(strays, times, strict=True) if time and now - time > DEAD))


def exported(objects: Objects) -> list[str]:
    """The files of an export, which came with a checkpoint that was copied from a disk."""
    return [name for name in listed(objects) if EXPORTED.fullmatch(name)]
