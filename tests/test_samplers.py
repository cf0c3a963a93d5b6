"""Samplers and loader classes of the user's own: their order is the global order, dealt out to ranks.

The failures of other libraries that these tests stand for: samplers replaced and their arguments lost, classes that
cannot be built again from their attributes, `set_epoch` overridden, an order that restarts at epoch 0 after a resume.
"""

import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fabricfn.data import batches, setup_dataloader
from fabricfn.errors import DataError
from fabricfn.records import Cursor
from fabricfn.samplers import MAX_PASSES, order_digest
from fabricfn.testing import processes, threads
from tests.support.feeds import ONE, Numbers, lists, ranks_of, uneven, workers
from tests.support.samplers import SAMPLERS, Backwards, Drawing, Global, buckets


def in_order(world_size, make, epoch=0, seed=0, start=0, **options):
    """The samples of all ranks in the order in which the steps take them; every rank has a sampler of its own."""
    found = []
    for rt in ranks_of(world_size, seed):
        loader = setup_dataloader(rt, DataLoader(Numbers(20), sampler=make(), **options))
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
    theirs = DataLoader(Numbers(20), sampler=Backwards(20, step=3), batch_size=3)
    assert lists(batches(ONE, setup_dataloader(ONE, theirs), 4)) == lists(theirs)


def test_a_samplers_own_seed_counts_and_its_generators_are_put_back():
    orders = [in_order(1, lambda seed=seed: Drawing(20, seed), batch_size=20) for seed in (1, 2)]
    assert orders[0] != orders[1]
    sampler = Drawing(20, 1)
    before = sampler.torch.get_state(), sampler.numpy.bit_generator.state, sampler.python.getstate()
    everything = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    loader = setup_dataloader(ONE, DataLoader(Numbers(20), sampler=sampler, batch_size=20))
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
    dataset = Numbers(100)
    loader = setup_dataloader(ONE, DataLoader(dataset, sampler=Backwards(100, step=1), batch_size=8))
    pairs = [(batch.tolist(), cursor) for batch, cursor in batches(ONE, loader, with_cursor=True)]
    assert [cursor.index for _, cursor in pairs] == [*range(8, 100, 8), 0]
    assert pairs[-1][1] == Cursor(epoch=1)
    dataset.read.clear()
    assert lists(batches(ONE, loader, pairs[9][1])) == [rows for rows, _ in pairs[10:]]
    assert dataset.read == list(range(19, -1, -1))


def test_iterating_the_loader_itself_counts_its_epochs():
    loader = setup_dataloader(ONE, DataLoader(Numbers(20), sampler=Global(20, step=1), batch_size=5))
    assert [lists(loader) for _ in range(3)] == [lists(batches(ONE, loader, epoch)) for epoch in range(3)]
    assert len(loader) == 4


def test_one_item_a_batch_with_a_sampler():
    found = []
    for rt in ranks_of(2):
        loader = setup_dataloader(rt, DataLoader(Numbers(20), sampler=Backwards(20, step=5), batch_size=None))
        found.append([int(item) for item in batches(rt, loader)])
    assert found == [[19, 9], [14, 4]]


# Loader classes


class Named(DataLoader):
    """Required arguments of its own, one of which is no attribute, and an attribute set later."""

    def __init__(self, source, /, label, **options):
        super().__init__(Numbers(source), **options)
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
            plain = setup_dataloader(ONE, DataLoader(Numbers(20), **options))
            loader = setup_dataloader(
                ONE, DataLoader(Numbers(20), **options, num_workers=2, persistent_workers=persistent)
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
    loader = setup_dataloader(ONE, DataLoader(Numbers(20), sampler=Endless(20, step=1)))
    with pytest.raises(DataError, match=rf"Endless yielded more than {20 * MAX_PASSES} items.*shard=False"):
        batches(ONE, loader)
    loader = setup_dataloader(ONE, DataLoader(NoLength(), sampler=Unknown()))
    with pytest.raises(DataError, match="Unknown has no length"):
        batches(ONE, loader)
    loader = setup_dataloader(ONE, DataLoader(Numbers(20), batch_sampler=[]))
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
        loader = setup_dataloader(rt, DataLoader(Numbers(20), sampler=SAMPLERS[make](), batch_size=3), tail="drop")
        found.append([lists(batches(rt, loader, epoch)) for epoch in range(2)])
    return found


def sharing_itself(rt):
    own = range(rt.rank, 20, rt.world_size)
    try:
        batches(rt, setup_dataloader(rt, DataLoader(Numbers(20), sampler=own, batch_size=2)))
    except DataError as error:
        return str(error)


def failing_alone(rt):
    sampler = [] if rt.rank else [0, 1, 2, 3]
    try:
        batches(rt, setup_dataloader(rt, DataLoader(Numbers(20), batch_sampler=[[row] for row in sampler])))
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
