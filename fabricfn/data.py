"""Data: loaders shared out over the ranks, in an order that is a function of (seed, epoch, position) alone.

The dataset, the workers, the collate function and the rest of a user's DataLoader are not touched: it is given other
indices, nothing more.
"""

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from operator import index
from typing import Any, Literal, SupportsIndex, TypeVar, cast, overload

from torch.utils.data import DataLoader

from fabricfn.errors import ConfigurationError, DataError
from fabricfn.feeds import Feed, make_feed
from fabricfn.iterating import cursors, iterate, iterate_stream
from fabricfn.order import Tail
from fabricfn.records import Cursor
from fabricfn.runtimes import Runtime
from fabricfn.samplers import tell_epoch
from fabricfn.transfers import moved
from fabricfn.votes import with_next

T = TypeVar("T")

FEED = "_fabricfn_feed"
"""The attribute by which a loader that was set up is known: its `Feed`, or None where the order is the user's."""
IN_STEP = "_fabricfn_in_step"
"""The attribute that says whether all ranks stop where the first one does: `shard=False` with `tail="drop"`."""


def setup_dataloader(
    rt: Runtime, loader: DataLoader[T], *, shard: bool = True, tail: Tail = "spread", seed_workers: bool = True
) -> DataLoader[T]:
    """The loader as this rank uses it: a DataLoader over the rank's share of the samples.

    Laws: over the ranks, every sample comes exactly once an epoch (`tail="drop"` leaves out less than one step). The
    global order depends on (seed, epoch) alone: not on the world size, the batch size or the number of workers. Step s
    takes the next world_size * batch_size samples of it, rank r the r-th contiguous slice (of an iterable dataset:
    every world_size-th). All ranks take the same number of steps, and no rank ever gets an empty batch. No global
    random state of this process is read or changed.

    Go through it with `batches`, which takes an epoch or a `Cursor`. Iterating the loader itself works too: it counts
    its epochs from 0, one per iteration, with `rt.seed`.

    Args:
        rt: the runtime.
        loader: a DataLoader. `batch_size` is per rank; None makes every item of the dataset a batch. Dataset, workers,
            `collate_fn`, `worker_init_fn`, pinned memory and a loader's own class are kept; the loader that was passed
            is left alone. `shuffle=True` shuffles, in an order of our own that needs no list; its `generator` is not
            used. A sampler of any other kind is gone through whole at the start of each epoch, and what it yields is
            the global order: it is told the epoch (`set_epoch`), and the random generators in its attributes start
            from (seed, epoch, their state now). The batches of a batch sampler go whole to one rank each. An
            `IterableDataset` is gone through on every rank and worker, and each keeps its part: what it costs to make
            a sample is paid there once per rank and worker.
        shard: False leaves everything to the loader: order, sampler and generator are as they were, and every rank
            goes through all that its loader yields, for samplers and iterable datasets that share out the data
            themselves. With `tail="drop"`, `batches` stops all ranks where the first of them ends.
        tail: what becomes of an incomplete last step. "spread" deals it out evenly, and where it holds less than one
            row a rank, cuts the last two steps into two halves (with `batch_size=1`, a batch sampler or an iterable
            dataset: joins them). "drop" leaves it out; a loader with `drop_last=True` means "drop".
        seed_workers: seed the global generators of torch, numpy and Python in workers from (seed, epoch, place of the
            batch), anew for every batch: the same run gives the same augmentations with any number of workers, with
            persistent ones, and when it goes on at a cursor. With `batch_size=None` only when the workers start, so
            persistent ones are refused. False leaves them to torch and to `worker_init_fn`.

    Returns:
        A new DataLoader of the same class; on every rank its own share.

    Raises:
        DataError: a `DistributedSampler`, a loader that was set up, or data that cannot be dealt out to so many ranks.
        ConfigurationError: an unknown `tail`.

    Warns:
        UnevenBatchesWarning: rank 0, once per loader: ranks get different numbers of rows in some steps. A mean over
            ranks is then exact only with `weighted=True`; with it, silence the warning by
            `warnings.filterwarnings("ignore", category=ff.errors.UnevenBatchesWarning)`.

    Not collective: no communication.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> loader = ff.setup_dataloader(rt, DataLoader(range(5), batch_size=2))
        >>> [batch.tolist() for batch in loader]
        [[0, 1], [2, 3], [4]]
    """
    return _set_up(rt, loader, shard, tail, seed_workers)


def setup_dataloaders(
    rt: Runtime,
    *loaders: DataLoader[Any],
    shard: bool = True,
    tail: Tail = "spread",
    seed_workers: bool = True,
) -> tuple[DataLoader[Any], ...]:
    """Several loaders at once: `setup_dataloader` for each.

    Args:
        rt: the runtime.
        loaders: as the `loader` of `setup_dataloader`, whose laws and errors hold for each.
        shard: for all of them, as there.
        tail: for all of them, as there.
        seed_workers: for all of them, as there.

    Returns:
        One DataLoader for each, in the same order.

    Not collective: no communication.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> train, test = ff.setup_dataloaders(rt, DataLoader(range(8), shuffle=True), DataLoader(range(2)))
        >>> len(train), len(test)
        (8, 2)
    """
    # map, not a comprehension: that is a frame of its own in Python 3.11, and warnings name the caller by depth.
    return tuple(map(partial(_set_up, rt, shard=shard, tail=tail, seed_workers=seed_workers), loaders))


def _set_up(rt: Runtime, loader: DataLoader[T], shard: bool, tail: Tail, seed_workers: bool) -> DataLoader[T]:
    if not isinstance(loader, DataLoader):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(
            f"setup_dataloader takes a torch.utils.data.DataLoader, but {type(loader).__name__} was given. Any other"
            " iterable of batches goes to ff.batches(rt, iterable) as it is."
        )
    if tail not in ("spread", "drop"):
        raise ConfigurationError(f'tail={tail!r} is unknown; there are tail="spread" and tail="drop".')
    if FEED in vars(loader):
        raise DataError("this loader was set up already. Call ff.setup_dataloader once, on the DataLoader you built.")
    # A copy of the object, not a new one from its arguments: those of a user's own class are not known.
    mine = copy.copy(loader)
    fields: dict[str, Any] = {"_iterator": None, FEED: None, IN_STEP: tail == "drop"}
    if shard:
        feed = make_feed(rt, loader, tail, seed_workers)
        fields |= {FEED: feed, "sampler" if feed.ready else "batch_sampler": feed}
        if seed_workers:
            if feed.ready and feed.share is None and loader.persistent_workers:
                raise ConfigurationError(
                    "with batch_size=None workers are seeded when they start, so persistent ones would go on with the"
                    " seeds of the first epoch. Build the DataLoader with persistent_workers=False, or leave the seeds"
                    " to it: ff.setup_dataloader(rt, loader, seed_workers=False)."
                )
            fields["generator"] = feed.generator
        if feed.share is not None:
            # It yields the lists of samples of whole batches, which DataLoader then only collates.
            fields |= {"dataset": feed.share, "batch_sampler": None}
    # Not setattr: DataLoader refuses to change these attributes after its __init__.
    vars(mine).update(fields)
    return mine


@overload
def batches(
    rt: Runtime,
    loader: Iterable[T],
    cursor: Cursor | SupportsIndex | None = None,
    *,
    move_to_device: bool = True,
    with_cursor: Literal[False] = False,
) -> Iterator[T]: ...
@overload
def batches(
    rt: Runtime,
    loader: Iterable[T],
    cursor: Cursor | SupportsIndex | None = None,
    *,
    move_to_device: bool = True,
    with_cursor: Literal[True],
) -> Iterator[tuple[T, Cursor]]: ...
def batches(
    rt: Runtime,
    loader: Iterable[Any],
    cursor: Cursor | SupportsIndex | None = None,
    *,
    move_to_device: bool = True,
    with_cursor: bool = False,
) -> Iterator[Any]:
    """The rank's batches from a place in the data to the end of that epoch, on the device.

    Laws: the same cursor gives the same batches. Stopping after any batch and going on from its cursor gives the rest
    of the epoch, on another world size or batch size too. Skipped samples are not read again, at no cost (of an
    iterable dataset they are: it goes forward through them). Augmentations drawn in workers are those of the batch's
    place in the order, wherever the iteration began. On CUDA, batches are copied on a stream of their own, two ahead,
    while steps compute; copies wait for nobody out of memory that is pinned (`DataLoader(..., pin_memory=True)`).

    Args:
        rt: the runtime.
        loader: what `setup_dataloader` returned. Or any iterable of batches of this rank: it is gone through as it is.
            A loader set up with `shard=False` counts as one; its samplers are told the epoch by `set_epoch`, where
            they have that.
        cursor: where to start: a `Cursor`, or the number of an epoch (with `rt.seed`), whose order it decides; None is
            `Cursor(seed=rt.seed, epoch=0, index=0)`.
        move_to_device: whether every batch is moved by `to_device`.
        with_cursor: whether to yield pairs (batch, where to go on after it). The last cursor is the start of the next
            epoch.

    Returns:
        An iterator over the rank's batches, or over (batch, cursor). With `persistent_workers=True` a loader has one
        set of workers: a new iteration ends the one before.

    Raises:
        DataError: the cursor does not fit, the loader has no order to start in or to give cursors for, or, on several
            ranks, it was not set up (all would get the same data). A sampler or an iterable dataset that does not yield
            the same on every rank: on all ranks.

    Not collective over map-style datasets in order or with `shuffle=True`, but all ranks take the same number of steps.
    Collective with a sampler of your own (one comparison of digests an epoch) and over an `IterableDataset` (votes on
    the next steps, on their way while a step computes, since its end is not known): every rank goes through it.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> loader = ff.setup_dataloader(rt, DataLoader(range(6), batch_size=2))
        >>> for batch, cursor in ff.batches(rt, loader, ff.Cursor(epoch=3, index=2), with_cursor=True):
        ...     print(batch, cursor)
        tensor([2, 3]) Cursor(seed=0, epoch=3, index=4)
        tensor([4, 5]) Cursor(seed=0, epoch=4, index=0)
    """
    feed: Feed | None = getattr(loader, FEED, None)
    if feed is None:
        found = _iterate_foreign(rt, loader, cursor, with_cursor)
        return moved(rt, found) if move_to_device else found
    if cursor is None or isinstance(cursor, SupportsIndex):
        cursor = Cursor(seed=rt.seed, epoch=0 if cursor is None else index(cursor))
    steps = feed.plan(cursor)
    if steps.num is None:
        found, after = iterate_stream(loader, feed, cursor, steps, with_cursor, rt.world)
    else:
        found, after = iterate(loader, feed, cursor, steps, with_cursor), cursors(steps, cursor)
    if move_to_device:
        found = moved(rt, found)
    return zip(found, after, strict=steps.num is not None) if with_cursor else found


def _iterate_foreign(
    rt: Runtime, loader: Any, cursor: Cursor | SupportsIndex | None, with_cursor: bool
) -> Iterator[Any]:
    set_up = getattr(loader, FEED, loader) is None
    if isinstance(loader, DataLoader) and not set_up and rt.world_size > 1:
        raise DataError(
            f"this DataLoader was not set up, so all {rt.world_size} ranks would get the same data. Write loader ="
            " ff.setup_dataloader(rt, loader), or with shard=False if it shares out the data by itself."
        )
    if with_cursor or (cursor is not None and not isinstance(cursor, SupportsIndex) and cursor.index):
        raise DataError(
            "only a loader from ff.setup_dataloader(rt, loader) has an order of samples to start in or to give cursors"
            f" for, and this {type(cast(object, loader)).__name__} has none. Use that (with shard=True), or"
            " Cursor(index=0) and with_cursor=False."
        )
    if cursor is not None:
        epoch = index(cursor) if isinstance(cursor, SupportsIndex) else cursor.epoch
        for name in ("sampler", "batch_sampler", "dataset"):
            tell_epoch(getattr(cast(object, loader), name, None), epoch)
    found = iter(cast("Iterable[Any]", loader))
    if set_up and getattr(cast(object, loader), IN_STEP, False):
        return (batch for batch, _ in with_next(found, rt.world, int, strict=False))
    return found
