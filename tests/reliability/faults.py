"""What a real system refuses: a full disk, a limit of file size, no permission, a read-only disk, a vanished folder.

Each fault is a function that is run in a forked child; it makes the fault real around a save over an old checkpoint.
"""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fabricfn as ff
from tests.reliability.filesystem import Recorder, recorded
from tests.reliability.hostility import guarded
from tests.reliability.scene import ALONE, load_quietly, member, number_of, scratch, tree_of

NOBODY = 65534
MOUNTS = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else [])]


def can_mount() -> bool:
    """Whether this user may mount, in a name space of its own."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return (
        subprocess.run([*MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode
        == 0
    )


@contextlib.contextmanager
def file_limit(folder: Path) -> Iterator[None]:
    """No file may have more than 100,000 bytes: a write fails half-way, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextlib.contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """The folder may be read, not written, by this user."""
    mode = folder.stat().st_mode & 0o7777
    folder.chmod(0o755 if os.geteuid() == 0 else 0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield
    if root:
        os.seteuid(0)
    folder.chmod(mode)


@contextlib.contextmanager
def vanished_work(folder: Path) -> Iterator[None]:
    """Somebody removes the hidden folder in which a save writes, when the manifest is about to be written."""

    def before(kind: str, path: str) -> None:
        if kind == "create" and path.endswith("manifest.json"):
            recorder.before = lambda kind, path: None
            shutil.rmtree(os.path.dirname(path))

    recorder = Recorder(folder, before)
    with recorded(recorder):
        yield


@contextlib.contextmanager
def vanished_folder(folder: Path) -> Iterator[None]:
    """Somebody renames the folder of the checkpoints away before the commit, and back afterwards."""
    away = folder.with_name("away")

    def before(kind: str, path: str) -> None:
        if kind == "exchange":
            recorder.before = lambda kind, path: None
            os.rename(folder, away)

    real_rename = os.rename
    recorder = Recorder(folder, before)
    with recorded(recorder):
        yield
    real_rename(away, folder)


@contextlib.contextmanager
def interrupted(folder: Path) -> Iterator[None]:
    """A real SIGINT arrives while the first data file is written."""

    def before(kind: str, path: str) -> None:
        if kind == "write":
            recorder.before = lambda kind, path: None
            os.kill(os.getpid(), signal.SIGINT)

    recorder = Recorder(folder, before)
    with recorded(recorder):
        yield


FAULTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[None]]] = {
    "a file may not grow": file_limit,
    "no permission": no_permission,
    "the work folder vanishes": vanished_work,
    "the whole folder vanishes": vanished_folder,
    "Ctrl-C": interrupted,
}


def suffered(fault: str, folder: Path, check_left: bool = True) -> tuple[str, str, int | None, list[str]]:
    """Save 0, save 1 under the fault, look, save 2.

    Returns:
        the class of the error, its message, the number that stood after it, and what was left after the next save.
    """
    target = folder / "last"
    ff.save(ALONE, target, tree_of(0))
    kind, text = "no error", ""
    with FAULTS[fault](folder):
        try:
            ff.save(ALONE, target, tree_of(1))
        except BaseException as error:  # whatever it raises is the answer
            kind, text = type(error).__name__, str(error)
    number = number_of(load_quietly(target))
    ff.save(ALONE, target, tree_of(2))
    left = sorted(os.listdir(folder)) if number_of(load_quietly(target)) == 2 else ["not the next one"]
    return kind, text, number, left


def in_child(fault: str) -> tuple[str, str, int | None, list[str]]:
    """`suffered` in a child of its own, whose limits and user end with it."""
    with scratch() as base:
        folder = base / "run"
        folder.mkdir()
        base.chmod(0o755)
        return guarded(lambda: suffered(fault, folder), 1 << 30, 60)


ON_A_MOUNT = """
import os, subprocess, sys
from pathlib import Path
import fabricfn as ff
from tests.reliability.scene import ALONE, load_quietly, number_of, tree_of
folder, how = Path(sys.argv[1]), sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "none", str(folder)], check=True)
target = folder / "last"
ff.save(ALONE, target, tree_of(0))
if how == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
try:
    ff.save(ALONE, target, tree_of(1))
    print("no error")
except ff.CheckpointError as error:
    print(error)
print(number_of(load_quietly(target)), sorted(os.listdir(folder)))
if how == "read-only":
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
ff.save(ALONE, target, tree_of(2, elements=1000))
print(number_of(load_quietly(target)), sorted(os.listdir(folder)))
"""


def on_a_mount(how: str) -> list[str]:
    """What a save over an old checkpoint says on a real disk of 1.5 MiB that is full, or read-only."""
    with scratch() as folder:
        done = subprocess.run(
            [*MOUNTS, sys.executable, "-c", ON_A_MOUNT, str(folder), how], cwd=Path(__file__).parents[2],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(done.stderr)
        return done.stdout.splitlines()


def one_rank_alone(rank: int, timeout: float = 1.0) -> tuple[str, str, int | None]:
    """Of two ranks, one calls save and the other waits for the end of its process, and of the timeout."""
    with scratch() as folder:
        target, meeting = folder / "last", str(folder / "meeting")
        ff.save(ALONE, target, tree_of(0))
        go, stop = os.pipe()

        def other() -> None:
            with member(1 - rank, 2, meeting, timeout):
                os.close(stop)
                os.read(go, 1)
                os._exit(0)

        child = os.fork()
        if child == 0:
            try:
                other()
            finally:
                os._exit(1)
        os.close(go)

        def caller() -> tuple[str, str]:
            with member(rank, 2, meeting, timeout) as rt:
                try:
                    ff.save(rt, target, tree_of(1))
                except Exception as error:
                    return type(error).__name__, str(error)
                return "no error", ""

        answer = guarded(caller, 1 << 32, 60)
        os.close(stop)
        os.waitpid(child, 0)
        return *answer, number_of(load_quietly(target))


NO_SPACE = os.strerror(errno.ENOSPC)
READ_ONLY = os.strerror(errno.EROFS)
