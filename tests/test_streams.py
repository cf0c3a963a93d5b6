"""Iterable datasets, shared out over ranks and workers: each sample once, the same number of steps on every rank."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from torch.utils.data import DataLoader, get_worker_info

from fabricfn.data import batches, setup_dataloader
from fabricfn.errors import DataError, UnevenBatchesWarning
from fabricfn.order import Deal
from fabricfn.records import Cursor
from fabricfn.streams import dealt
from tests.support.feeds import ONE, lists, ranks_of, workers
from tests.support.streams import Stream, model


class Sized(Stream):
    def __len__(self):
        return self.num


class SharesOverWorkers(Stream):
    """As torch's documentation shows it."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(range(first, self.num, step))


class Noisy(Stream):
    """Shuffled and augmented by the global generators."""

    def __iter__(self):
        order = list(range(self.num))
        random.shuffle(order)
        for place in order:
            yield torch.tensor([place, float(torch.rand(())), np.random.rand()])


class ByEpoch(Stream):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return (100 * self.epoch + place for place in range(self.num))


def of_ranks(world_size, dataset, cursor=0, tail="spread", seed=0, **options):
    """rank -> its batches."""
    found = []
    for rt in ranks_of(world_size, seed):
        loader = setup_dataloader(rt, DataLoader(dataset, **options), tail=tail)
        found.append(lists(batches(rt, loader, cursor)))
    return found


@st.composite
def deals(draw):
    deal = Deal(
        num_samples=draw(st.integers(0, 60)),
        world_size=draw(st.integers(1, 4)),
        batch_size=draw(st.integers(1, 5)),
        tail=draw(st.sampled_from(["spread", "drop"])),
    )
    assume(deal.tail == "drop" or deal.num_samples >= deal.world_size or deal.num_samples == 0)
    return deal


@given(deals(), st.data())
def test_each_sample_comes_once_and_all_ranks_take_the_same_number_of_steps(deal, data):
    num = deal.num_samples
    found = [list(dealt(iter(range(num)), deal, rank, 0)) for rank in range(deal.world_size)]
    assert found == model(num, deal)
    assert len({len(rank) for rank in found}) == 1
    taken = sorted(itertools.chain.from_iterable(rows for rank in found for rows in rank))
    assert taken == list(range(num if deal.tail == "spread" else num - num % deal.step_size))
    for step in zip(*found, strict=True):
        assert 1 <= min(map(len, step)) <= max(map(len, step)) <= min(*map(len, step), deal.batch_size) + 1
    if found[0]:
        stop = data.draw(st.integers(0, len(found[0]) - 1))
        start = stop * deal.step_size
        again = [list(dealt(iter(range(num)), deal, rank, start)) for rank in range(deal.world_size)]
        assert again == [rank[stop:] for rank in found]


@pytest.mark.filterwarnings("ignore::fabricfn.errors.UnevenBatchesWarning")
@pytest.mark.parametrize("dataset", [Stream, Sized])
def test_loaders_yield_what_the_law_says(dataset):
    for num, world_size, batch_size, tail in itertools.product((11, 12, 13), (1, 2, 3), (1, 4), ("spread", "drop")):
        deal = Deal(num_samples=num, world_size=world_size, batch_size=batch_size, tail=tail)
        found = of_ranks(world_size, dataset(num), batch_size=batch_size, tail=tail)
        assert found == model(num, deal), (num, world_size, batch_size, tail)


def test_one_rank_is_the_plain_loader():
    for options in ({"batch_size": 4}, {"batch_size": 4, "drop_last": True}):
        plain = DataLoader(Stream(10), **options)
        assert lists(batches(ONE, setup_dataloader(ONE, plain))) == lists(plain)
    plain = DataLoader(Stream(10), batch_size=None)
    assert list(batches(ONE, setup_dataloader(ONE, plain))) == list(plain)


@workers
@pytest.mark.parametrize("dataset", [Stream, SharesOverWorkers, Sized])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing_even_where_the_dataset_shares_itself_out_over_them(dataset, persistent):
    for num, num_workers in ((23, 2), (24, 3), (2, 3)):
        plain = of_ranks(2, Stream(num), batch_size=3)
        for rt in ranks_of(2):
            theirs = DataLoader(dataset(num), batch_size=3, num_workers=num_workers, persistent_workers=persistent)
            with pytest.warns(UnevenBatchesWarning) if dataset is Sized and num % 2 and not rt.rank else nothing():
                loader = setup_dataloader(rt, theirs)
            for _ in range(2):
                assert lists(batches(rt, loader)) == plain[rt.rank]
            assert lists(batches(rt, loader, Cursor(index=num - 2))) == [[num - 2 + rt.rank]]
            assert lists(loader) == plain[rt.rank]


def nothing():
    return pytest.MonkeyPatch.context()


def test_the_cursor_after_a_batch_goes_on_there_at_another_world_and_batch_size():
    loader = setup_dataloader(ONE, DataLoader(Stream(22), batch_size=4))
    pairs = [(batch.tolist(), cursor) for batch, cursor in batches(ONE, loader, 5, with_cursor=True)]
    assert [cursor for _, cursor in pairs] == [
        *(Cursor(epoch=5, index=end) for end in (4, 8, 12, 16, 20)),
        Cursor(epoch=6),
    ]
    for stop in range(5):
        assert lists(batches(ONE, loader, pairs[stop][1])) == [rows for rows, _ in pairs[stop + 1 :]]
        for world_size, batch_size in ((2, 3), (2, 1)):
            found = of_ranks(world_size, Stream(22), pairs[stop][1], batch_size=batch_size)
            rest = sorted(row for rank in found for rows in rank for row in rows)
            assert rest == list(range(pairs[stop][1].index, 22))


def test_lengths_for_progress_bars():
    for rt in ranks_of(2):
        for num, steps in ((20, 3), (16, 2), (18, 3)):
            loader = setup_dataloader(rt, DataLoader(Sized(num), batch_size=4))
            assert len(loader) == steps == len(list(batches(rt, loader)))
        dropping = setup_dataloader(rt, DataLoader(Sized(20), batch_size=4), tail="drop")
        assert len(dropping) == 2 == len(list(batches(rt, dropping)))
    with pytest.raises(TypeError, match="no len"):
        len(setup_dataloader(ONE, DataLoader(Stream(4))))


def test_epochs_are_told_and_counted():
    loader = setup_dataloader(ONE, DataLoader(ByEpoch(2), batch_size=2))
    assert [lists(batches(ONE, loader, epoch)) for epoch in (0, 7)] == [[[0, 1]], [[700, 701]]]
    assert [lists(loader) for _ in range(2)] == [[[0, 1]], [[100, 101]]]
    mine = setup_dataloader(ONE, DataLoader(ByEpoch(2), batch_size=2), shard=False)
    assert lists(batches(ONE, mine, 3)) == [[300, 301]]


def test_two_iterations_at_once_do_not_disturb_each_other():
    loader = setup_dataloader(ONE, DataLoader(Stream(8), batch_size=2))
    runs = [batches(ONE, loader, Cursor(index=start)) for start in (0, 2)]
    found = [[next(run).tolist() for run in runs] for _ in range(3)]
    assert found == [[[0, 1], [2, 3]], [[2, 3], [4, 5]], [[4, 5], [6, 7]]]


@workers
def test_random_streams_are_functions_of_seed_and_epoch_at_any_number_of_workers():
    def epoch(num_workers, epoch, seed=0, persistent=False, start=0):
        found = []
        for rt in ranks_of(2, seed):
            options = {"num_workers": num_workers, "persistent_workers": persistent, "batch_size": 2}
            loader = setup_dataloader(rt, DataLoader(Noisy(12), **options, collate_fn=shaken))
            if persistent:
                list(batches(rt, loader, 9))
            found.append(torch.stack(list(batches(rt, loader, Cursor(seed=seed, epoch=epoch, index=start)))))
        return torch.stack(found, 1)

    before = torch.get_rng_state(), random.getstate()
    first = epoch(1, 0)
    assert sorted(first[..., 0].flatten().tolist()) == list(range(12)), "each sample once"
    assert len(first[..., 1:].unique()) == first[..., 1:].numel()
    for again in (epoch(2, 0), epoch(3, 0), epoch(2, 0, persistent=True)):
        assert torch.equal(first, again)
    assert torch.equal(epoch(2, 0, start=4), first[1:]), "and after a stop, bit for bit"
    for other in (epoch(1, 1), epoch(1, 0, seed=1)):
        assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def shaken(rows):
    """A collate function that draws at random, too."""
    return torch.cat([torch.stack(rows), torch.rand(len(rows), 1)], 1)


@workers
def test_the_generators_of_workers_can_be_left_alone():
    def init(worker):
        random.seed(5)
        torch.manual_seed(5)
        np.random.seed(5)

    options = {"batch_size": 2, "num_workers": 1, "worker_init_fn": init}
    loader = setup_dataloader(ONE, DataLoader(Noisy(12), **options), seed_workers=False)
    first, second = (torch.cat(list(batches(ONE, loader, epoch))) for epoch in (0, 1))
    assert torch.equal(first, second), "as the user wanted it"


# What is refused


def test_streams_that_cannot_be_shared_out_are_refused():
    rt = ranks_of(2)[1]
    with pytest.raises(DataError, match=r'batch_size=None.*tail="drop"'):
        setup_dataloader(rt, DataLoader(Stream(4), batch_size=None))
    ready = setup_dataloader(rt, DataLoader(Stream(5), batch_size=None), tail="drop")
    assert list(batches(rt, ready)) == [1, 3]
    with pytest.raises(DataError, match="1 samples for 2 ranks"):
        setup_dataloader(rt, DataLoader(Sized(1)))
    with pytest.raises(DataError, match="1 samples are left from 0 on, for 2 ranks"):
        list(batches(rt, setup_dataloader(rt, DataLoader(Stream(1)))))
    with pytest.raises(DataError, match="-1 was given"):
        batches(rt, setup_dataloader(rt, DataLoader(Stream(4))), Cursor(index=-1))


def test_uneven_last_steps_are_said_where_the_length_is_known():
    with pytest.warns(UnevenBatchesWarning, match="13 samples on 2 ranks.*weighted=True") as seen:
        setup_dataloader(ranks_of(2)[0], DataLoader(Sized(13), batch_size=4))
    assert [warning.filename for warning in seen] == [__file__]
