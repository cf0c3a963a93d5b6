"""Which samples which rank takes at which step: a pure plan of plain integers, without loaders or processes.

[Note: dealing] A data set of n samples is put into one global order, a function of (seed, epoch) alone. Each global
step takes the next `world_size * batch_size` samples of it, and rank r the r-th contiguous slice of those. What is left
at the end is dealt out evenly. Where it is less than one sample a rank, the last two steps are cut anew into two halves
(or, with a batch size of 1, joined into one), so that no rank gets an empty batch. How the rest is cut depends only on
how much is left, so stopping after any step and going on is the same as never having stopped.
"""

import dataclasses
from collections.abc import Iterator
from itertools import accumulate, chain, islice, repeat
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fabricfn.errors import DataError
from fabricfn.permutations import make_permutation, permuted
from fabricfn.random import Key, fold_in, key

Tail = Literal["spread", "drop"]

BLOCK = 4096
"""How many indices are computed at a time: enough that numpy's overhead vanishes, few enough to be ready at once."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """How a data set is dealt out to the ranks."""

    num_samples: int
    """The length of the global order."""
    world_size: int = 1
    """How many ranks share it."""
    batch_size: int = 1
    """How many samples a rank takes in a full step."""
    tail: Tail = "spread"
    """What becomes of the incomplete last step: dealt out evenly, or left out."""
    ready: bool = False
    """Whether each sample is a batch already, so that a rank must take exactly one a step; then batch_size is 1."""

    @property
    def step_size(self) -> int:
        """The number of samples of a full global step."""
        return self.world_size * self.batch_size


def cut(deal: Deal, start: int = 0) -> tuple[int, tuple[int, ...]]:
    """(the number of full steps from `start` on, the sizes of the steps after them).

    Raises:
        DataError: `start` is outside the data, or what is left cannot give every rank something.
    """
    if not 0 <= start <= deal.num_samples:
        raise DataError(
            f"a cursor's index counts the samples of one epoch: it is 0 .. {deal.num_samples} for this data set, but"
            f" {start} was given. Is it the cursor of another data set? Cursor(seed=..., epoch=..., index=0) is the"
            " start of an epoch."
        )
    full, rest = divmod(deal.num_samples - start, deal.step_size)
    if rest == 0 or deal.tail == "drop":
        return full, ()
    if deal.ready:
        raise DataError(
            f"with batch_size=None every item is a batch and goes to one rank, but the {deal.num_samples - start}"
            f" items from {start} on cannot be dealt evenly to {deal.world_size} ranks: all ranks must take the same"
            ' number of steps. Write ff.setup_dataloader(rt, loader, tail="drop") to leave the last'
            f" {rest} out."
        )
    if rest >= deal.world_size:
        return full, (rest,)
    if full == 0:
        raise DataError(
            f"every rank must get at least one row a step, but {rest} of {deal.num_samples} samples are left from"
            f" {start} on, for {deal.world_size} ranks. Use fewer ranks, or leave an incomplete tail out:"
            ' ff.setup_dataloader(rt, loader, tail="drop"); after a change of the world size, or begin the next epoch:'
            " Cursor(seed=cursor.seed, epoch=cursor.epoch + 1)."
        )
    both = deal.step_size + rest
    return full - 1, (both,) if deal.batch_size == 1 else (both - both // 2, both // 2)


def num_steps(deal: Deal, start: int = 0) -> int:
    """How many steps there are from `start` to the end of the epoch, the same on every rank."""
    full, sizes = cut(deal, start)
    return full + len(sizes)


def step_ends(deal: Deal, start: int = 0) -> Iterator[int]:
    """The index in the global order after each step from `start` on."""
    full, sizes = cut(deal, start)
    return islice(accumulate(chain(repeat(deal.step_size, full), sizes), initial=start), 1, None)


def share(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """(offset, count) of a rank's slice of a step of `size` samples: counts differ by one at most, the first more.

    Example:
        >>> [share(8, 3, rank) for rank in range(3)]
        [(0, 3), (3, 3), (6, 2)]
    """
    base, extra = divmod(size, world_size)
    return rank * base + min(rank, extra), base + (rank < extra)


def rank_places(deal: Deal, rank: int, start: int = 0) -> Iterator[NDArray[np.int64]]:
    """The places of the global order that a rank takes: blocks of shape (steps, rows), one after the other."""
    full, sizes = cut(deal, start)
    rows = np.arange(deal.batch_size) + (start + rank * deal.batch_size)
    steps_at_once = max(1, BLOCK // deal.batch_size)
    for first in range(0, full, steps_at_once):
        steps = np.arange(first, min(first + steps_at_once, full))
        yield steps[:, None] * deal.step_size + rows
    begin = start + full * deal.step_size
    for size in sizes:
        offset, count = share(size, deal.world_size, rank)
        yield np.arange(begin + offset, begin + offset + count)[None]
        begin += size


def rank_indices(
    deal: Deal, rank: int, *, seed: int, epoch: int, start: int = 0, shuffle: bool = True
) -> Iterator[list[int]]:
    """The samples that `rank` takes, one list a step, from place `start` of the order of (seed, epoch) on.

    Example:
        >>> deal = Deal(num_samples=7, world_size=2, batch_size=2)
        >>> [list(rank_indices(deal, rank, seed=0, epoch=0, shuffle=False)) for rank in range(2)]
        [[[0, 1], [4, 5]], [[2, 3], [6]]]
    """
    blocks: Iterator[NDArray[Any]] = rank_places(deal, rank, start)
    if shuffle:
        permutation = make_permutation(deal.num_samples, stream(seed, epoch, "order"))
        blocks = (permuted(permutation, block) for block in blocks)
    for block in blocks:
        yield from block.tolist()


def stream(seed: int, epoch: int, purpose: str) -> Key:
    """The key of an epoch for one purpose, so that order and workers never share random numbers."""
    return fold_in(fold_in(key(seed), int.from_bytes(purpose.encode())), epoch)


def is_even(deal: Deal) -> bool:
    """Whether all ranks always get the same number of rows."""
    return all(size % deal.world_size == 0 for size in cut(deal)[1])
