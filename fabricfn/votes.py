"""Ranks that do not know how long their data are: a vote before every step, so that none goes on alone.

[Note: votes] As soon as a rank has its next batch, or has found the end, it starts an all_reduce of four integers, and
hands out the batch before that one: the vote travels while the step computes, and nobody waits for it.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist

from fabricfn.collectives.groups import device_for_words
from fabricfn.errors import DataError
from fabricfn.world import World

FAILED, ENDED, GOES_ON = -1, 0, 1


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
    ahead.take()
    while ahead.settled():
        batch = ahead.batch
        ahead.take()
        yield batch, ahead.state == ENDED


class _Ahead:
    """The next batch of this rank, and the vote on it that is under way."""

    def __init__(self, found: Iterator[Any], world: World, digest: Callable[[], int], strict: bool) -> None:
        self.found, self.world, self.digest, self.strict = found, world, digest, strict
        self.batch: Any = None
        self.state = ENDED
        self.error: Exception | None = None
        self.vote: torch.Tensor | None = None
        self.work: dist.Work | None = None

    def take(self) -> None:
        """Fetch the next batch and start the vote on it."""
        self.batch, self.state = None, ENDED
        try:
            self.batch = next(self.found)
            self.state = GOES_ON
        except StopIteration:
            pass
        except Exception as error:  # whatever the user's dataset raises: the others must hear of it
            self.state, self.error = FAILED, error
        if self.world.group is not None:
            digest = self.digest() if self.strict and self.state != FAILED else 0
            votes = [self.state, -self.state, digest, -digest]
            self.vote = torch.tensor(votes, device=device_for_words(self.world, self.world.group))
            self.work = dist.all_reduce(self.vote, dist.ReduceOp.MIN, self.world.group, async_op=True)

    def settled(self) -> bool:
        """Whether every rank has a batch."""
        if self.vote is None:
            if self.error is not None:
                raise self.error
            return self.state == GOES_ON
        if self.work is not None:
            self.work.wait()
        least, most, low, high = cast("list[int]", self.vote.tolist())
        if self.error is not None:
            raise self.error
        rank = self.world.rank
        if least == FAILED:
            raise DataError(f"another rank failed to read its next batch, so rank {rank} stops, too; see its error.")
        if self.strict and low != -high:
            raise DataError(
                f"an IterableDataset must yield the same samples on every rank, since each keeps its part of them, but"
                f" its first sample is not the same (seen on rank {rank}). Where it shares out the data over the ranks"
                " by itself: ff.setup_dataloader(rt, loader, shard=False). Where it draws at random, use num_workers=1"
                " or more, whose generators are seeded alike, or seed its own generator alike on every rank."
            )
        if self.strict and least != -most:
            raise DataError(
                f"an IterableDataset must yield the same samples on every rank, but it ended earlier on some ranks than"
                f" on others: rank {rank} has {'another' if self.state == GOES_ON else 'no further'} batch. Let it"
                " yield the same everywhere; or let it share out the data over the ranks by itself:"
                ' ff.setup_dataloader(rt, loader, shard=False, tail="drop"), which stops all ranks with the first.'
            )
        return least == GOES_ON
