"""Where the ranks of a world of threads meet.

[Note: meetings] The ranks of a call lay down what they have; the last one to come checks that all of them made the same
call, does the work for everybody and wakes the others. So the hub knows at any moment who waits for whom: a call that
cannot end (other shapes, another collective, a rank that has returned or failed) is an error at once, never a hang.
"""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from fabricfn.errors import MismatchError

Tensors = Sequence[torch.Tensor]
Payloads = list[Any]


class Released(BaseException):
    """Ends a rank whose peer failed. Not an `Exception`, so that no handler of the user's keeps the rank alive."""


class Meeting:
    """One call of one collective: what the ranks laid down, and how it ended."""

    __slots__ = ("calls", "error", "payloads")

    def __init__(self) -> None:
        self.calls: dict[int, Any] = {}
        self.payloads: dict[int, Any] = {}
        self.error: str | None = None


class Hub:
    """Where the ranks of one world meet: who has come, who waits, who has returned."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.lock = threading.Lock()
        self.batons = [threading.Lock() for _ in range(world_size)]
        for baton in self.batons:
            baton.acquire()
        self.other: Hub | None = None
        self.reset()

    def beside(self) -> "Hub":
        """Where the threads meet that work beside the ranks; they have ended before a run is over."""
        with self.lock:
            if self.other is None:
                self.other = Hub(self.world_size)
            return self.other

    def reset(self) -> None:
        """Forget everything of the last run. No rank may be inside a call."""
        self.meetings: dict[Any, Meeting] = {}
        self.mail: dict[Any, deque[torch.Tensor]] = {}
        self.waiting: dict[int, tuple[Meeting, Any]] = {}
        self.returned: set[int] = set()
        self.failed = False

    def meet(self, rank: int, key: Any, members: Sequence[int], call: Any, payload: Any, work: Any) -> None:
        """Lay down `payload` and wait until `work(payloads)` is done, by whoever comes last.

        Args:
            rank: the calling rank, in the world.
            key: which group and which kind of meeting this is.
            members: the world ranks that must come, in the order of the group.
            call: what must be equal on all of them.
            payload: what this rank lays down.
            work: the payloads in the order of the group -> None; runs once, on one thread.
        """
        with self.lock:
            if self.failed:
                raise Released
            meeting = self.meetings.setdefault(key, Meeting())
            meeting.calls[rank], meeting.payloads[rank] = call, payload
            last = len(meeting.calls) == len(members)
            if last:
                del self.meetings[key]
                meeting.error = _disagreement(meeting.calls)
                if meeting.error is None:
                    try:
                        with torch.no_grad():
                            work([meeting.payloads[member] for member in members])
                    except Exception as error:  # it must reach every rank, or the others would wait for ever
                        meeting.error = f"{call[0]} failed on its ranks {list(members)}: {error}"
                for member in members:
                    if member != rank:
                        del self.waiting[member]
                        self.batons[member].release()
            else:
                self._wait(rank, meeting, key)
        if not last:
            self._sleep(rank, meeting)
        if meeting.error is not None:
            raise MismatchError(f"{meeting.error} (this is rank {rank})")

    def send(self, key: Any, dst: int, tensor: torch.Tensor) -> None:
        """Leave a copy of `tensor` for the world rank `dst`."""
        with self.lock:
            if self.failed:
                raise Released
            self.mail.setdefault(key, deque()).append(tensor.detach().clone())
            if dst in self.waiting and self.waiting[dst][1] == key:
                del self.waiting[dst]
                self.batons[dst].release()

    def receive(self, rank: int, key: Any, out: torch.Tensor) -> None:
        """Wait for what was sent under `key`, and copy it into `out`."""
        meeting = Meeting()
        meeting.calls[rank] = ("recv", f"from rank {key[1]}")
        with self.lock:
            if self.failed:
                raise Released
            absent = not self.mail.get(key)
            if absent:
                self._wait(rank, meeting, key)
        if absent:
            self._sleep(rank, meeting)
        if meeting.error is not None:
            raise MismatchError(f"{meeting.error} (this is rank {rank})")
        with self.lock:
            sent = self.mail[key].popleft()
        if (sent.shape, sent.dtype) != (out.shape, out.dtype):
            raise MismatchError(f"rank {rank} receives {describe([out])}, but rank {key[1]} sent {describe([sent])}")
        out.data.copy_(sent)

    def leave(self, rank: int, *, failed: bool) -> None:
        """`rank` has returned, or failed: then everybody who waits is released, now and later."""
        with self.lock:
            self.returned.add(rank)
            if failed:
                self.failed = True
                for waiting in self.waiting:
                    self.batons[waiting].release()
                self.waiting.clear()
            else:
                self._refuse_deadlock()

    def _wait(self, rank: int, meeting: Meeting, key: Any) -> None:
        self.waiting[rank] = (meeting, key)
        self._refuse_deadlock()

    def _sleep(self, rank: int, meeting: Meeting) -> None:
        self.batons[rank].acquire()
        if self.failed and meeting.error is None:
            raise Released

    def _refuse_deadlock(self) -> None:
        if not self.waiting or len(self.waiting) + len(self.returned) < self.world_size:
            return
        places = [f"rank {rank} waits in {_show(meeting.calls[rank])}" for rank, (meeting, _) in self.waiting.items()]
        places += [f"rank {rank} has returned" for rank in sorted(self.returned)]
        for rank, (meeting, _) in self.waiting.items():
            meeting.error = f"every rank must make the same collective calls: {', '.join(sorted(places))}"
            self.batons[rank].release()
        self.waiting.clear()
        self.meetings.clear()


def describe(tensors: Tensors) -> str:
    """The dtypes and shapes of tensors, as messages show them."""
    shapes = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors[:4]]
    return ", ".join(shapes) + (", ..." if len(tensors) > len(shapes) else "")


def _show(call: tuple[Any, ...]) -> str:
    return " ".join(str(part) for part in call)


def _disagreement(calls: dict[int, Any]) -> str | None:
    if len(set(calls.values())) == 1:
        return None
    return "the ranks' calls differ: " + ", ".join(f"rank {rank}: {_show(calls[rank])}" for rank in sorted(calls))
