"""Where the ranks of a node write down where they are: a few kilobytes of memory that they share.

[Note: board] Every rank has a region. In it stand its process, how many collective calls it has made and where it is
now; then the last calls, one a slot, so that another rank can compare its own call of the same number. Writing and
reading cost no system call. What others decide by is always one word of 64 bits, written at once: they may look at any
moment, and must never see half of a call. The memory belongs to a file without a name (or in the private folder of the
job), which is gone with the last process that has it open, whatever ends it.
"""

import contextlib
import dataclasses
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

from fabricfn.world import World

PID, RANK, STACK_FILE, CALLS, STATE, SINCE = range(6)
"""The words of a region's head: process, rank, descriptor of the stack file, number of calls, state, since when."""
TOLD, WORDS = 48, 1000
"""Where a rank says how it failed, and the bytes that it has for it."""
FIRST = TOLD + WORDS
"""Where the calls begin: each is one word, and the text for a message."""
TEXT = 128
SLOT = 8 + TEXT
SLOTS = 32
"""So many of its last calls does a rank leave to be compared."""
REGION = FIRST + SLOTS * SLOT

AT_WORK, IN_CALL, LEFT, FAILED, LOST = range(5)
"""In the user's own code; in a collective call; shut down; ended by an error; by the loss of another rank."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is, as it wrote it down."""

    rank: int
    """In the world."""
    pid: int
    """Its process; 0 before it has written anything."""
    stack_file: int
    """Its descriptor of the file into which it writes its stack when asked; -1 for none."""
    calls: int
    """How many collective calls it has made, the present one included."""
    state: int
    """What it is doing."""
    since: int
    """Since when, in nanoseconds of the monotonic clock, which all processes of a machine share."""
    call: str
    """Its last call, with the line."""
    words: str
    """How it failed."""

    @property
    def ended(self) -> bool:
        """Whether its process is gone, or has said goodbye."""
        return self.state >= LEFT or (self.pid > 0 and not is_running(self.pid))


def shared_memory(world: World, file: str | None, store: Any) -> mmap.mmap | None:
    """The memory of this node's ranks; every rank must call it. None where they cannot share any.

    Args:
        world: this process' place.
        file: its path in a private folder that the ranks of this node share, if there is one.
        store: where they find each other otherwise.
    """
    size = REGION * world.local_world_size
    with contextlib.suppress(OSError, ValueError):
        if file is not None:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        else:
            descriptor = _nameless(world, store)
        try:
            os.ftruncate(descriptor, size)
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    return None


def _nameless(world: World, store: Any) -> int:
    """A file without a name that the first rank of the node opens, and the others find through its process."""
    key = str(world.node_rank)
    if world.local_rank == 0:
        descriptor = -1
        try:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        finally:
            store.set(key, f"/proc/{os.getpid()}/fd/{descriptor}")
            # It must stay open until all have it: none goes on before.
            if world.local_world_size > 1:
                store.wait([f"{key}/{rank}" for rank in range(1, world.local_world_size)])
        return descriptor
    try:
        return os.open(store.get(key).decode(), os.O_RDWR | os.O_CLOEXEC)
    finally:
        store.set(f"{key}/{world.local_rank}", "open")


class Board:
    """The shared memory as words and as bytes."""

    __slots__ = ("data", "words")

    def __init__(self, memory: Any) -> None:
        self.data = memoryview(memory)
        self.words = self.data.cast("q")

    def write_text(self, at: int, text: bytes, size: int) -> None:
        """Put text of up to `size` bytes somewhere."""
        self.data[at : at + size] = text[:size].ljust(size, b"\0")

    def read_text(self, at: int, size: int) -> str:
        """The text that stands there."""
        return bytes(self.data[at : at + size]).rstrip(b"\0").decode("utf-8", "replace")

    def read(self, base: int) -> Place:
        """Where the rank is whose region begins at `base`."""
        pid, rank, stack_file, calls, state, since = self.words[base // 8 : base // 8 + 6].tolist()
        return Place(
            rank=rank,
            pid=pid,
            stack_file=stack_file,
            calls=calls,
            state=state,
            since=since,
            call=self.read_text(base + slot(calls) + 8, TEXT) if calls else "",
            words=self.read_text(base + TOLD, WORDS),
        )


def slot(number: int) -> int:
    """Where in a region the call of this number stands."""
    return FIRST + number % SLOTS * SLOT


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
