"""Iterable datasets on ranks that talk: they end together, and a stream that differs is found."""

import numpy as np
import torch
from torch.utils.data import DataLoader

from fabricfn.data import batches, setup_dataloader
from fabricfn.errors import DataError
from fabricfn.order import Deal
from fabricfn.records import Cursor
from fabricfn.streams import sample_digest
from fabricfn.testing import processes, threads
from fabricfn.votes import with_next
from fabricfn.world import World
from tests.support.feeds import lists, workers
from tests.support.streams import Stream, model


class SharesOverRanks(Stream):
    def __init__(self, num, rt):
        super().__init__(num)
        self.rank, self.world_size = rt.rank, rt.world_size

    def __iter__(self):
        return iter(range(self.rank, self.num, self.world_size))


class EndsEarly(Stream):
    def __init__(self, num, rt):
        super().__init__(num - 4 * rt.rank)


class Fails(Stream):
    def __init__(self, num, rt):
        super().__init__(num)
        self.fails = rt.rank == 1

    def __iter__(self):
        for place in range(self.num):
            if self.fails and place == 6:
                raise ValueError("a torn file")
            yield place


def plain_epochs(rt, num_workers):
    loader = setup_dataloader(rt, DataLoader(Stream(23), batch_size=3, num_workers=num_workers))
    pairs = [(b.tolist(), c) for b, c in batches(rt, loader, with_cursor=True)]
    return pairs, lists(batches(rt, loader, 1)), lists(batches(rt, loader, pairs[1][1]))


def outcome(rt, dataset, num_workers=0):
    loader = setup_dataloader(rt, DataLoader(dataset(24, rt), batch_size=2, num_workers=num_workers))
    found = []
    try:
        for batch in batches(rt, loader):
            found.append(batch.tolist())
    except (DataError, ValueError) as error:
        return found, f"{type(error).__name__}: {error}"
    return found, ""


def stops_together(rt, tail):
    dataset = EndsEarly(20, rt)
    loader = setup_dataloader(rt, DataLoader(dataset, batch_size=2), shard=False, tail=tail)
    return len(list(batches(rt, loader)))


@workers
def test_ranks_end_together():
    with processes(2) as world:
        for num_workers in (0, 2):
            for rank, (pairs, epoch, rest) in enumerate(world.run(plain_epochs, num_workers)):
                expected = model(23, Deal(num_samples=23, world_size=2, batch_size=3))[rank]
                assert [rows for rows, _ in pairs] == expected == epoch
                assert [cursor for _, cursor in pairs] == [
                    Cursor(index=6),
                    Cursor(index=12),
                    Cursor(index=18),
                    Cursor(epoch=1),
                ]
                assert rest == expected[2:]
        for num_workers in (0, 1):
            for found, text in world.run(outcome, SharesOverRanks, num_workers):
                assert found == []
                assert "its first sample is not the same" in text and "shard=False" in text
        for rank, (found, text) in enumerate(world.run(outcome, EndsEarly)):
            assert len(found) <= 5
            assert "ended earlier on some ranks than on others: after 5 batches on one" in text
            assert f"rank {rank} has {5 if rank else 6}" in text
        first, second = world.run(outcome, Fails)
        assert first[0] == [[0, 2]] and "another rank failed to read its next batch" in first[1]
        assert second == ([[1, 3]], "ValueError: a torn file")
        assert world.run(stops_together, "drop") == [8, 8]
        assert world.run(stops_together, "spread") == [10, 8], "all of it is the loader's"


def test_ranks_that_are_threads_end_together():
    with threads(3) as world:
        found = world.run(plain_epochs, 0)
    assert [pairs_of[1] for pairs_of in found] == model(23, Deal(num_samples=23, world_size=3, batch_size=3))


def test_reading_ahead_takes_one_batch_and_says_which_is_the_last():
    source = iter(range(3))
    pairs = with_next(source, World(), int, strict=True)
    assert next(pairs) == (0, False)
    assert next(source) == 2, "1 was read ahead, and no more"
    assert list(pairs) == [(1, True)]


def test_digests_of_samples():
    same = {"x": torch.arange(6).view(2, 3).T, "y": ["a", 1, np.ones(2)], "z": object()}
    assert sample_digest(same) == sample_digest({**same, "z": object()})
    others = [
        {**same, "x": torch.arange(6).view(3, 2)},
        {**same, "y": ["a", 2, np.ones(2)]},
        {},
        torch.ones(2),
        torch.ones(3),
    ]
    assert len({sample_digest(other) for other in [same, *others]}) == 6
