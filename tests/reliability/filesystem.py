"""A small model of a file system: it records the os calls that really run, and tells what a power failure may leave.

[Note: power failure] What was written to a file since its last fsync may be there or not, each write on its own, or in
part, or as zeros. A change of names (mkdir, create, rename, exchange, unlink, rmdir) is safe once the folder was
fsynced; until then it may be there or not, each on its own; one rename or exchange within a folder is there or not as
a whole. That is less than any real file system promises.
"""

import contextlib
import ctypes
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from fabricfn.checkpoint.format import writing
from fabricfn.checkpoint.storage import commit

NAMES = ("create", "mkdir", "rename", "exchange", "unlink", "rmdir")
"""The kinds of calls that change names."""


class Call(NamedTuple):
    """One call that changed something, or made it safe."""

    kind: str
    """Of NAMES, "write" or "fsync"."""
    node: int
    """The file or folder that was made, written or flushed; of the other kinds, the folder of the names."""
    folder: int = 0
    names: tuple[str, ...] = ()
    """The name in `folder`; of a rename and an exchange, both."""
    start: int = 0
    data: bytes = b""


class Recorder:
    """Runs the calls and writes them down. Numbers of nodes are those of the model; the root is 0."""

    def __init__(self, root: Path, before: Callable[[str, str], None] = lambda kind, path: None) -> None:
        self.root = str(root)
        self.before = before
        """Called with the kind and the path before each call; what it raises, the call raises."""
        self.calls: list[Call] = []
        self.nodes: dict[tuple[int, int], int] = {}
        self.lock = threading.RLock()
        self.real = {name: getattr(os, name) for name in ("open", "mkdir", "rename", "unlink", "rmdir", "fsync")}
        self._know(self.root, 0)

    def _know(self, path: str | int, node: int | None = None) -> int:
        facts = os.stat(path, follow_symlinks=False) if isinstance(path, str) else os.fstat(path)
        key = facts.st_dev, facts.st_ino
        if node is not None or key not in self.nodes:
            self.nodes[key] = len(self.nodes) if node is None else node
        return self.nodes[key]

    def _split(self, path: Any, dir_fd: int | None) -> tuple[str, str]:
        text = os.fspath(path)
        folder = f"/proc/self/fd/{dir_fd}" if dir_fd is not None and not os.path.isabs(text) else os.path.dirname(text)
        return os.path.realpath(folder), os.path.basename(text)

    def _inside(self, folder: str) -> bool:
        return f"{folder}/".startswith(f"{self.root}/")

    def names(self, kind: str, run: Callable[[], Any], *paths: Any, dir_fd: int | None = None) -> Any:
        """Run a call that changes names, and write it down when it succeeded."""
        with self.lock:
            folder, name = self._split(paths[0], dir_fd)
            if not self._inside(folder):
                return run()
            self.before(kind, f"{folder}/{name}")
            held = self._know(folder)
            found = run()
            second = [self._split(path, None) for path in paths[1:]]
            assert all(other == folder for other, _ in second), "a rename between two folders is not in the model"
            node = held
            if kind in ("create", "mkdir"):
                node = max(self.nodes.values()) + 1  # numbers of inodes are used again
                self._know(f"{folder}/{name}", node)
            self.calls.append(Call(kind, node, held, (name, *(other for _, other in second))))
            return found

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def run() -> int:
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)

        if not flags & os.O_CREAT:
            return run()
        assert flags & os.O_EXCL and not flags & os.O_TRUNC, "the model knows new files only"
        return self.names("create", run, path, dir_fd=dir_fd)

    def fsync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        with self.lock:
            if not self._inside(path):
                return self.real["fsync"](fd)
            self.before("fsync", path)
            self.real["fsync"](fd)
            self.calls.append(Call("fsync", self._know(fd)))

    def exchange(self, a: bytes, b: bytes, run: Callable[[], int]) -> int:
        try:
            found = self.names("exchange", lambda: _checked(run()), os.fsdecode(a), os.fsdecode(b))
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1
        return found


def _checked(code: int) -> int:
    if code:
        raise OSError(ctypes.get_errno(), "renameat2")
    return code


class File(io.FileIO):
    """A real file whose writes are written down."""

    recorder: Recorder

    def write(self, data: Any) -> int:
        recorder = self.recorder
        with recorder.lock:
            path = os.readlink(f"/proc/self/fd/{self.fileno()}")
            start = self.tell()
            recorder.before("write", path)
            count = super().write(data)
            if recorder._inside(path):
                copy = bytes(memoryview(data).cast("B")[:count])
                recorder.calls.append(Call("write", recorder._know(self.fileno()), start=start, data=copy))
            return count


@contextlib.contextmanager
def recorded(recorder: Recorder) -> Iterator[Recorder]:
    """Within this block, what fabricfn's checkpoints do to files under the root is written down, from any thread."""

    def opened(fd: int, mode: str, buffering: int) -> io.BufferedWriter:
        assert mode == "wb"
        file = File(fd, "wb")
        file.recorder = recorder
        return io.BufferedWriter(file, buffering)

    real = recorder.real
    library = ctypes.CDLL

    def loaded(*args: Any, **options: Any) -> Any:
        found = library(*args, **options)

        class Library:
            @staticmethod
            def renameat2(fd_a: int, a: bytes, fd_b: int, b: bytes, flags: int) -> int:
                assert fd_a == fd_b == commit.AT_FDCWD and flags == commit.RENAME_EXCHANGE
                return recorder.exchange(a, b, lambda: found.renameat2(fd_a, a, fd_b, b, flags))

        return Library

    patches = {
        "open": recorder.open,
        "fsync": recorder.fsync,
        "mkdir": lambda path, mode=0o777: recorder.names("mkdir", lambda: real["mkdir"](path, mode), path),
        "rename": lambda a, b: recorder.names("rename", lambda: real["rename"](a, b), a, b),
        "unlink": lambda path, *, dir_fd=None: recorder.names(
            "unlink", lambda: real["unlink"](path, dir_fd=dir_fd), path, dir_fd=dir_fd
        ),
        "rmdir": lambda path, *, dir_fd=None: recorder.names(
            "rmdir", lambda: real["rmdir"](path, dir_fd=dir_fd), path, dir_fd=dir_fd
        ),
    }
    with contextlib.ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(patch.object(os, name, function))
        stack.enter_context(patch.object(writing, "open", opened, create=True))
        stack.enter_context(patch.object(ctypes, "CDLL", loaded))
        yield recorder


class Disk:
    """What is on the disk when some of the calls reached it. Folders are dicts, files are bytearrays."""

    def __init__(self, start: "Disk | None" = None) -> None:
        self.folders: dict[int, dict[str, int]] = {0: {}}
        self.files: dict[int, bytearray] = {}
        if start is not None:
            self.folders = {node: dict(names) for node, names in start.folders.items()}
            self.files = {node: bytearray(data) for node, data in start.files.items()}

    def apply(self, call: Call) -> None:
        """Let a call reach the disk; a change of names whose names are not there changes nothing."""
        if call.kind == "write":
            data = self.files.setdefault(call.node, bytearray())
            data.extend(bytes(max(0, call.start + len(call.data) - len(data))))
            data[call.start : call.start + len(call.data)] = call.data
        if call.kind not in NAMES:
            return
        names = self.folders.setdefault(call.folder, {})
        first, second = call.names[0], call.names[-1]
        if call.kind == "create":
            names[first] = call.node
            self.files.setdefault(call.node, bytearray())
        elif call.kind == "mkdir":
            names[first] = call.node
            self.folders.setdefault(call.node, {})
        elif call.kind in ("unlink", "rmdir"):
            names.pop(first, None)
        elif call.kind == "rename" and first in names and not self.folders.get(names.get(second, -1)):
            names[second] = names.pop(first)
        elif call.kind == "exchange" and first in names and second in names:
            names[first], names[second] = names[second], names[first]

    def put(self, place: Path, node: int = 0) -> None:
        """Make it real."""
        place.mkdir(exist_ok=True)
        for name, child in self.folders[node].items():
            if child in self.folders:
                self.put(place / name, child)
            else:
                (place / name).write_bytes(self.files[child])


def taken(recorder: Recorder) -> Disk:
    """What stands under the root now, all of it safe."""
    disk = Disk()

    def walk(place: Path, node: int) -> None:
        for child in sorted(place.iterdir()):
            number = recorder._know(str(child))
            disk.folders[node][child.name] = number
            if child.is_dir():
                disk.folders[number] = {}
                walk(child, number)
            else:
                disk.files[number] = bytearray(child.read_bytes())

    walk(Path(recorder.root), 0)
    return disk


def safe(calls: list[Call]) -> list[bool]:
    """Of each call whether a later fsync of its file or folder made it safe."""
    flushed: set[int] = set()
    found = []
    for call in reversed(calls):
        if call.kind == "fsync":
            flushed.add(call.node)
        found.append((call.folder if call.kind in NAMES else call.node) in flushed)
    return found[::-1]


WAYS = ("all", "none", "names only", "data only", "random", "random", "random", "random")
"""What of that which is not safe reaches the disk."""


def after_failure(start: Disk, calls: list[Call], way: str, dice: random.Random) -> Disk:
    """The disk after a power failure at the end of `calls`."""
    disk = Disk(start)
    for call, is_safe in zip(calls, safe(calls), strict=True):
        named = call.kind in NAMES
        there = {"all": True, "none": False, "names only": named, "data only": not named}.get(way)
        if is_safe or (dice.random() < 0.5 if there is None else there):
            disk.apply(call)
        elif way == "random" and call.kind == "write" and call.data:
            part = call.data[: dice.randrange(len(call.data))]
            disk.apply(call._replace(data=dice.choice([part, bytes(len(call.data))])))
    return disk
