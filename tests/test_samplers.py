"""Samplers, batch samplers and loader classes of the user's own: their order is the global order, dealt out to ranks.

The failures of other libraries that these tests stand for: samplers replaced and their arguments lost, classes that
cannot be built again from their attributes, `set_epoch` overridden, an order that restarts at epoch 0 after a resume.
"""

import random
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fabricfn.data import batches, setup_dataloader
from fabricfn.errors import DataError, UnevenBatchesWarning
from fabricfn.passes import cut_batches
from fabricfn.precision import Precision
from fabricfn.records import Cursor
from fabricfn.runtimes import Runtime
from fabricfn.samplers import MAX_PASSES, order_digest
from fabricfn.strategies.single import single
from fabricfn.testing import processes, threads
from fabricfn.world import World

uneven = pytest.mark.filterwarnings("ignore::fabricfn.errors.UnevenBatchesWarning")
workers = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .* is multi-threaded")


def ranks_of(world_size, seed=0):
    return [
        Runtime(world=World(rank=rank, world_size=world_size), precision=Precision(), strategy=single(), seed=seed)
        for rank in range(world_size)
    ]


ONE = ranks_of(1)[0]


def lists(found):
    return [batch.tolist() for batch in found]


class Rows(Dataset):
    """0 .. num - 1, and which of them were read."""

    def __init__(self, num):
        self.num = num
        self.read = []

    def __len__(self):
        return self.num

    def __getitem__(self, place):
        self.read.append(place)
        return torch.tensor(place)


class Backwards(Sampler):
    """A user's own class, with a required argument and no randomness."""

    def __init__(self, num, *, step):
        self.num, self.step = num, step

    def __iter__(self):
        return iter(range(self.num - 1, -1, -self.step))

    def __len__(self):
        return len(range(self.num - 1, -1, -self.step))


class ByEpoch(Backwards):
    """The usual recipe: the epoch comes from `set_epoch`."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = list(super().__iter__())
        random.Random(self.epoch).shuffle(order)
        return iter(order)


class Drawing(Backwards):
    """Draws from generators of its own, which go on from pass to pass."""

    def __init__(self, num, seed):
        super().__init__(num, step=1)
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(seed), random.Random(seed)
        self.old = np.random.RandomState(seed)
        self.torch.manual_seed(seed)

    def __iter__(self):
        order = torch.randperm(self.num, generator=self.torch).numpy()
        self.numpy.shuffle(order)
        self.old.shuffle(order)
        order = order.tolist()
        self.python.shuffle(order)
        return iter(order)


class Global(Backwards):
    """Draws from the three global generators."""

    def __iter__(self):
        order = torch.randperm(self.num).numpy()
        np.random.shuffle(order)
        order = order.tolist()
        random.shuffle(order)
        return iter(order)


class Buckets(Sampler):
    """Batches of samples of like length, of different sizes; required arguments that no attribute is named after."""

    def __init__(self, lengths, max_tokens, shuffle=True):
        self._lengths, self._limit, self._shuffle = lengths, max_tokens, shuffle

    def __iter__(self):
        found, batch = [], []
        for place in sorted(range(len(self._lengths)), key=self._lengths.__getitem__):
            if (len(batch) + 1) * self._lengths[place] > self._limit and batch:
                found.append(batch)
                batch = []
            batch.append(place)
        found.append(batch)
        if self._shuffle:
            random.shuffle(found)
        return iter(found)


SAMPLERS = {
    "weighted": lambda: WeightedRandomSampler([1.0, 5.0, 2.0, 1.0] * 5, 23),
    "subset": lambda: SubsetRandomSampler([2, 3, 5, 7, 11, 13, 17, 19]),
    "replacement": lambda: RandomSampler(range(20), replacement=True, num_samples=31),
    "part": lambda: RandomSampler(range(20), num_samples=7),
    "own": lambda: Backwards(20, step=3),
    "by epoch": lambda: ByEpoch(20, step=1),
    "drawing": lambda: Drawing(20, 1),
    "global": lambda: Global(20, step=1),
    "list": lambda: [5, 1, 1, 17],
}


def in_order(world_size, make, epoch=0, seed=0, start=0, **options):
    """The samples of all ranks in the order in which the steps take them; every rank has a sampler of its own."""
    found = []
    for rt in ranks_of(world_size, seed):
        loader = setup_dataloader(rt, DataLoader(Rows(20), sampler=make(), **options))
        found.append(lists(batches(rt, loader, Cursor(seed=seed, epoch=epoch, index=start))))
    return [sample for step in zip(*found, strict=True) for rows in step for sample in rows]


@uneven
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_order_of_a_sampler_is_the_global_order_at_every_world_and_batch_size(name):
    make = SAMPLERS[name]
    orders = [in_order(1, make, epoch, batch_size=64) for epoch in range(3)]
    assert all(len(order) == len(make()) for order in orders)
    for world_size, batch_size in ((1, 3), (2, 1), (2, 3), (3, 2), (4, 1)):
        assert [in_order(world_size, make, epoch, batch_size=batch_size) for epoch in range(3)] == orders
    if name not in ("own", "list"):
        assert orders[0] != orders[1] != orders[2] != orders[0], "a new order each epoch"
    if name not in ("own", "list", "by epoch"):
        assert in_order(1, make, 0, seed=1, batch_size=64) != orders[0]


@uneven
def test_what_a_sampler_yields_without_randomness_is_what_torch_would_do():
    theirs = DataLoader(Rows(20), sampler=Backwards(20, step=3), batch_size=3)
    assert lists(batches(ONE, setup_dataloader(ONE, theirs), 4)) == lists(theirs)


def test_a_samplers_own_seed_counts_and_its_generators_are_put_back():
    orders = [in_order(1, lambda seed=seed: Drawing(20, seed), batch_size=20) for seed in (1, 2)]
    assert orders[0] != orders[1]
    sampler = Drawing(20, 1)
    before = sampler.torch.get_state(), sampler.numpy.bit_generator.state, sampler.python.getstate()
    everything = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    loader = setup_dataloader(ONE, DataLoader(Rows(20), sampler=sampler, batch_size=20))
    assert lists(batches(ONE, loader, 3)) == lists(batches(ONE, loader, 3)), "the same epoch, the same order"
    assert torch.equal(sampler.torch.get_state(), before[0])
    assert (sampler.numpy.bit_generator.state, sampler.python.getstate()) == before[1:]
    assert torch.equal(torch.get_rng_state(), everything[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == everything[1:]


@uneven
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_that_starts_again_in_mid_epoch_goes_on_there_at_another_world_size(name):
    make = SAMPLERS[name]
    whole = in_order(1, make, 7, batch_size=2)
    for world_size in (1, 2, 3, 4):
        if len(whole) - 4 >= world_size:
            assert in_order(world_size, make, 7, start=4, batch_size=2) == whole[4:]


@uneven
def test_resuming_reads_no_skipped_sample_and_cursors_count_samples():
    dataset = Rows(100)
    loader = setup_dataloader(ONE, DataLoader(dataset, sampler=Backwards(100, step=1), batch_size=8))
    pairs = [(batch.tolist(), cursor) for batch, cursor in batches(ONE, loader, with_cursor=True)]
    assert [cursor.index for _, cursor in pairs] == [*range(8, 100, 8), 0]
    assert pairs[-1][1] == Cursor(epoch=1)
    dataset.read.clear()
    assert lists(batches(ONE, loader, pairs[9][1])) == [rows for rows, _ in pairs[10:]]
    assert dataset.read == list(range(19, -1, -1))


def test_iterating_the_loader_itself_counts_its_epochs():
    loader = setup_dataloader(ONE, DataLoader(Rows(20), sampler=Global(20, step=1), batch_size=5))
    assert [lists(loader) for _ in range(3)] == [lists(batches(ONE, loader, epoch)) for epoch in range(3)]
    assert len(loader) == 4


def test_one_item_a_batch_with_a_sampler():
    found = []
    for rt in ranks_of(2):
        loader = setup_dataloader(rt, DataLoader(Rows(20), sampler=Backwards(20, step=5), batch_size=None))
        found.append([int(item) for item in batches(rt, loader)])
    assert found == [[19, 9], [14, 4]]


# Batch samplers


def batches_of(world_size, make, cursor=0, tail="spread", num=20, seed=0):
    """rank -> its batches."""
    found = []
    for rt in ranks_of(world_size, seed):
        loader = setup_dataloader(rt, DataLoader(Rows(num), batch_sampler=make()), tail=tail)
        found.append(lists(batches(rt, loader, cursor)))
    return found


LENGTHS = [3, 9, 4, 1, 1, 8, 2, 7, 7, 3, 6, 5, 2, 2, 9, 4, 1, 3, 8, 6]


def buckets():
    return Buckets(LENGTHS, 12)


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
@settings(max_examples=60, deadline=None)
def test_a_batch_samplers_epoch_is_taken_once_and_goes_on_at_another_world_size(sizes, before, after, data):
    order, num = cut_up(sizes), sum(sizes)
    assume(num >= before)
    loaders = [
        (rt, setup_dataloader(rt, DataLoader(Rows(num), batch_sampler=order))) for rt in ranks_of(before, seed=5)
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
        loader = setup_dataloader(rt, DataLoader(Rows(num), batch_sampler=order))
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
    loader = setup_dataloader(ONE, DataLoader(Rows(20), batch_sampler=buckets()))
    sizes = [len(batch) for batch in batches(ONE, loader)]
    inside = next(start for start in range(1, 20) if start not in {sum(sizes[:end]) for end in range(len(sizes))})
    with pytest.raises(DataError, match="not where a batch of this epoch ends"):
        batches(ONE, loader, Cursor(index=inside))


def test_batches_of_different_sizes_are_said_once_at_the_callers_line():
    first, second = ranks_of(2)
    loader = setup_dataloader(first, DataLoader(Rows(9), batch_sampler=[[0, 1], [2], [3, 4], [5]]))
    with pytest.warns(UnevenBatchesWarning, match="batch_sampler=list: .*weighted=True") as seen:
        batches(first, loader)
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches(first, loader)
        batches(second, setup_dataloader(second, DataLoader(Rows(9), batch_sampler=[[0, 1], [2]])))
        batches(first, setup_dataloader(first, DataLoader(Rows(9), batch_sampler=[[0, 1], [2, 3]])))


# Loader classes


class Named(DataLoader):
    """Required arguments of its own, one of which is no attribute, and an attribute set later."""

    def __init__(self, source, /, label, **options):
        super().__init__(Rows(source), **options)
        self._label = label

    @property
    def label(self):
        return self._label


@uneven
def test_a_loader_class_keeps_its_attributes_with_any_sampler():
    for options in ({"sampler": Backwards(9, step=2), "batch_size": 2}, {"batch_sampler": [[8, 6], [4, 2], [0]]}):
        theirs = Named(9, "x", **options)
        theirs.later = 7
        loader = setup_dataloader(ONE, theirs)
        assert (type(loader), loader.label, loader.later) == (Named, "x", 7)
        assert lists(batches(ONE, loader, 2)) == [[8, 6], [4, 2], [0]] == lists(theirs)


def test_collate_functions_and_indices_of_any_kind_arrive():
    class Sized(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, key):
            place, size = key
            return place * 10 + size

    order = [(place, size) for place in range(4) for size in (1, 2)]
    theirs = DataLoader(Sized(), sampler=order, batch_size=4, collate_fn=tuple)
    assert list(batches(ONE, setup_dataloader(ONE, theirs))) == list(theirs) == [(1, 2, 11, 12), (21, 22, 31, 32)]


@workers
def test_workers_change_nothing():
    for options in ({"sampler": Global(20, step=1), "batch_size": 3}, {"batch_sampler": buckets()}):
        for persistent in (False, True):
            plain = setup_dataloader(ONE, DataLoader(Rows(20), **options))
            loader = setup_dataloader(
                ONE, DataLoader(Rows(20), **options, num_workers=2, persistent_workers=persistent)
            )
            assert [lists(loader) for _ in range(2)] == [lists(plain) for _ in range(2)]
            assert lists(batches(ONE, loader, 5)) == lists(batches(ONE, plain, 5))


# What cannot be done


class Endless(Backwards):
    def __iter__(self):
        while True:
            yield 0


class Unknown(Sampler):
    """Neither it nor its dataset has a length."""

    def __iter__(self):
        return iter([0])


class NoLength(Dataset):
    def __getitem__(self, place):
        return place


def test_samplers_that_do_not_end_or_yield_nothing_are_refused():
    loader = setup_dataloader(ONE, DataLoader(Rows(20), sampler=Endless(20, step=1)))
    with pytest.raises(DataError, match=rf"Endless yielded more than {20 * MAX_PASSES} items.*shard=False"):
        batches(ONE, loader)
    loader = setup_dataloader(ONE, DataLoader(NoLength(), sampler=Unknown()))
    with pytest.raises(DataError, match="Unknown has no length"):
        batches(ONE, loader)
    loader = setup_dataloader(ONE, DataLoader(Rows(20), batch_sampler=[]))
    with pytest.raises(DataError, match="yielded nothing"):
        batches(ONE, loader)


def test_digests_of_orders():
    assert order_digest([1, 2]) != order_digest([2, 1])
    assert order_digest([1 << 80]) != order_digest([1 << 81])
    assert order_digest([object()]) == order_digest([object()]), "an address is not the order"
    assert order_digest([(1, "a"), [2]]) != order_digest([(1, "b"), [2]])


# Real ranks


def weighted_epoch(rt):
    # Ranks whose global generators differ, as they do where nobody seeded them.
    random.seed(rt.rank)
    torch.manual_seed(rt.rank)
    return without_talking(rt)


def without_talking(rt):
    found = []
    for make in ("weighted", "global", "drawing"):
        loader = setup_dataloader(rt, DataLoader(Rows(20), sampler=SAMPLERS[make](), batch_size=3), tail="drop")
        found.append([lists(batches(rt, loader, epoch)) for epoch in range(2)])
    return found


def sharing_itself(rt):
    own = range(rt.rank, 20, rt.world_size)
    try:
        batches(rt, setup_dataloader(rt, DataLoader(Rows(20), sampler=own, batch_size=2)))
    except DataError as error:
        return str(error)


def failing_alone(rt):
    sampler = [] if rt.rank else [0, 1, 2, 3]
    try:
        batches(rt, setup_dataloader(rt, DataLoader(Rows(20), batch_sampler=[[row] for row in sampler])))
    except DataError as error:
        return str(error)


def test_ranks_agree_on_the_order():
    with processes(2) as world:
        found = world.run(weighted_epoch)
        texts = world.run(sharing_itself)
        failures = world.run(failing_alone)
    expected = [without_talking(rt) for rt in ranks_of(2)]
    assert found == expected
    for text in texts:
        assert "must yield the same order on every rank" in text and "shard=False" in text
    assert all("yielded nothing" in text for text in failures), failures


@uneven
def test_threads_as_ranks_do_not_disturb_each_others_generators():
    with threads(4) as world:
        for _ in range(5):
            found = world.run(without_talking)
            counts = Counter(row for rank in found for rows in rank[1][0] for row in rows)
            assert max(counts.values()) == 1


# Size


def test_an_epoch_of_a_billion_samples_costs_no_list():
    loader = setup_dataloader(ONE, DataLoader(range(10**9), batch_size=64, shuffle=True))
    tracemalloc.start()
    try:
        stream = batches(ONE, loader, Cursor(epoch=3, index=64 * 10**7), with_cursor=True)
        for _ in range(100):
            _, cursor = next(stream)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert cursor == Cursor(epoch=3, index=64 * (10**7 + 100))
    assert peak < 2**22, "a list of a billion integers takes 8 GB"
