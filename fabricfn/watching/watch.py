"""One rank's watch: it writes down the collective calls that this rank makes, and compares them with the others'.

[Note: watch] A call of a public function that all ranks must make is *counted*, but not those inside it. Call number n
must be the same on every rank. A rank that comes to it later than another one finds the other's on the board and raises
before it sends anything; the other one waits until the first has left, or until the limit, and reads from the board
why. Where both sides would find out by themselves (the calls are *apart*: see [Note: agreement]) nothing is compared
here. All of it costs about 2 microseconds a call, no message and no system call.
"""

import os
import sys
import threading
import time
import zlib
from types import FrameType
from typing import Any

from fabricfn.errors import MismatchError
from fabricfn.failures import is_consequence
from fabricfn.watching import board
from fabricfn.watching.board import AT_WORK, FAILED, FIRST, HEAD, IN_CALL, LEFT, LOST, MARK, NOW, REGION, SLOT, SLOTS
from fabricfn.watching.stacks import deaf, listen, short
from fabricfn.world import World

SKIPPED = ("fabricfn", "torch", "contextlib", "functools")
"""The packages whose lines are not the user's."""
MOST_SITES = 4096

Key = tuple[int, int, str, int]
"""Which call this is: code, line, name, subject."""


class Watch:
    """What this rank tells the others of its node, and knows of them. One for each process group."""

    __slots__ = (*("base", "busy", "calls", "debug", "fence", "group", "limit", "local_rank", "memory"), "others")
    __slots__ += ("__weakref__", "pid", "rank", "sites", "stack_file", "thread", "world_size")

    def __init__(self, world: World, memory: Any, limit: float, *, debug: bool = False) -> None:
        """The watch of this process.

        Args:
            world: this process' place.
            memory: from `shared_memory`; None where the ranks cannot see each other.
            limit: how long a collective waits, in seconds.
            debug: whether everything that travels is compared, too.
        """
        self.rank, self.world_size, self.local_rank = world.rank, world.world_size, world.local_rank
        self.group, self.limit, self.debug = world.group, limit, debug
        self.memory = bytearray(REGION * (world.local_rank + 1)) if memory is None else memory
        self.others = [i * REGION for i in range(world.local_world_size) if i != world.local_rank and memory]
        self.base, self.calls, self.busy = world.local_rank * REGION, 0, False
        self.fence = threading.Lock()
        self.thread, self.pid = threading.get_ident(), os.getpid()
        self.sites: dict[Key, tuple[Any, int, bytes]] = {}
        self.stack_file = listen() if threading.current_thread() is threading.main_thread() else -1
        now = time.monotonic_ns()
        HEAD.pack_into(self.memory, self.base, self.rank, self.pid, self.stack_file, 0, AT_WORK, now)

    def begin(self, name: str, subject: Any = "", *, apart: bool = False) -> bool:
        """Write down a call. Returns False inside another one, and on other threads, where nothing is counted.

        Args:
            name: the function.
            subject: what else must be the same on all ranks; an object that lives on, known by its identity.
            apart: see `counted`.

        Raises:
            MismatchError: another rank's call of the same number is another one.
        """
        if self.busy or threading.get_ident() != self.thread:
            return False
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in SKIPPED:
            frame = frame.f_back
        key = (0, 0, name, 0) if frame is None else (id(frame.f_code), frame.f_lineno, name, id(subject))
        _, digest, text = self.sites.get(key) or self._site(key, frame, subject, apart)
        calls = self.calls = self.calls + 1
        slot = FIRST + calls % SLOTS * SLOT.size
        SLOT.pack_into(self.memory, self.base + slot, calls, digest, text)
        NOW.pack_into(self.memory, self.base + 24, calls, IN_CALL, time.monotonic_ns())
        with self.fence:  # a barrier of memory: of two ranks that come at once, at least one sees the other's call
            pass
        for base in self.others:
            number, theirs = MARK.unpack_from(self.memory, base + slot)
            if number == calls and theirs != digest and not theirs & digest & 1:
                problem = self.disagreement(base)
                self.end()
                raise MismatchError(problem)
        self.busy = True
        return True

    def end(self) -> None:
        """The call is over."""
        self.busy = False
        NOW.pack_into(self.memory, self.base + 24, self.calls, AT_WORK, time.monotonic_ns())

    def leave(self, error: BaseException | None = None) -> None:
        """Say that this rank makes no further call, since it is done or because of `error`."""
        mine = self.mine()
        if mine.state >= LEFT or os.getpid() != self.pid:
            return
        state = LEFT
        if error is not None:
            state = LOST if is_consequence(error) else FAILED
            words = f"{type(error).__name__}: {error}".encode("utf-8", "replace")[: board.WORDS]
            self.memory[self.base + HEAD.size : self.base + HEAD.size + len(words)] = words
        HEAD.pack_into(self.memory, self.base, self.rank, self.pid, -1, self.calls, state, time.monotonic_ns())
        deaf(self.stack_file)

    def mine(self) -> board.Place:
        """Where this rank is."""
        return board.read(self.memory, self.base)

    def places(self) -> list[board.Place]:
        """Where the others of this node are, as far as they have begun."""
        found = [board.read(self.memory, base) for base in self.others]
        return [place for place in found if place.pid]

    def disagreement(self, base: int) -> str | None:
        """How the call of this rank differs from the other's of the same number; None if it does not."""
        slot = FIRST + self.calls % SLOTS * SLOT.size
        number, digest, text = SLOT.unpack_from(self.memory, base + slot)
        _, own, own_text = SLOT.unpack_from(self.memory, self.base + slot)
        if number != self.calls or digest == own:
            return None
        rank = board.read(self.memory, base).rank
        both = sorted([(rank, board.text_of(text)), (self.rank, board.text_of(own_text))])
        lines = "".join(f"\n  rank {rank}: {call}" for rank, call in both)
        return (
            "Every rank must make the same collective calls in the same order, but (seen on rank"
            f" {self.rank}) call {self.calls} is{lines}"
        )

    def _site(self, key: Key, frame: FrameType | None, subject: Any, apart: bool) -> tuple[Any, int, bytes]:
        if len(self.sites) >= MOST_SITES:
            self.sites.clear()
        what = str(subject)
        name = f"{key[2]} of {_brief(subject)}" if what else key[2]
        where = "" if frame is None else f" at {short(frame.f_code.co_filename)[-80:]}:{frame.f_lineno}"
        text = (name.encode()[: 127 - len(where.encode())] + where.encode())[:127]
        kept = (subject, None if frame is None else frame.f_code)  # so that their ids stay their own
        found = self.sites[key] = (kept, zlib.crc32(f"{key[2]} of {what}".encode()) << 1 | apart, text)
        return found


def _brief(subject: Any) -> str:
    """A model's signature, ((name, dtype, shape), ...), in a few words."""
    name, _, shape, *_ = subject[0] if subject else ("nothing", "", "")
    more = f" and {len(subject) - 1} more" if len(subject) > 1 else ""
    return f"a model ({name[-24:]} {list(shape)}{more})"
