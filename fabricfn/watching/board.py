"""Where the ranks of a node write down where they are: a few kilobytes of memory that they share.

[Note: board] Every rank has a region. In it stand its process, how many collective calls it has made and where it is
now; then the last calls, one a slot, so that another rank can compare its own call of the same number. Writing and
reading cost no system call. The memory belongs to a file without a name (or in the private folder of the job), which is
gone with the last process that has it open, whatever ends it.
"""

import contextlib
import dataclasses
import mmap
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

from fabricfn.world import World

HEAD = struct.Struct("=qqqqqq")
"""Rank, process, descriptor of the stack file, number of calls, state, since when (monotonic nanoseconds)."""
NOW = struct.Struct("=qqq")
"""The last three of them."""
SLOT = struct.Struct("=qq128s")
"""Number of the call, digest of its name, its name and line."""
MARK = struct.Struct("=qq")
"""The first two of them."""
WORDS = 1000
"""Bytes that a rank has for how it failed."""
SLOTS = 32
"""So many of its last calls does a rank leave to be compared."""
FIRST = HEAD.size + WORDS
REGION = FIRST + SLOTS * SLOT.size

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


def read(memory: Any, base: int) -> Place:
    """Where the rank is whose region begins at `base`."""
    rank, pid, stack_file, calls, state, since = HEAD.unpack_from(memory, base)
    words = bytes(memory[base + HEAD.size : base + FIRST])
    _, _, call = SLOT.unpack_from(memory, base + FIRST + calls % SLOTS * SLOT.size)
    return Place(
        rank=rank,
        pid=pid,
        stack_file=stack_file,
        calls=calls,
        state=state,
        since=since,
        call=text_of(call) if calls else "",
        words=text_of(words),
    )


def text_of(data: bytes) -> str:
    """Without the zeros at its end."""
    return data.rstrip(b"\0").decode("utf-8", "replace")


def is_running(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
