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
from fabricfn.watching.board import (
    AT_WORK,
    CALLS,
    FAILED,
    IN_CALL,
    LEFT,
    LOST,
    PID,
    RANK,
    REGION,
    SINCE,
    STACK_FILE,
    STATE,
    TEXT,
    TOLD,
    WORDS,
    Board,
    Place,
    slot,
)
from fabricfn.watching.stacks import deaf, listen, short
from fabricfn.world import World

SKIPPED = ("fabricfn", "torch", "contextlib", "functools")
"""The packages whose lines are not the user's."""
MOST_SITES = 4096
ENDING = 1.0
"""Seconds at most until the guard has ended; it may be asking another rank where that one stands."""

Key = tuple[int, int, str, int]
"""Which call this is: code, line, name, subject."""


class Watch:
    """What this rank tells the others of its node, and knows of them. One for each process group."""

    __slots__ = (
        *("__weakref__", "base", "board", "busy", "calls", "debug", "fence", "group", "guard", "head", "left"),
        *("limit", "others", "pid", "rank", "sites", "stack_file", "thread", "words", "world_size"),
    )

    def __init__(self, world: World, memory: Any, limit: float, *, debug: bool = False) -> None:
        """The watch of this process.

        Args:
            world: this process' place.
            memory: from `shared_memory`; None where the ranks cannot see each other.
            limit: how long a collective waits, in seconds.
            debug: whether everything that travels is compared, too.
        """
        self.rank, self.world_size, self.group = world.rank, world.world_size, world.group
        self.limit, self.debug = limit, debug
        alone = memory is None
        self.board = Board(bytearray(REGION) if alone else memory)
        self.words = self.board.words
        self.base = 0 if alone else world.local_rank * REGION
        self.head = self.base // 8
        self.others = [] if alone else [i * REGION for i in range(world.local_world_size) if i != world.local_rank]
        self.calls, self.busy, self.fence = 0, False, threading.Lock()
        self.thread, self.pid = threading.get_ident(), os.getpid()
        self.sites: dict[Key, tuple[Any, int, bytes]] = {}
        self.left = threading.Event()
        self.guard: threading.Thread | None = None
        self.stack_file = listen() if threading.current_thread() is threading.main_thread() else -1
        for field, value in ((RANK, self.rank), (STACK_FILE, self.stack_file), (SINCE, time.monotonic_ns())):
            self.words[self.head + field] = value
        self.words[self.head + PID] = self.pid

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
        at, words, head = slot(calls), self.words, self.head
        mark = (calls & 0x7FFFFFFF) << 32 | digest
        self.board.data[self.base + at + 8 : self.base + at + 8 + TEXT] = text
        words[(self.base + at) // 8] = mark
        words[head + SINCE] = time.monotonic_ns()
        words[head + STATE] = IN_CALL
        words[head + CALLS] = calls
        with self.fence:  # a barrier of memory: of two ranks that come at once, at least one sees the other's call
            pass
        for base in self.others:
            theirs = words[(base + at) // 8]
            if theirs != mark and theirs >> 32 == mark >> 32 and not theirs & digest & 1:
                problem = self.disagreement(base)
                self.end()
                raise MismatchError(problem)
        self.busy = True
        return True

    def end(self) -> None:
        """The call is over."""
        self.busy = False
        self.words[self.head + SINCE] = time.monotonic_ns()
        self.words[self.head + STATE] = AT_WORK

    def leave(self, error: BaseException | None = None) -> None:
        """Say that this rank makes no further call, since it is done or because of `error`."""
        if self.mine().state >= LEFT or os.getpid() != self.pid:
            return
        state = LEFT
        if error is not None:
            state = LOST if is_consequence(error) else FAILED
            self.board.write_text(self.base + TOLD, f"{type(error).__name__}: {error}".encode(errors="replace"), WORDS)
        self.words[self.head + STACK_FILE] = -1
        self.words[self.head + SINCE] = time.monotonic_ns()
        self.words[self.head + STATE] = state
        deaf(self.stack_file)
        self.left.set()
        if self.guard is not None:
            self.guard.join(ENDING)  # a thread may be anywhere when Python ends, in the C++ of torch too

    def mine(self) -> Place:
        """Where this rank is."""
        return self.board.read(self.base)

    def places(self) -> list[Place]:
        """Where the others of this node are, as far as they have begun."""
        return [place for place in map(self.board.read, self.others) if place.pid]

    def disagreement(self, base: int) -> str | None:
        """How the call of this rank differs from the other's of the same number; None if it does not."""
        at = slot(self.calls)
        mine, theirs = self.words[(self.base + at) // 8], self.words[(base + at) // 8]
        if theirs == mine or theirs >> 32 != mine >> 32:
            return None
        found = sorted(
            (self.board.read(start).rank, self.board.read_text(start + at + 8, TEXT)) for start in (self.base, base)
        )
        lines = "".join(f"\n  rank {rank}: {call}" for rank, call in found)
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
        text = (name.encode()[: TEXT - len(where.encode())] + where.encode())[:TEXT].ljust(TEXT, b"\0")
        kept = (subject, None if frame is None else frame.f_code)  # so that their ids stay their own
        found = self.sites[key] = (kept, (zlib.crc32(f"{key[2]} of {what}".encode()) & 0x7FFFFFFF) << 1 | apart, text)
        return found


def _brief(subject: Any) -> str:
    """A model's signature, ((name, dtype, shape), ...), in a few words."""
    name, _, shape, *_ = subject[0] if subject else ("nothing", "", "")
    more = f" and {len(subject) - 1} more" if len(subject) > 1 else ""
    return f"a model ({name[-24:]} {list(shape)}{more})"
