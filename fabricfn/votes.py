"""Ranks that do not know how long their data are: votes on the next steps, so that none goes on alone.

[Note: votes] A rank reads some batches ahead, and then votes: how many it has, whether its data end there. All of them
take the steps that the poorest rank has, while the vote on the next ones is on its way already: nobody waits for it
unless reading is the slower part. How many are read ahead is decided by their size and the time that it takes: one
where batches are large, many where a vote would cost more than a step.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist

from fabricfn.collectives.groups import device_for_words
from fabricfn.errors import DataError
from fabricfn.tree import tree_leaves
from fabricfn.watching import counted
from fabricfn.world import World

MAX_AHEAD = 256
"""So many batches at most are read ahead for one vote, ..."""
MAX_BYTES = 8 << 20
"""... but only so many bytes, ..."""
MAX_SECONDS = 20e-3
"""... and for no longer than that. One batch always is."""
NO_END = 1 << 62


def with_next(found: Iterator[Any], world: World, digest: Callable[[], int], *, strict: bool) -> Iterator[Any]:
    """Pairs (batch, whether it is the last one); all ranks take the same number of steps. Every rank must call it.

    Args:
        found: this rank's batches.
        world: this process' place.
        digest: called once a batch has come: a number that must be the same on all ranks.
        strict: whether ranks that end at different steps are an error; otherwise all stop with the first.

    Raises:
        DataError: another rank failed, ended earlier or later, or has another digest.
    """
    ahead = _Ahead(found, world, digest, strict)
    while True:
        ahead.read()
        counted(world, "the next step of batches", ahead.start_vote)()
        for _ in range(ahead.granted - ahead.given):
            ahead.given += 1
            yield ahead.batches.popleft(), ahead.ended and not ahead.batches
        counted(world, "the end of a step of batches", ahead.settle)()
        if ahead.granted == ahead.given and ahead.over:
            return


class _Ahead:
    """The next batches of this rank, and the vote on them that is under way."""

    def __init__(self, found: Iterator[Any], world: World, digest: Callable[[], int], strict: bool) -> None:
        self.found, self.world, self.digest, self.strict = found, world, digest, strict
        self.batches: deque[Any] = deque()
        self.num_read, self.given, self.granted = 0, 0, 0
        self.limit = 1
        self.ended = self.over = self.failed = False
        self.error: Exception | None = None
        self.vote: torch.Tensor | None = None
        self.work: dist.Work | None = None

    def read(self) -> None:
        """Read as many batches ahead as one vote is for."""
        began = time.perf_counter()
        for place in range(self.limit):
            if self.ended or self.error is not None or (place and time.perf_counter() - began > MAX_SECONDS):
                return
            try:
                batch = next(self.found)
            except StopIteration:
                self.ended = True
                return
            except Exception as error:  # whatever the user's dataset raises: the others must hear of it
                self.error = error
                return
            self.batches.append(batch)
            self.num_read += 1
            if self.num_read == 1 and self.world.group is not None:
                self.limit = max(1, min(MAX_AHEAD, MAX_BYTES // (_num_bytes(batch) + 1)))

    def start_vote(self) -> None:
        """Tell the other ranks what this one has."""
        if self.world.group is None:
            return
        try:
            digest = self.digest() if self.strict and self.num_read else 0
        except DataError as error:
            digest, self.error = 0, error
        end = self.num_read if self.ended else NO_END
        votes = [self.error is None, self.ended, self.num_read, -self.num_read, end, digest, -digest]
        self.vote = torch.tensor(votes, dtype=torch.int64, device=device_for_words(self.world, self.world.group))
        self.work = dist.all_reduce(self.vote, dist.ReduceOp.MIN, self.world.group, async_op=True)

    def settle(self) -> None:
        """Learn how many steps all ranks can take.

        Raises:
            Exception: this rank's reading failed, and what was read before is used up.
            DataError: another rank's did; or their data do not fit together.
        """
        if self.vote is None:
            if self.error is not None and self.given == self.num_read:
                raise self.error
            self.granted, self.over = self.num_read, self.ended
            return
        if self.work is not None:
            self.work.wait()
        sound, all_ended, least, most, end, low, high = cast("list[int]", self.vote.tolist())
        rank = self.world.rank
        if not sound and self.given >= least:
            if self.error is not None:
                raise self.error
            raise DataError(f"another rank failed to read its next batch, so rank {rank} stops, too; see its error.")
        if self.strict and sound and low != -high:
            raise DataError(
                f"an IterableDataset must yield the same samples on every rank, since each keeps its part of them, but"
                f" its first sample is not the same (seen on rank {rank}). Where it shares out the data over the ranks"
                " by itself: ff.setup_dataloader(rt, loader, shard=False). Where it draws at random, use num_workers=1"
                " or more, whose generators are seeded alike, or seed its own generator alike on every rank."
            )
        if self.strict and -most > end:
            raise DataError(
                f"an IterableDataset must yield the same samples on every rank, but it ended earlier on some ranks than"
                f" on others: after {end} batches on one, while rank {rank} has {self.num_read}"
                f"{'' if self.ended else ' or more'}. Let it yield the same everywhere; or let it share out the data"
                ' over the ranks by itself: ff.setup_dataloader(rt, loader, shard=False, tail="drop"), which stops all'
                " ranks with the first."
            )
        self.granted = least
        self.over = bool(all_ended) if self.strict else least == end


def _num_bytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))
