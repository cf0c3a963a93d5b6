"""Going through a loader that was set up: from a cursor to the end of its epoch."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, tee
from typing import Any, TypeVar

from fabricfn.errors import DataError
from fabricfn.feeds import Feed
from fabricfn.passes import Pass
from fabricfn.records import Cursor
from fabricfn.streams import stream_seed
from fabricfn.votes import with_next
from fabricfn.world import World

T = TypeVar("T")


def iterate(loader: Any, feed: Feed, cursor: Cursor, found: Pass, with_cursor: bool) -> Iterator[Any]:
    """The batches of a pass, where they are."""
    if with_cursor and loader.num_workers > 0 and not loader.in_order:
        raise DataError(
            "in_order=False lets batches overtake one another, so there is no one place to go on from. Build the"
            " DataLoader with in_order=True, or call ff.batches without with_cursor=True."
        )
    before, feed.pending = feed.started, (cursor, found)
    try:
        batches: Iterator[Any] = iter(loader)
        if feed.started == before:
            # A class of the user's whose __iter__ is a generator: it asks for indices when the first batch is taken.
            batches = chain(list(islice(batches, 1)), batches)
    finally:
        feed.pending = None
    if feed.started == before:
        raise DataError(
            f"{type(loader).__name__} did not ask its batch_sampler (or sampler) for the indices of this iteration, so"
            " it cannot start at a cursor. Let its __iter__ call DataLoader.__iter__ each time, or share out the data"
            " by yourself: ff.setup_dataloader(rt, loader, shard=False)."
        )
    return _until_next(batches, feed, feed.started) if loader.persistent_workers else batches


def _until_next(found: Iterator[T], feed: Feed, started: int) -> Iterator[T]:
    """The batches; an error once another iteration has taken over the persistent workers: torch would mix the two."""
    while feed.started == started:
        try:
            batch = next(found)
        except StopIteration:
            return
        yield batch
    raise DataError(
        "another iteration over this loader began, and with persistent_workers=True both share the workers. Finish one"
        " before the other, or build the DataLoader with persistent_workers=False."
    )


def iterate_stream(
    loader: Any, feed: Feed, cursor: Cursor, found: Pass, with_cursor: bool, world: World
) -> tuple[Iterator[Any], Iterator[Cursor]]:
    """(the batches of a stream, where to go on after each). One is read ahead, so that the last is known as such."""
    share = feed.share
    assert share is not None
    if not loader.persistent_workers:
        share.digests = share.new_digests(max(1, loader.num_workers))
    batches = iterate(loader, feed, cursor, found, with_cursor)
    if world.group is None and not with_cursor:
        return batches, iter(())
    digest = partial(share.digest, share.digests, stream_seed(cursor))
    pairs, copied = tee(with_next(batches, world, digest, strict=True))
    after = Cursor(seed=cursor.seed, epoch=cursor.epoch + 1)
    places = (Cursor(seed=cursor.seed, epoch=cursor.epoch, index=end) for end in found.ends())
    ends = (after if last else place for (_, last), place in zip(copied, places, strict=False))
    return (batch for batch, _ in pairs), ends


def cursors(found: Pass, start: Cursor) -> Iterator[Cursor]:
    """Where to go on after each step; after the last one that is the start of the next epoch."""
    seed, epoch, left = start.seed, start.epoch, found.num
    assert left is not None
    for end in found.ends():
        left -= 1
        yield Cursor(seed=seed, epoch=epoch, index=end) if left else Cursor(seed=seed, epoch=epoch + 1)
