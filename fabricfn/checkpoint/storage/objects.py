"""The objects under a URL, through fsspec: a few functions, each patient and named in its errors. No torch.

The only file that names fsspec, and the only one that knows how its file systems differ.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from fabricfn.checkpoint.storage.retrying import patient
from fabricfn.errors import CheckpointError

T = TypeVar("T")
R = TypeVar("R")
Options = Mapping[str, Any] | None
"""`storage_options` of a user: arguments of the file system, or None."""

LOCAL = re.compile(r"(?:file|local)://")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")

OBJECT_STORES = {
    *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"),
    *("oci", "oss", "ossfs", "tos", "obs", "cos", "cosn", "bos", "b2", "r2", "swift"),
}
"""Where one put replaces an object in one step, and folders are but names."""

PART = 16 << 20
"""Bytes of a part of an upload; a rank holds two of them in memory."""
MOST_PARTS = 9_000
"""S3 allows 10,000."""
UPLOAD_PATIENCE = 900.0
"""Seconds in which an upload that failed is begun again."""
REQUESTS = 16
"""How many requests are under way at once."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """The objects under one URL. Their names are relative to it: "data/r00000-000.safetensors"."""

    url: str
    fs: Any
    """The file system of fsspec."""
    root: str
    """The URL as the file system has it."""
    replaces: bool
    """It is an object store: a put is one step, also where something stands."""

    def at(self, name: str) -> str:
        """The file system's name of an object."""
        return f"{self.root}/{name}"


def _text(path: str | os.PathLike[str] | None) -> str:
    if path is None:
        raise CheckpointError(
            "the path is None, which ff.latest returns where no whole checkpoint is. Write `if path :="
            " ff.latest(folder): state = ff.load(rt, path, state)`."
        )
    try:
        return os.fspath(path)
    except TypeError:
        raise CheckpointError(
            f"a path is a string or a pathlib.Path, this is a {type(path).__name__}. The path comes before the tree:"
            " ff.save(rt, path, tree), ff.load(rt, path, like)."
        ) from None


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL that a path is, without a slash at its end; None for local paths, and for file:// too.

    Raises:
        CheckpointError: it was a URL before `pathlib` made "s3:/bucket" of it.
    """
    text = _text(path)
    if "://" in text:
        head, mark, rest = text.partition("://")
        return None if LOCAL.match(text) else head + mark + rest.rstrip("/")
    scheme = SCHEME.match(text)
    if scheme and text[scheme.end() : scheme.end() + 1] == "/" and not os.path.exists(scheme[0]):
        mark = "///" if LOCAL.match(f"{scheme[0]}//") else "//"
        fixed = f"{scheme[0]}{mark}{text[scheme.end() :].lstrip('/')}"
        raise CheckpointError(
            f"{text!r} was a URL: pathlib turns its two slashes into one. Write it as a string: {fixed!r}."
        )
    return None


def local_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path, links resolved; also of a file:// URL. Other URLs are refused."""
    if url_of(path) is not None:
        raise CheckpointError(f"{os.fspath(path)!r} is a URL; this function takes a path on a disk only.")
    return Path(os.path.realpath(LOCAL.sub("", os.fspath(path), count=1)))


def unresolved(path: str | os.PathLike[str]) -> Path:
    """As `local_path`, with the links in it."""
    local_path(path)
    return Path(os.path.abspath(LOCAL.sub("", os.fspath(path), count=1)))


def objects_at(url: str, options: Options) -> Objects:
    """What is under a URL; no request is made.

    Raises:
        CheckpointError: fsspec, or the package for this kind of URL, is not installed or does not take the options.
    """
    try:
        import fsspec.core
    except ImportError as error:
        raise CheckpointError(
            f"{url} is a URL; those are read and written through fsspec: pip install 'fabricfn[remote]' (for s3://"
            " pip install 'fabricfn[s3]')."
        ) from error
    try:
        # fsspec has no types
        found: Any = fsspec.core.url_to_fs(url, **dict(options or {}))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    except ImportError as error:
        hint = "pip install 'fabricfn[s3]'" if url.startswith("s3") else "install the package that it names"
        raise CheckpointError(f"{url} needs a package of its own ({error}): {hint}.") from error
    except Exception as error:  # each kind of store raises its own
        raise CheckpointError(f"{url} cannot be opened: {type(error).__name__}: {error}.") from error
    fs, root = found
    names: Any = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return Objects(url=url, fs=fs, root=str(root).rstrip("/"), replaces=bool(OBJECT_STORES & set(names)))


def get(objects: Objects, name: str, begin: int, end: int) -> bytes:
    """The bytes from `begin` up to `end`, fewer where the object ends. Raises FileNotFoundError."""
    what = f"reading {objects.url}/{name}"
    data: bytes = patient(what, lambda: objects.fs.cat_file(objects.at(name), start=begin, end=end))
    if len(data) > end - begin:
        raise CheckpointError(f"{what} gave {len(data):,} bytes for {end - begin:,}: the server must serve ranges.")
    return data


def size_of(objects: Objects, name: str) -> int | None:
    """The size of an object, asked of the store. Raises FileNotFoundError."""

    def ask() -> int | None:
        objects.fs.invalidate_cache()  # what was listed before another process wrote is worth nothing
        return objects.fs.info(objects.at(name))["size"]

    return patient(f"asking for the size of {objects.url}/{name}", ask)


def put(objects: Objects, name: str, data: bytes) -> None:
    """Write a small object in one step; once, since what a failure of it means depends on the object."""
    objects.fs.pipe_file(objects.at(name), data)


def upload(objects: Objects, name: str, size: int, fill: Callable[[Callable[[memoryview | bytes], Any]], T]) -> T:
    """Stream into a new object, in parts where the store has them, and return what `fill` returned.

    Args:
        objects: where.
        name: of the object.
        size: its bytes, from which follows how large the parts must be.
        fill: writes all bytes by the function it is given; it is called again when the upload has to be begun anew.
    """
    part = max(PART, -(-size // MOST_PARTS // PART) * PART)

    def once() -> T:
        file: Any = objects.fs.open(objects.at(name), "wb", block_size=part)
        try:
            found = fill(file.write)
            file.close()
            return found
        except BaseException:
            _abandon(file)
            raise

    try:
        return patient(f"writing {objects.url}/{name}", once, UPLOAD_PATIENCE)
    except FileNotFoundError as error:
        raise CheckpointError(f"writing {objects.url}/{name} failed: there is no such place ({error}).") from error


def _abandon(file: Any) -> None:
    """Close a file of fsspec without what closing does: completing the object."""
    with contextlib.suppress(Exception):
        file.discard()
    try:
        file.closed = True
    except AttributeError:  # a plain file: nothing there waits for its end
        with contextlib.suppress(Exception):
            file.close()


def make_folder(objects: Objects, name: str) -> None:
    """A folder, where folders must be made. In an object store that would make buckets."""
    if not objects.replaces:
        what = f"making {objects.url}/{name}"
        patient(what, lambda: objects.fs.makedirs(objects.at(name), exist_ok=True))


def listed(objects: Objects, folder: str = "") -> dict[str, bool]:
    """The names right under the URL or a folder of it, and whether each is a folder; nothing where nothing is."""
    root = objects.at(folder).rstrip("/")

    def ask() -> list[dict[str, Any]]:
        objects.fs.invalidate_cache()
        return objects.fs.ls(root, detail=True)

    try:
        entries = patient(f"listing {objects.url}/{folder}".rstrip("/"), ask)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {str(entry["name"]).rstrip("/"): entry["type"] == "directory" for entry in entries}
    return {name.rpartition("/")[2]: folder for name, folder in found.items() if name.strip("/") != root.strip("/")}


def is_object(objects: Objects, name: str = "") -> bool:
    """Whether there is an object of this name, or at the URL itself."""

    def ask() -> bool:
        objects.fs.invalidate_cache()
        return bool(objects.fs.isfile(objects.at(name).rstrip("/")))

    return patient(f"looking at {objects.url}/{name}".rstrip("/"), ask)


def modified(objects: Objects, name: str) -> datetime | None:
    """When an object was written, by the store's clock; None where that is not to be had."""
    try:
        found: Any = patient(f"asking for the time of {objects.url}/{name}", _time_of(objects, name))
    except (FileNotFoundError, CheckpointError):
        return None
    return found if isinstance(found, datetime) else None


def _time_of(objects: Objects, name: str) -> Callable[[], Any]:
    def ask() -> Any:
        objects.fs.invalidate_cache()
        try:
            return objects.fs.modified(objects.at(name))
        except NotImplementedError:  # a store that tells no times: nothing of it is swept
            return None

    return ask


def delete(objects: Objects, names: Iterable[str]) -> None:
    """Delete objects; those that are gone already are no matter."""

    def one(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            patient(f"deleting {objects.url}/{name}", lambda: objects.fs.rm_file(objects.at(name)))

    at_once(one, list(names))


def at_once(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` for each item, as many requests at once as are good for a store; the results in order."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(REQUESTS, len(items))) as pool:
        return list(pool.map(work, items))
