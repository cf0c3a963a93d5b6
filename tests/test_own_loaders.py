"""Loaders of the user's: what is kept of them, what is refused, and those that are not shared out."""

import warnings

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from fabricfn.data import batches, setup_dataloader, setup_dataloaders
from fabricfn.errors import ConfigurationError, DataError, UnevenBatchesWarning
from fabricfn.records import Cursor
from tests.support.feeds import ONE, Numbers, lists, ranks_of, workers


def test_ready_batches_that_ranks_cannot_share_evenly_are_refused_or_dropped():
    rt = ranks_of(2)[1]
    with pytest.raises(DataError, match=r'tail="drop"'):
        setup_dataloader(rt, DataLoader(range(5), batch_size=None))
    loader = setup_dataloader(rt, DataLoader(range(5), batch_size=None), tail="drop")
    assert list(batches(rt, loader)) == [1, 3]


def test_what_the_user_chose_is_kept_and_their_loader_left_alone():
    collate, init = (lambda rows: rows), (lambda worker: None)
    dataset = Numbers(8)
    theirs = DataLoader(
        dataset, 2, True, collate_fn=collate, worker_init_fn=init, num_workers=2, prefetch_factor=3, timeout=7
    )
    mine, sampler = setup_dataloader(ONE, theirs), theirs.batch_sampler
    kept = ("dataset", "batch_size", "collate_fn", "worker_init_fn", "num_workers", "prefetch_factor", "timeout")
    assert [getattr(mine, name) for name in kept] == [getattr(theirs, name) for name in kept]
    assert theirs.batch_sampler is sampler
    assert theirs.generator is None
    assert mine is not theirs


class Labelled(DataLoader):
    """A loader of the user's own, with an argument that cannot be guessed from its attributes."""

    def __init__(self, label, *args, **options):
        super().__init__(*args, **options)
        self._hidden = label

    def __iter__(self):
        for batch in super().__iter__():
            yield self._hidden, batch


def test_a_loader_class_of_the_user_is_kept():
    loader = setup_dataloader(ONE, Labelled("a", Numbers(6), batch_size=2, shuffle=True))
    plain = setup_dataloader(ONE, DataLoader(Numbers(6), batch_size=2, shuffle=True))
    for epoch in (3, 4):
        found = list(batches(ONE, loader, epoch))
        assert {label for label, _ in found} == {"a"}
        assert lists(batch for _, batch in found) == lists(batches(ONE, plain, epoch))


class Hoarding(DataLoader):
    """A loader that makes its iterator once and for all."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.hoard = super().__iter__()

    def __iter__(self):
        yield from self.hoard


def test_a_loader_class_that_does_not_ask_for_indices_is_refused():
    loader = setup_dataloader(ONE, Hoarding(Numbers(6), batch_size=2))
    with pytest.raises(DataError, match="Hoarding did not ask"):
        batches(ONE, loader, 1)


def test_torchs_own_samplers_may_be_written_out():
    numbers = Numbers(8)
    sampled = DataLoader(numbers, batch_sampler=BatchSampler(RandomSampler(numbers), 3, drop_last=True))
    loader = setup_dataloader(ONE, sampled)
    expected = setup_dataloader(ONE, DataLoader(numbers, batch_size=3, shuffle=True, drop_last=True))
    assert lists(batches(ONE, loader)) == lists(batches(ONE, expected))
    assert len(loader) == 2
    part = setup_dataloader(ONE, DataLoader(numbers, batch_size=4, sampler=SequentialSampler(range(4))))
    assert lists(batches(ONE, part)) == [[0, 1, 2, 3]]


# Warnings and errors


def test_unequal_batches_are_said_once_on_rank_0_at_the_callers_line():
    theirs = DataLoader(range(13), batch_size=4)
    first, second = ranks_of(2)
    for set_up in (setup_dataloader, setup_dataloaders):
        with pytest.warns(UnevenBatchesWarning, match=r"weighted=True") as seen:
            set_up(first, theirs)
        assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup_dataloader(second, theirs)
        setup_dataloader(first, theirs, tail="drop")
        setup_dataloader(ONE, theirs)
        setup_dataloader(first, DataLoader(range(14), batch_size=4))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(range(4), sampler=DistributedSampler(range(4), 2, 0)), DataError, "sampler=DistributedSampler"),
        (
            DataLoader(range(4), batch_sampler=BatchSampler(DistributedSampler(range(4), 2, 0), 1, False)),
            DataError,
            "sampler=DistributedSampler",
        ),
        (DataLoader(range(1)), DataError, "1 samples for 2 ranks"),
        (DataLoader(range(4), sampler=[3]), DataError, "1 samples for 2 ranks"),
        (DataLoader([]), DataError, "0 samples for 2 ranks"),
        (DataLoader(range(4), batch_size=4, drop_last=True), DataError, "every epoch would be empty"),
        ([1, 2], DataError, "takes a torch.utils.data.DataLoader, but list was given"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_name(loader, error, message):
    with pytest.raises(error, match=message):
        setup_dataloader(ranks_of(2)[0], loader)


def test_unknown_tails_and_second_set_ups_are_refused():
    with pytest.raises(ConfigurationError, match="'pad' is unknown"):
        setup_dataloader(ONE, DataLoader(range(4)), tail="pad")
    with pytest.raises(DataError, match="set up already"):
        setup_dataloader(ONE, setup_dataloader(ONE, DataLoader(range(4))))


def test_cursors_that_do_not_fit_are_refused_at_once():
    loader = setup_dataloader(ONE, DataLoader(range(10), batch_size=4))
    for index in (-1, 11):
        with pytest.raises(DataError, match=r"0 \.\. 10"):
            batches(ONE, loader, Cursor(index=index))
    assert list(batches(ONE, loader, Cursor(index=10))) == []
    rt = ranks_of(4)[1]
    with pytest.raises(DataError, match="2 of 10 samples are left"):
        batches(rt, setup_dataloader(rt, DataLoader(range(10), batch_size=4)), Cursor(index=8))


@workers
def test_batches_out_of_order_have_no_cursor():
    loader = setup_dataloader(ONE, DataLoader(range(8), batch_size=2, num_workers=2, in_order=False))
    with pytest.raises(DataError, match="in_order=True"):
        batches(ONE, loader, with_cursor=True)
    assert sorted(torch.cat(list(batches(ONE, loader))).tolist()) == list(range(8))


# Loaders whose order is the user's


def test_a_loader_that_is_not_shared_out_is_the_users_own():
    dataset, rt = list(range(8)), ranks_of(2)[1]
    theirs = DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, 2, 1, shuffle=True))
    loader = setup_dataloader(rt, theirs, shard=False)
    orders = [lists(batches(rt, loader, epoch)) for epoch in (0, 1)]
    assert orders[0] != orders[1], "its sampler is told the epoch"
    assert lists(batches(rt, loader)) == orders[1], "without a cursor it is not"
    assert lists(theirs) == orders[1]


def test_iterables_are_gone_through_as_they_are():
    rt = ranks_of(2)[1]
    ready = [torch.ones(2), torch.zeros(3)]
    assert [len(batch) for batch in batches(rt, ready, 7)] == [2, 3]
    stream = setup_dataloader(rt, DataLoader(Stream(), batch_size=2), shard=False)
    assert lists(batches(rt, stream)) == [[0, 1], [2, 3]]
    assert lists(batches(ONE, DataLoader(range(4), batch_size=2))) == [[0, 1], [2, 3]]


def test_iterables_have_no_cursors():
    for options in ({"cursor": Cursor(index=2)}, {"with_cursor": True}):
        with pytest.raises(DataError, match="this list has none"):
            batches(ONE, [1, 2], **options)


def test_a_loader_that_was_not_set_up_is_refused_on_several_ranks():
    with pytest.raises(DataError, match="all 2 ranks would get the same data"):
        batches(ranks_of(2)[0], DataLoader(range(4)))
