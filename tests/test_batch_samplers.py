"""Batch samplers of the user's own: whole batches go to the ranks in turn."""

import warnings

import pytest
from hypothesis import assume, given, settings, strategies as st
from torch.utils.data import BatchSampler, DataLoader

from fabricfn.data import batches, setup_dataloader
from fabricfn.errors import DataError, UnevenBatchesWarning
from fabricfn.passes import cut_batches
from fabricfn.records import Cursor
from tests.support.feeds import ONE, Numbers, lists, ranks_of, uneven
from tests.support.samplers import buckets


def batches_of(world_size, make, cursor=0, tail="spread", num=20, seed=0):
    """rank -> its batches."""
    found = []
    for rt in ranks_of(world_size, seed):
        loader = setup_dataloader(rt, DataLoader(Numbers(num), batch_sampler=make()), tail=tail)
        found.append(lists(batches(rt, loader, cursor)))
    return found


@uneven
def test_whole_batches_of_a_batch_sampler_go_to_the_ranks_in_turn():
    (theirs,) = batches_of(1, buckets)
    assert sorted(row for rows in theirs for row in rows) == list(range(20))
    assert len({len(rows) for rows in theirs}) > 2, "batches of different sizes"
    for world_size in (2, 3, 4):
        found = batches_of(world_size, buckets)
        full = len(theirs) // world_size
        whole = [rows for step in list(zip(*found, strict=True))[: full - 1] for rows in step]
        assert whole == theirs[: (full - 1) * world_size], "the last whole step may be joined with what is left"
        assert [row for rows in zip(*found, strict=True) for batch in rows for row in batch] == [
            row for rows in theirs for row in rows
        ]
        assert all(rows for rank in found for rows in rank), "no rank gets an empty batch"
        dropped = batches_of(world_size, buckets, tail="drop")
        assert [rows for step in zip(*dropped, strict=True) for rows in step] == theirs[: full * world_size]


def test_a_batch_sampler_has_a_new_order_each_epoch_the_same_in_every_process():
    orders = [batches_of(1, buckets, epoch) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert orders == [batches_of(1, buckets, epoch) for epoch in range(3)]


def test_torchs_batch_sampler_subclassed_with_required_arguments():
    class Padded(BatchSampler):
        def __init__(self, label, sampler):
            super().__init__(sampler, 4, False)
            self.hidden = label

        def __iter__(self):
            for rows in super().__iter__():
                yield [*rows, rows[0]] if self.hidden else rows

    found = batches_of(2, lambda: Padded("yes", range(16)))
    assert found == [[[0, 1, 2, 3, 0], [8, 9, 10, 11, 8]], [[4, 5, 6, 7, 4], [12, 13, 14, 15, 12]]]


def test_a_plain_list_of_batches():
    assert batches_of(2, lambda: [[3, 1], [2, 2], [0, 1], [4, 4]]) == [[[3, 1], [0, 1]], [[2, 2], [4, 4]]]


sizes_of_batches = st.lists(st.integers(1, 6), min_size=1, max_size=14)


def cut_up(sizes):
    places = iter(range(sum(sizes)))
    return [[next(places) for _ in range(size)] for size in sizes]


@uneven
@given(sizes_of_batches, st.integers(1, 4), st.integers(1, 4), st.data())
@settings(max_examples=60)
def test_a_batch_samplers_epoch_is_taken_once_and_goes_on_at_another_world_size(sizes, before, after, data):
    order, num = cut_up(sizes), sum(sizes)
    assume(num >= before)
    loaders = [
        (rt, setup_dataloader(rt, DataLoader(Numbers(num), batch_sampler=order))) for rt in ranks_of(before, seed=5)
    ]
    pairs = [[(b.tolist(), c) for b, c in batches(rt, loader, with_cursor=True)] for rt, loader in loaders]
    assert len({tuple(cursor for _, cursor in rank) for rank in pairs}) == 1, "the ranks' cursors are the same"
    steps = [[rows for rank in step for rows in rank[0]] for step in zip(*pairs, strict=True)]
    assert [row for step in steps for row in step] == list(range(num))
    stop = data.draw(st.integers(0, len(steps) - 1))
    cursor = pairs[0][stop][1]
    seen = [row for step in steps[: stop + 1] for row in step]
    if stop == len(steps) - 1:
        assert cursor == Cursor(seed=5, epoch=1)
        return
    assume(num - cursor.index >= after)
    rest = []
    for rt in ranks_of(after):
        loader = setup_dataloader(rt, DataLoader(Numbers(num), batch_sampler=order))
        rest.append(lists(batches(rt, loader, cursor)))
    assert seen + [row for step in zip(*rest, strict=True) for rows in step for row in rows] == list(range(num))
    if after == before:
        assert rest == [[rows for rows, _ in rank[stop + 1 :]] for rank in pairs]


def test_how_batches_are_cut():
    assert cut_batches([4, 4, 4], 1, "spread") == (3, 0)
    assert cut_batches([4, 4, 4], 2, "spread") == (1, 1)
    assert cut_batches([4, 4, 4, 4, 1], 4, "spread") == (0, 5), "one row is not enough for four ranks"
    assert cut_batches([4, 4, 4, 4, 1], 4, "drop") == (1, 0)
    with pytest.raises(DataError, match="2 batches that are left have 3 rows for 4 ranks"):
        cut_batches([2, 1], 4, "spread")


def test_a_cursor_inside_a_batch_is_refused():
    loader = setup_dataloader(ONE, DataLoader(Numbers(20), batch_sampler=buckets()))
    sizes = [len(batch) for batch in batches(ONE, loader)]
    inside = next(start for start in range(1, 20) if start not in {sum(sizes[:end]) for end in range(len(sizes))})
    with pytest.raises(DataError, match="not where a batch of this epoch ends"):
        batches(ONE, loader, Cursor(index=inside))


def test_batches_of_different_sizes_are_said_once_at_the_callers_line():
    first, second = ranks_of(2)
    loader = setup_dataloader(first, DataLoader(Numbers(9), batch_sampler=[[0, 1], [2], [3, 4], [5]]))
    with pytest.warns(UnevenBatchesWarning, match="batch_sampler=list: .*weighted=True") as seen:
        batches(first, loader)
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(first, loader)
        batches(second, setup_dataloader(second, DataLoader(Numbers(9), batch_sampler=[[0, 1], [2]])))
        batches(first, setup_dataloader(first, DataLoader(Numbers(9), batch_sampler=[[0, 1], [2, 3]])))
