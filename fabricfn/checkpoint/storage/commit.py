"""How a checkpoint appears: whole, by one rename. A kill at any instant leaves the old or the new one.

Everything is written into a hidden folder beside the target and flushed; then it takes the target's place. Where a
checkpoint stands already, the kernel exchanges the two folders in one step (`renameat2`); where it cannot, the old one
is renamed aside first, and a reader that finds nothing at the target takes that one (`opening.standing`). A hidden
folder left by a killed save is removed by the next save to the same target, or a day later by one to another target
beside it; the folder of a living one is locked.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fabricfn.checkpoint.format.manifest import DATA, MANIFEST, Manifest, to_bytes
from fabricfn.checkpoint.format.writing import sync_folder, write_file
from fabricfn.checkpoint.storage.store import foreign
from fabricfn.errors import CheckpointError

AT_FDCWD = -100
RENAME_EXCHANGE = 2
WORK = re.compile(r"\.tmp-.+-[0-9a-f]{32}", re.DOTALL)
ABANDONED = 86_400.0
"""Seconds; far more than a save takes, since not all network file systems have locks that other machines see."""
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def check_target(target: Path) -> None:
    """Refuse to replace anything but a checkpoint or an empty folder."""
    if not target.name:
        raise CheckpointError(f"{target} cannot be a checkpoint. Name a folder of its own: {target / 'step-1'}.")
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(
            f"{target} is a file; a checkpoint is a folder, and takes the place of nothing but a checkpoint. Choose"
            " another path, or remove the file."
        )
    data = target / DATA
    found = foreign(os.listdir(target), lambda: os.listdir(data) if data.is_dir() else ())
    if found:
        raise CheckpointError(
            f"{target} holds files that no checkpoint has ({', '.join(found[:3])}); saving there would delete them."
            f" Name a folder of its own: {target / 'step-1'}."
        )


def make_folders(path: Path) -> None:
    """Make a folder and its missing parents, all of them on the disk when this returns."""
    if path.is_dir():
        return
    make_folders(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    sync_folder(str(path.parent))


def flush_parents(path: Path) -> None:
    """Put the names of a folder and of its parents on the disk, up to where the disk is mounted.

    For a folder without content: a save that was killed, or the caller, may just have made it.
    """
    while not os.path.ismount(path):
        path = path.parent
        with contextlib.suppress(OSError):  # not ours to open
            sync_folder(str(path))


def work_at(target: Path, save_id: str) -> Path:
    """The hidden folder beside the target in which a save writes."""
    return target.parent / f".tmp-{target.name}-{save_id}"


def work_folder(target: Path, save_id: str) -> tuple[Path, int]:
    """A new hidden folder beside the target, locked until the descriptor is closed.

    Returns:
        the folder and the descriptor.
    """
    make_folders(target.parent)
    if not os.listdir(target.parent):
        flush_parents(target.parent)
    sweep(target, "tmp")
    if target.exists():
        sweep(target, "old")
    work = work_at(target, save_id)
    with contextlib.ExitStack() as undo:  # a disk without room for the second folder, Ctrl-C
        undo.callback(remove, work)
        os.mkdir(work)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, lock)
        with contextlib.suppress(OSError):  # no locks on this file system: then nothing is ever swept there
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.mkdir(work / DATA)
        sweep_others(work)
        undo.pop_all()
    return work, lock


def sweep(target: Path, kind: str) -> None:
    """Remove what killed saves to this target left: their work folders ("tmp") or what they had put aside ("old")."""
    pattern = re.compile(rf"\.{kind}-{re.escape(target.name)}-[0-9a-f]{{32}}")
    remove_unlocked(target.parent, list(filter(pattern.fullmatch, os.listdir(target.parent))))


def sweep_others(work: Path) -> None:
    """Remove the work folders of saves to other targets that were killed a day before `work` was made, or earlier.

    A run that is resumed need not save the very step again at which it was killed.
    """
    now = os.stat(work).st_mtime
    found: list[str] = []
    for name in filter(WORK.fullmatch, os.listdir(work.parent)):
        with contextlib.suppress(OSError):
            if now - os.stat(work.parent / name).st_mtime > ABANDONED:
                found.append(name)
    remove_unlocked(work.parent, found)


def remove_unlocked(parent: Path, names: Sequence[str]) -> None:
    """Remove those hidden folders of saves that no living process has locked."""
    if not names:
        return
    with contextlib.suppress(OSError):  # where nothing can be flushed, nothing is removed
        # First the renames of the killed save, or a power failure could find the old checkpoint removed, the new gone.
        sync_folder(str(parent))
        for name in names:
            with contextlib.suppress(OSError):  # it is locked, just gone, or not ours to remove
                fd = os.open(parent / name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(parent / name)
                finally:
                    os.close(fd)


def remove(folder: Path) -> None:
    """Remove a folder, its manifest first: a removal that is killed leaves nothing that looks whole."""
    with contextlib.suppress(OSError):
        os.unlink(folder / MANIFEST)
    shutil.rmtree(folder, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False when the system cannot."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library from before 2018
        return False
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(b))


def commit(work: Path, target: Path, manifest: Manifest) -> int:
    """Write the manifest, flush everything, put the folder in its place; returns the manifest's size."""
    for name, size in manifest.files:
        if os.stat(work / name).st_size != size:
            raise CheckpointError(
                f"{work / name} has not the {size:,} bytes that its rank wrote. All ranks must see one file system at"
                f" {target.parent}."
            )
    size, _ = write_file(str(work / MANIFEST), to_bytes(manifest), ())
    sync_folder(str(work / DATA))
    put_in_place(work, target)
    try:
        sync_folder(str(target.parent))
    except OSError as error:
        raise CheckpointError(
            f"{target} was written and renamed, but {target.parent} could not be flushed ({error}); the checkpoint is"
            " whole, and may be gone after a power failure."
        ) from error
    return size


def put_in_place(work: Path, target: Path, exchange: Callable[[Path, Path], bool] = exchange) -> None:
    """Make the flushed folder `work` the checkpoint `target`.

    What stood there is afterwards at `work`, or in a hidden folder that `sweep(target, "old")` removes.
    """
    sync_folder(str(work))
    if not target.exists() or not os.listdir(target):
        os.rename(work, target)
    elif not exchange(work, target):
        aside = target.parent / work.name.replace(".tmp-", ".old-", 1)
        os.rename(target, aside)
        try:
            os.rename(work, target)
        except OSError:
            os.rename(aside, target)
            raise


def clear(work: Path, target: Path, lock: int) -> None:
    """Remove the work folder, or the replaced checkpoint in it, and what was put aside for a target that stands."""
    os.close(lock)
    remove(work)
    if target.exists():
        sweep(target, "old")
