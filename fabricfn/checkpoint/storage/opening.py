"""Opening a checkpoint in a folder, or (by `downloading`) at a URL. No torch.

safetensors' own reader maps the file into memory, where a truncation kills the process. Since the header of a data file
follows from the manifest, it is compared, never parsed.
"""

import contextlib
import errno
import functools
import os
import re
import stat
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from fabricfn.checkpoint.format.manifest import DATA, MANIFEST, MANIFEST_LIMIT, Manifest
from fabricfn.checkpoint.format.pieces import Source, data_origin
from fabricfn.checkpoint.format.validation import from_bytes
from fabricfn.checkpoint.format.writing import entries_of
from fabricfn.checkpoint.storage.downloading import inside, open_url
from fabricfn.checkpoint.storage.objects import Options, local_path, url_of
from fabricfn.errors import CheckpointError

READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
"""Neither a link nor a pipe can lead or hold a reader elsewhere."""

ASIDE = re.compile(r"\.old-(.+)-[0-9a-f]{32}", re.DOTALL)
"""The name under which a replaced checkpoint stands for a moment, its true name inside (see `commit.put_in_place`)."""


OTHERS = "what other tools wrote is read by ff.load_raw(rt, path, like)"


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], say: bool = True, options: Options = None) -> Generator[Source]:
    """The checkpoint at `path`, whose manifest, file sizes and file headers were checked.

    Args:
        path: the folder, or a URL.
        say: warn when the folder is the one that a killed save had put aside.
        options: of the file system of a URL.

    Raises:
        CheckpointError: there is none, or it is not whole; the message names the file.
    """
    url = url_of(path)
    if url is not None:
        yield open_url(url, options)
        return
    wanted = local_path(path)
    with contextlib.ExitStack() as stack:
        while True:
            place = standing(wanted, say)
            before = _inode(place)
            try:
                source = _open(place, stack)
                break
            except NotADirectoryError:
                raise CheckpointError(f"{wanted} is a file, a checkpoint is a folder; {OTHERS}.") from None
            except FileNotFoundError as gone:
                if _inode(place) == before:
                    raise _missing(wanted, gone) from None
                stack.close()  # another checkpoint took the place meanwhile
            except OSError as error:
                raise CheckpointError(f"the checkpoint {place} cannot be opened: {error}.") from error
        yield source


@contextlib.contextmanager
def unfinished(folder: Path, manifest: Manifest) -> Generator[Source]:
    """A checkpoint whose data files are written and whose manifest is not yet."""
    with contextlib.ExitStack() as stack:
        fds: list[int] = []
        origins: list[int] = []
        for number, (name, size) in enumerate(manifest.files):
            fds.append(os.open(folder / name, READ))
            stack.callback(os.close, fds[-1])
            pieces = [piece for leaf in manifest.leaves for piece in leaf.pieces if piece.file == number]
            origins.append(size - sum(piece.size for piece in pieces))
        yield Source(
            path=folder, manifest=manifest, size=0, origins=tuple(origins), read=reader(tuple(fds)), remote=False
        )


def standing(place: Path, say: bool) -> Path:
    """`place`; or, when a save was killed between its two renames, the previous checkpoint that it had put aside."""
    if place.exists() or not place.parent.is_dir():
        return place
    for name in os.listdir(place.parent):
        found = ASIDE.fullmatch(name)
        if found is None or found[1] != place.name or not (place.parent / name / MANIFEST).exists():
            continue
        if say:
            warnings.warn(
                f"{place} was being replaced or removed when that was killed; this is the checkpoint that stood there"
                f" before, {name}.",
                stacklevel=2,
            )
        return place.parent / name
    return place


def _folder(path: str | Path, stack: contextlib.ExitStack, within: int | None = None) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=within)
    stack.callback(os.close, fd)
    return fd


def _file(name: str, stack: contextlib.ExitStack, within: int, what: str) -> tuple[int, int]:
    try:
        fd = os.open(name, READ, dir_fd=within)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{what} is a symbolic link; the files of a checkpoint are plain files.") from None
        raise
    stack.callback(os.close, fd)
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(f"{what} is not a plain file.")
    return fd, facts.st_size


def _open(place: Path, stack: contextlib.ExitStack) -> Source:
    folder = _folder(place, stack)
    fd, manifest_size = _file(MANIFEST, stack, folder, f"{place / MANIFEST}")
    data = read_at(fd, min(manifest_size, MANIFEST_LIMIT + 1), 0)
    manifest = from_bytes(data, str(place / MANIFEST))
    fds: list[int] = []
    origins: list[int] = []
    within = _folder(DATA, stack, folder) if manifest.files else -1
    for (name, size), entries in zip(manifest.files, entries_of(manifest.leaves, len(manifest.files)), strict=True):
        try:
            fd, found = _file(name.removeprefix(DATA + "/"), stack, within, f"{place / name}")
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, inside(manifest, name, entries)) from None
        begin = functools.partial(read_at, fd, start=0)
        origins.append(data_origin(f"{place / name}", manifest, size, entries, found, begin))
        fds.append(fd)
    total = manifest_size + sum(size for _, size in manifest.files)
    return Source(path=place, manifest=manifest, size=total, origins=tuple(origins), read=reader(fds), remote=False)


def reader(fds: Sequence[int]) -> Callable[[int, int, memoryview], int]:
    """`Source.read` of open files."""

    def read(file: int, begin: int, into: memoryview) -> int:
        filled = 0
        while filled < into.nbytes and (count := os.preadv(fds[file], [into[filled:]], begin + filled)):
            filled += count
        return filled

    return read


def _inode(place: Path) -> int | None:
    try:
        return os.stat(place).st_ino
    except FileNotFoundError:
        return None


def _missing(place: Path, gone: FileNotFoundError) -> CheckpointError:
    if not place.is_dir():
        parent = place.parent
        names = sorted(found.name for found in parent.iterdir() if found.name[0] != ".") if parent.is_dir() else []
        there = f"{parent} holds {', '.join(names[:10]) or 'nothing'}" if parent.is_dir() else f"there is no {parent}"
        return CheckpointError(f"there is no checkpoint at {place}; {there}.")
    inside = sorted(found.parent.name for found in place.glob(f"*/{MANIFEST}") if found.parent.name[0] != ".")
    if inside and not (place / MANIFEST).exists():
        return CheckpointError(
            f"{place} is a folder of checkpoints ({', '.join(inside[-3:])}), not one. Write"
            f" ff.load(rt, ff.latest({str(place)!r}), ...)."
        )
    return CheckpointError(
        f"{place} is not a whole checkpoint: {gone.filename or gone.strerror} is missing. Load another one:"
        f" ff.latest(folder) finds the newest whole one; {OTHERS}."
    )


def read_at(fd: int, size: int, start: int) -> bytes:
    """`size` bytes from `start`, fewer where the file ends."""
    found: list[bytes] = []
    while size and (part := os.pread(fd, size, start)):
        found.append(part)
        size, start = size - len(part), start + len(part)
    return b"".join(found)
