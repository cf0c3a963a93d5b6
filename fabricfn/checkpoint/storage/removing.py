"""Removing checkpoints from a disk or a store: a kill at any instant leaves each of them whole or gone. No torch."""

import contextlib
import os
import shutil
from pathlib import Path

from fabricfn.checkpoint.format.manifest import DATA, MANIFEST
from fabricfn.checkpoint.storage import commit, uploading
from fabricfn.checkpoint.storage.objects import Objects, Options, delete, objects_at
from fabricfn.checkpoint.storage.opening import ASIDE, opened, standing
from fabricfn.errors import CheckpointError


def discard(place: Path | str, save_id: str, options: Options) -> bool:
    """Remove a checkpoint; False when another one took its place meanwhile.

    Args:
        place: its path or URL.
        save_id: the one it has.
        options: of the file system of a URL.

    Raises:
        CheckpointError: it holds files of others; nothing was deleted.
    """
    if isinstance(place, Path):
        return _discard(place, save_id)
    objects = objects_at(place, options)
    uploading.check_foreign(objects)
    if not _is(place, save_id, options):
        return False
    delete(objects, [MANIFEST])
    delete(objects, [*uploading.data_names(objects), *uploading.exported(objects)])
    _remove_folders(objects)
    return True


def _discard(path: Path, save_id: str) -> bool:
    """It is renamed aside, to the name under which readers still find it, until its manifest goes.

    What was renamed is looked at again, since a save may have exchanged it in between.
    """
    place = standing(path, say=False)
    commit.check_target(place)
    aside = place
    if place == path:
        commit.sweep(place, "old")  # what a killed save put aside for this one would come back in its place
        aside = place.parent / f".old-{place.name}-{save_id}"
        os.rename(place, aside)
        if not _is(aside, save_id, None):
            os.rename(aside, place)
            return False
    os.unlink(aside / MANIFEST)
    shutil.rmtree(aside)
    return True


def _is(place: Path | str, save_id: str, options: Options) -> bool:
    """Whether the checkpoint there, if it can be opened, is this one."""
    with contextlib.suppress(CheckpointError), opened(place, say=False, options=options) as source:
        return source.manifest.save_id == save_id
    return True


def _remove_folders(objects: Objects) -> None:
    """A store has none; a file system behind a URL keeps them."""
    if not objects.replaces:
        for folder in (DATA, ""):
            with contextlib.suppress(Exception):  # not empty, or gone
                objects.fs.rmdir(objects.at(folder).rstrip("/"))


def sweep_discarded(folder: Path) -> None:
    """Remove what killed removals left: folders put aside that have no manifest any more."""
    for entry in folder.iterdir():
        if ASIDE.fullmatch(entry.name) and entry.is_dir() and not (entry / MANIFEST).exists():
            shutil.rmtree(entry)
