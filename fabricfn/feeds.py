"""The object that gives a DataLoader the indices of its rank, and how it is made from a user's loader.

What a rank takes when is decided in `order.py` and `passes.py`; torch's DataLoader needs an object to ask for it.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from typing import Any, cast

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from fabricfn.collectives.agreement import agree, attempt, take_apart
from fabricfn.collectives.groups import members_of
from fabricfn.errors import DataError, MismatchError, UnevenBatchesWarning
from fabricfn.order import Deal, Tail, cut, is_even, num_steps, stream
from fabricfn.passes import Pass, Plan, batched_pass, own_pass, sampled_pass
from fabricfn.random import fold_in
from fabricfn.records import Cursor
from fabricfn.runtimes import Runtime
from fabricfn.samplers import Ordering, length_of, order_digest, rows_of
from fabricfn.seeding import Seeded
from fabricfn.streams import Share
from fabricfn.watching import counted


class Feed(Sampler[Any]):
    """What one rank takes, step after step: the object that torch's DataLoader asks for indices.

    It has state, since a DataLoader calls `__iter__` without arguments: the pass that `batches` wants the next
    iteration to be, and the epoch of the next direct iteration (one that `batches` did not ask for).
    """

    def __init__(
        self, plan: Plan, *, rt: Runtime, length: Callable[[], int], ready: bool = False, share: Share | None = None
    ) -> None:
        self.plan = plan
        self.rank = rt.rank
        self.seed = rt.seed
        self.length = length
        self.ready = ready
        self.share = share
        self.generator = torch.Generator()
        """The loader's: torch draws the seeds of the workers from it, right after `__iter__`."""
        self.seeds_batches = False
        """Whether each list of indices brings the seed of its batch along, see [Note: seeding of workers]."""
        self.pending: tuple[Cursor, Pass] | None = None
        self.epoch = 0
        self.started = 0
        """How many iterations were begun."""

    def __len__(self) -> int:
        return self.length()

    def __iter__(self) -> Iterator[Any]:
        pending = self.pending
        cursor = Cursor(seed=self.seed, epoch=self.epoch) if pending is None else pending[0]
        self.generator.manual_seed(fold_in(stream(cursor.seed, cursor.epoch, "workers"), self.rank).seed)
        self.started += 1
        if self.share is not None:
            self.share.begin(cursor)
        lists = self._lists(pending)
        return chain.from_iterable(lists) if self.ready else lists

    def _lists(self, pending: tuple[Cursor, Pass] | None) -> Iterator[Any]:
        # A direct iteration takes its epoch at its first step: a loader with workers calls __iter__ twice.
        if pending is None:
            cursor = Cursor(seed=self.seed, epoch=self.epoch)
            self.epoch += 1
            pending = cursor, self.plan(cursor)
        cursor, found = pending
        if not self.seeds_batches:
            yield from found.lists()
            return
        base = stream(cursor.seed, cursor.epoch, "batches")
        for place, rows in zip(found.places(), found.lists(), strict=True):
            yield Seeded(cast("list[Any]", rows), fold_in(base, place).bits) if type(rows) is list else rows


def make_feed(rt: Runtime, loader: DataLoader[Any], tail: Tail, seed_workers: bool) -> Feed:
    """The feed of this rank over what `loader` yields; errors and warnings are those of `setup_dataloader`."""
    if isinstance(loader.dataset, IterableDataset):
        return _stream_feed(rt, loader, tail, seed_workers)
    batcher: Any = vars(loader)["batch_sampler"]
    sampler: Any = vars(loader)["sampler"] if batcher is None else getattr(batcher, "sampler", None)
    if any(isinstance(one, DistributedSampler) for one in (sampler, batcher)):
        raise DataError(
            f"sampler={type(cast(object, sampler)).__name__} shares out the data over the ranks by itself, and sharing"
            " out its part again would lose samples. Leave it out and write DataLoader(..., batch_size=...,"
            " shuffle=True or False); or keep it: ff.setup_dataloader(rt, loader, shard=False)."
        )
    if batcher is not None and type(batcher) is not BatchSampler:
        feed = _batch_sampler_feed(rt, Ordering(batcher, loader.dataset, "batch_sampler"), tail)
    else:
        feed = _sampler_feed(rt, loader, sampler, batcher, tail)
    feed.seeds_batches = seed_workers and loader.num_workers > 0 and not feed.ready
    return feed


def _sampler_feed(rt: Runtime, loader: DataLoader[Any], sampler: Any, batcher: Any, tail: Tail) -> Feed:
    shuffle = type(sampler) is RandomSampler and not sampler.replacement
    shuffle = shuffle and sampler.num_samples == len(sampler.data_source)
    own = shuffle or type(sampler) is SequentialSampler
    deal = Deal(
        num_samples=len(sampler.data_source) if own else length_of(sampler),
        world_size=rt.world_size,
        batch_size=1 if batcher is None else batcher.batch_size,
        tail="drop" if batcher is not None and batcher.drop_last else tail,
        ready=batcher is None,
    )
    if own or deal.num_samples >= 0:
        _check(rt, deal)
    if own:
        plan = partial(own_pass, deal, rt.rank, shuffle)
        return Feed(plan, rt=rt, length=partial(num_steps, deal), ready=deal.ready)
    ordering = Ordering(sampler, loader.dataset, "sampler")

    def sampled(cursor: Cursor) -> Pass:
        order = _agreed_order(rt, ordering, cursor)
        return sampled_pass(replace(deal, num_samples=len(order)), rt.rank, order, cursor.index)

    def length() -> int:
        return num_steps(replace(deal, num_samples=len(sampler)))

    return Feed(sampled, rt=rt, length=length, ready=deal.ready)


def _batch_sampler_feed(rt: Runtime, ordering: Ordering, tail: Tail) -> Feed:
    warned: list[str] = []

    def batched(cursor: Cursor) -> Pass:
        order = _agreed_order(rt, ordering, cursor)
        sizes = [len(rows_of(batch, ordering.name)) for batch in order]
        found = batched_pass(order, sizes, rt.world_size, rt.rank, tail, cursor.index)
        if found.uneven and rt.rank == 0 and not warned:
            warned.append(found.uneven)
            _warn_uneven(f"{ordering.name}: {found.uneven}", stacklevel=4)
        return found

    def length() -> int:
        full, rest = divmod(len(ordering.sampler), rt.world_size)
        return full + (rest > 0 and tail == "spread")

    return Feed(batched, rt=rt, length=length)


def _stream_feed(rt: Runtime, loader: DataLoader[Any], tail: Tail, seed_workers: bool) -> Feed:
    dataset, ready = loader.dataset, loader.batch_size is None
    deal = Deal(
        num_samples=length_of(dataset),
        world_size=rt.world_size,
        batch_size=loader.batch_size or 1,
        tail="drop" if loader.drop_last else tail,
        ready=ready,
    )
    if ready and rt.world_size > 1 and deal.tail != "drop":
        raise DataError(
            f"with batch_size=None every item of {type(dataset).__name__} is a batch and goes to one rank, but where a"
            f" stream ends is not known, and {rt.world_size} ranks must take the same number of steps. Write"
            f' ff.setup_dataloader(rt, loader, tail="drop") to leave the last ones out, fewer than {rt.world_size}.'
        )
    if deal.num_samples >= 0:
        if deal.num_samples < rt.world_size:
            raise _too_few(deal)
        if rt.rank == 0 and deal.tail == "spread" and deal.num_samples % rt.world_size:
            _warn_uneven(f"{deal.num_samples} samples on {rt.world_size} ranks: the last step is uneven", stacklevel=6)
    share = Share(
        dataset,
        deal,
        rank=rt.rank,
        num_workers=loader.num_workers,
        persistent=loader.persistent_workers,
        seeded=seed_workers,
    )

    def streamed(cursor: Cursor) -> Pass:
        if cursor.index < 0:
            raise DataError(
                f"a cursor's index counts the samples of one epoch from 0 on, but {cursor.index} was given."
            )
        steps = partial(range, cursor.index + deal.step_size, 1 << 62, deal.step_size)
        return Pass(num=None, ends=lambda: iter(steps()), lists=lambda: repeat([None]), places=lambda: iter(()))

    return Feed(streamed, rt=rt, length=lambda: len(share), ready=True, share=share)


def _agreed_order(rt: Runtime, ordering: Ordering, cursor: Cursor) -> list[Any]:
    """What the user's sampler yields in this epoch; every rank must come to the same. Collective."""
    order, problem = attempt(ordering.draw, cursor.seed, cursor.epoch)
    digest = "" if problem is not None or rt.world.group is None else order_digest(order)
    found = f"{len(order)} items in the order {digest}" if problem is None else f"which is impossible: {problem}"
    text = f"batches() over {ordering.name}, {found}"
    try:
        check = counted(rt.world, "batches", agree, apart=True)
        check(rt.world, members_of(rt.world, None), text, take_apart(()), problem)
    except MismatchError as error:
        raise DataError(
            f"{ordering.name} must yield the same order on every rank, since the ranks take slices of it, but in epoch"
            f" {cursor.epoch} it does not. Where it shares out the data by itself: ff.setup_dataloader(rt, loader,"
            f" shard=False). Where it draws at random, from a generator that is an attribute of it or a global one, or"
            f" from the epoch (set_epoch). {error}"
        ) from error
    return order


def _check(rt: Runtime, deal: Deal) -> None:
    if deal.num_samples < deal.world_size:
        raise _too_few(deal)
    if num_steps(deal) == 0:
        raise DataError(
            f"every epoch would be empty: dropping the incomplete last step leaves nothing of {deal.num_samples}"
            f" samples, since one step takes {deal.batch_size} on each of {deal.world_size} ranks. Use a smaller"
            ' batch_size, or tail="spread" and drop_last=False.'
        )
    if rt.rank == 0 and not is_even(deal):
        sizes = cut(deal)[1]
        _warn_uneven(
            f"{deal.num_samples} samples on {deal.world_size} ranks with batch_size={deal.batch_size}: the last"
            f" {'step has' if len(sizes) == 1 else 'steps have'} {' and '.join(map(str, sizes))} rows, which is not the"
            " same number on every rank",
            stacklevel=7,
        )


def _too_few(deal: Deal) -> DataError:
    return DataError(
        f"every rank must get at least one row, but the dataset has {deal.num_samples} samples for"
        f" {deal.world_size} ranks. Use fewer ranks, or give every rank all of it:"
        " ff.setup_dataloader(rt, loader, shard=False)."
    )


def _warn_uneven(found: str, *, stacklevel: int) -> None:
    warnings.warn(
        f"{found}. A mean over ranks is then exact only with ff.value_and_grad(..., weighted=True). Use that and ignore"
        ' ff.errors.UnevenBatchesWarning, or leave them out: tail="drop".',
        UnevenBatchesWarning,
        stacklevel=stacklevel,
    )
