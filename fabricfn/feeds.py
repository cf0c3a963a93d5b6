"""The object that gives a DataLoader the indices of its rank, and how it is made from a user's loader.

What a rank takes when is decided in `order.py`; torch's DataLoader needs an object to ask for it.
"""

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from fabricfn.errors import CapabilityError, DataError, UnevenBatchesWarning
from fabricfn.order import Deal, Tail, cut, is_even, num_steps, rank_indices, stream
from fabricfn.random import fold_in
from fabricfn.records import Cursor
from fabricfn.runtimes import Runtime


class Feed(Sampler[Any]):
    """What one rank takes, step after step: the object that torch's DataLoader asks for indices.

    It has state, since a DataLoader calls `__iter__` without arguments: the cursor from which `batches` wants the next
    iteration to start, and the epoch of the next direct iteration (one without a cursor).
    """

    def __init__(self, deal: Deal, *, rank: int, seed: int, shuffle: bool) -> None:
        self.deal = deal
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self.generator = torch.Generator()
        """The loader's: torch draws the seeds of the workers from it, right after `__iter__`."""
        self.cursor: Cursor | None = None
        self.epoch = 0
        self.started = 0
        """How many iterations were begun."""

    def __len__(self) -> int:
        return num_steps(self.deal)

    def __iter__(self) -> Iterator[Any]:
        cursor = self.cursor
        epoch, seed = (self.epoch, self.seed) if cursor is None else (cursor.epoch, cursor.seed)
        self.generator.manual_seed(fold_in(stream(seed, epoch, "workers"), self.rank).seed)
        self.started += 1
        lists = self._lists(cursor)
        return chain.from_iterable(lists) if self.deal.ready else lists

    def _lists(self, cursor: Cursor | None) -> Iterator[list[int]]:
        # A direct iteration takes its epoch at its first step: a loader with workers calls __iter__ twice.
        if cursor is None:
            cursor = Cursor(seed=self.seed, epoch=self.epoch)
            self.epoch += 1
        place = {"seed": cursor.seed, "epoch": cursor.epoch, "start": cursor.index}
        yield from rank_indices(self.deal, self.rank, shuffle=self.shuffle, **place)


def make_feed(rt: Runtime, loader: DataLoader[Any], tail: Tail) -> Feed:
    """The feed of this rank over the samples of `loader`; errors and warnings are those of `setup_dataloader`."""
    if isinstance(loader.dataset, IterableDataset):
        raise CapabilityError(
            f"{type(loader.dataset).__name__} is an IterableDataset: it has no indices, so fabricfn cannot share it out"
            " over ranks. Give it __getitem__ and __len__ (a map-style Dataset), or let it yield this rank's part"
            " by itself and write ff.setup_dataloader(rt, loader, shard=False)."
        )
    batcher: Any = vars(loader)["batch_sampler"]
    if batcher is not None and type(batcher) is not BatchSampler:
        raise _foreign("batch_sampler", batcher)
    sampler: Any = vars(loader)["sampler"] if batcher is None else batcher.sampler
    shuffle = type(sampler) is RandomSampler
    if not shuffle and type(sampler) is not SequentialSampler:
        raise _foreign("sampler", sampler)
    length = len(sampler.data_source)
    if shuffle and (sampler.replacement or sampler.num_samples != length):
        raise DataError(
            "a RandomSampler with replacement or num_samples does not take every sample once, so it cannot be shared"
            " out over ranks. Write DataLoader(..., shuffle=True), or keep it on every rank:"
            " ff.setup_dataloader(rt, loader, shard=False)."
        )
    deal = Deal(
        num_samples=length,
        world_size=rt.world_size,
        batch_size=1 if batcher is None else batcher.batch_size,
        tail="drop" if batcher is not None and batcher.drop_last else tail,
        ready=batcher is None,
    )
    _check(rt, deal)
    return Feed(deal, rank=rt.rank, seed=rt.seed, shuffle=shuffle)


def _foreign(argument: str, sampler: object) -> DataError:
    return DataError(
        f"{argument}={type(sampler).__name__}: fabricfn decides which rank takes which sample, and does so for torch's"
        " own samplers only. Leave the argument out and write DataLoader(..., batch_size=..., shuffle=True or False);"
        " or, if it shares out the data over the ranks by itself, ff.setup_dataloader(rt, loader, shard=False)."
    )


def _check(rt: Runtime, deal: Deal) -> None:
    if deal.num_samples < deal.world_size:
        raise DataError(
            f"every rank must get at least one row, but the dataset has {deal.num_samples} samples for"
            f" {deal.world_size} ranks. Use fewer ranks, or give every rank all of it:"
            " ff.setup_dataloader(rt, loader, shard=False)."
        )
    if num_steps(deal) == 0:
        raise DataError(
            f"every epoch would be empty: dropping the incomplete last step leaves nothing of {deal.num_samples}"
            f" samples, since one step takes {deal.batch_size} on each of {deal.world_size} ranks. Use a smaller"
            ' batch_size, or tail="spread" and drop_last=False.'
        )
    if rt.rank == 0 and not is_even(deal):
        sizes = cut(deal)[1]
        warnings.warn(
            f"{deal.num_samples} samples on {deal.world_size} ranks with batch_size={deal.batch_size}: the last"
            f" {'step has' if len(sizes) == 1 else 'steps have'} {' and '.join(map(str, sizes))} rows, which is not the"
            " same number on every rank. A mean over ranks is then exact only with ff.value_and_grad(...,"
            ' weighted=True). Use that and ignore ff.errors.UnevenBatchesWarning, or leave them out: tail="drop".',
            UnevenBatchesWarning,
            stacklevel=5,
        )
