"""What one rank takes from a place of the data to the end of that epoch, step after step: plans of three kinds.

The samples of a data set in our own order, those of a user's sampler, and the batches of a user's batch sampler.

[Note: dealing batches] Global step s takes the next `world_size` batches of the order, and rank r the r-th of them,
whole. What is left at the end are fewer batches than ranks: their rows are dealt out evenly, one step; where they have
less than one row a rank, together with the rows of the step before. So every step ends where a batch ends.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from fabricfn.errors import DataError
from fabricfn.order import Deal, Tail, cut, num_steps, rank_indices, rank_places, share, step_ends
from fabricfn.records import Cursor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one rank takes from a cursor on."""

    num: int | None
    """How many steps there are; None where only the end of a stream will tell."""
    ends: Callable[[], Iterator[int]]
    """The index in the global order after each step."""
    lists: Callable[[], Iterator[Any]]
    """What the DataLoader gets for each step: a list of indices."""
    places: Callable[[], Iterator[int]]
    """The place in the global order of the first row of each of this rank's batches: where its randomness starts."""
    uneven: str = ""
    """What to say when the ranks get different numbers of rows; empty when they do not."""


Plan = Callable[[Cursor], Pass]


def own_pass(deal: Deal, rank: int, shuffle: bool, cursor: Cursor) -> Pass:
    """The samples of a data set, in the order of (seed, epoch) or of the data set."""
    place = {"seed": cursor.seed, "epoch": cursor.epoch, "start": cursor.index}
    return Pass(
        num=num_steps(deal, cursor.index),
        ends=partial(step_ends, deal, cursor.index),
        lists=partial(rank_indices, deal, rank, shuffle=shuffle, **place),
        places=partial(_first_places, deal, rank, cursor.index),
    )


def sampled_pass(deal: Deal, rank: int, order: Sequence[Any], start: int) -> Pass:
    """The samples of an order that a sampler drew; `deal.num_samples` is its length."""
    return Pass(
        num=num_steps(deal, start),
        ends=partial(step_ends, deal, start),
        lists=partial(_picked, deal, rank, order, start),
        places=partial(_first_places, deal, rank, start),
    )


def _picked(deal: Deal, rank: int, order: Sequence[Any], start: int) -> Iterator[list[Any]]:
    for block in rank_places(deal, rank, start):
        for row in block.tolist():
            yield [order[place] for place in row]


def _first_places(deal: Deal, rank: int, start: int) -> Iterator[int]:
    full, sizes = cut(deal, start)
    first = start + rank * deal.batch_size
    yield from range(first, first + full * deal.step_size, deal.step_size)
    begin = start + full * deal.step_size
    for size in sizes:
        yield begin + share(size, deal.world_size, rank)[0]
        begin += size


def cut_batches(sizes: Sequence[int], world_size: int, tail: Tail) -> tuple[int, int]:
    """(the number of steps of whole batches, the number of batches whose rows are dealt out after them in one step).

    Raises:
        DataError: what there is cannot give every rank a row.

    Example:
        >>> cut_batches([4, 4, 4, 4, 4], 2, "spread"), cut_batches([4, 4, 1], 2, "spread")
        ((2, 1), (0, 3))
    """
    full, rest = divmod(len(sizes), world_size)
    if rest == 0 or tail == "drop":
        return full, 0
    if sum(sizes[-rest:]) < world_size:
        full, rest = full - 1, rest + world_size
    if full < 0:
        raise DataError(
            f"every rank must get at least one row a step, but the {len(sizes)} batches that are left have"
            f" {sum(sizes)} rows for {world_size} ranks. Use fewer ranks, leave an incomplete tail out:"
            ' ff.setup_dataloader(rt, loader, tail="drop"); or begin the next epoch:'
            " Cursor(seed=cursor.seed, epoch=cursor.epoch + 1)."
        )
    return full, rest


def batched_pass(
    batches: Sequence[Any], sizes: Sequence[int], world_size: int, rank: int, tail: Tail, start: int
) -> Pass:
    """The batches that a batch sampler drew, whole ones to each rank. See [Note: dealing batches]."""
    bounds = list(accumulate(sizes, initial=0))
    first = bisect_left(bounds, start)
    if first == len(bounds) or bounds[first] != start:
        raise DataError(
            f"a cursor's index counts the samples of one epoch, and batches of a batch sampler are dealt out whole, but"
            f" {start} is not where a batch of this epoch ends (it has {bounds[-1]} samples in {len(batches)} batches)."
            " Is it the cursor of another loader or seed? Cursor(seed=..., epoch=..., index=0) is the start of an"
            " epoch."
        )
    full, rest = cut_batches(sizes[first:], world_size, tail)
    end = first + full * world_size
    left = [row for batch in batches[end : end + rest] for row in batch]
    offset, count = share(len(left), world_size, rank)
    whole = range(first + rank, end, world_size)

    def lists() -> Iterator[Any]:
        yield from (batches[number] for number in whole)
        if rest:
            yield left[offset : offset + count]

    def places() -> Iterator[int]:
        yield from (bounds[number] for number in whole)
        if rest:
            yield bounds[end] + offset

    def ends() -> Iterator[int]:
        yield from (bounds[number] for number in range(first + world_size, end + 1, world_size))
        if rest:
            yield bounds[-1]

    steps = (sizes[begin : begin + world_size] for begin in range(first, end, world_size))
    differs = any(min(step) != max(step) for step in steps) or len(left) % world_size > 0
    text = f"the batches of a batch sampler go whole to one of {world_size} ranks, and differ in their number of rows"
    return Pass(num=full + bool(rest), ends=ends, lists=lists, places=places, uneven=text if differs else "")
