"""Law 7, the loaders: they yield what the plan says, from any cursor on, with workers or without."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch.utils.data import DataLoader, TensorDataset, get_worker_info

from fabricfn.data import batches, setup_dataloader, setup_dataloaders
from fabricfn.errors import DataError
from fabricfn.order import num_steps, rank_indices, step_ends
from fabricfn.precision import Precision
from fabricfn.records import Cursor
from fabricfn.runtimes import Runtime
from fabricfn.strategies.single import single
from fabricfn.world import World
from tests.support.feeds import ONE, Numbers, deals, epochs, lists, ranks_of, uneven, workers


class Noise(Numbers):
    """Three random numbers of each of the global generators, as an augmentation draws them in a worker."""

    def __getitem__(self, place):
        return torch.tensor([float(torch.rand(())), random.random(), np.random.rand(), get_worker_info().id])


@uneven
@given(deals(), st.integers(0, 99), epochs, st.booleans())
@settings(max_examples=40)
def test_loaders_yield_what_the_plan_says(deal, seed, epoch, shuffle):
    assume(num_steps(deal) > 0 and deal.num_samples >= deal.world_size)
    for rt in ranks_of(deal.world_size, seed):
        theirs = DataLoader(Numbers(deal.num_samples), batch_size=deal.batch_size, shuffle=shuffle)
        loader = setup_dataloader(rt, theirs, tail=deal.tail)
        expected = list(rank_indices(deal, rt.rank, seed=seed, epoch=epoch, shuffle=shuffle))
        assert lists(batches(rt, loader, epoch)) == expected
        assert lists(batches(rt, loader, Cursor(seed=seed, epoch=epoch), move_to_device=False)) == expected
        assert len(loader) == len(expected)


def test_one_rank_without_shuffling_is_the_plain_loader():
    plain = DataLoader(range(11), batch_size=4)
    assert lists(batches(ONE, setup_dataloader(ONE, plain))) == lists(plain)
    dropping = DataLoader(range(11), batch_size=4, drop_last=True)
    assert lists(batches(ONE, setup_dataloader(ONE, dropping))) == lists(dropping)


@uneven
@given(deals(), st.data())
@settings(max_examples=40)
def test_the_cursor_after_a_batch_goes_on_there(deal, data):
    assume(num_steps(deal) > 0 and deal.num_samples >= deal.world_size)
    stop = data.draw(st.integers(0, num_steps(deal) - 1))
    for rt in ranks_of(deal.world_size):
        theirs = DataLoader(Numbers(deal.num_samples), batch_size=deal.batch_size, shuffle=True)
        loader = setup_dataloader(rt, theirs, tail=deal.tail)
        pairs = list(batches(rt, loader, 5, with_cursor=True))
        cursor = pairs[stop][1]
        assert cursor == Cursor(epoch=5, index=list(step_ends(deal))[stop]) or stop == len(pairs) - 1
        if stop < len(pairs) - 1:
            assert lists(batches(rt, loader, cursor)) == lists(batch for batch, _ in pairs[stop + 1 :])
        assert pairs[-1][1] == Cursor(epoch=6, index=0)


def test_going_on_does_not_read_what_was_skipped():
    dataset = Numbers(10**15)
    loader = setup_dataloader(ONE, DataLoader(dataset, batch_size=4, shuffle=True))
    batch = next(batches(ONE, loader, Cursor(index=10**14)))
    assert dataset.read == batch.tolist()


def test_iterating_the_loader_itself_counts_its_epochs():
    loader = setup_dataloader(ONE, DataLoader(Numbers(20), batch_size=5, shuffle=True))
    assert isinstance(loader, DataLoader)
    assert [lists(loader) for _ in range(3)] == [lists(batches(ONE, loader, epoch)) for epoch in range(3)]
    assert lists(loader) == lists(batches(ONE, loader, 3)), "batches does not count"


def test_no_cursor_is_the_start_of_epoch_0_with_the_seed_of_the_runtime():
    (rt,) = ranks_of(1, seed=3)
    loader = setup_dataloader(rt, DataLoader(Numbers(20), batch_size=5, shuffle=True))
    first = lists(batches(rt, loader))
    assert first == lists(batches(rt, loader)) == lists(batches(rt, loader, Cursor(seed=3))) == lists(loader)
    assert first != lists(batches(rt, loader, Cursor(seed=4)))
    assert lists(batches(rt, loader, np.int64(2))) == lists(batches(rt, loader, 2))


def test_two_iterations_at_once_do_not_disturb_each_other():
    loader = setup_dataloader(ONE, DataLoader(Numbers(12), batch_size=3, shuffle=True))
    expected = [lists(batches(ONE, loader, epoch)) for epoch in range(3)]
    runs = [batches(ONE, loader, 0), batches(ONE, loader, 1), batches(ONE, loader, 2)]
    found = [[next(run).tolist() for run in runs] for _ in range(4)]
    assert [list(steps) for steps in zip(*found, strict=True)] == expected


@workers
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(persistent):
    make = lambda **options: setup_dataloader(ONE, DataLoader(Numbers(23), batch_size=4, shuffle=True, **options))  # noqa: E731
    plain, loader = make(), make(num_workers=2, persistent_workers=persistent)
    assert [lists(loader) for _ in range(2)] == [lists(plain) for _ in range(2)]
    for cursor in (Cursor(epoch=1, index=8), Cursor(epoch=9)):
        found, expected = (batches(ONE, it, cursor, with_cursor=True) for it in (loader, plain))
        assert [(batch.tolist(), after) for batch, after in found] == [(b.tolist(), after) for b, after in expected]
    # Left in the middle, with batches on their way.
    assert next(batches(ONE, loader, 4)).tolist() == next(batches(ONE, plain, 4)).tolist()
    assert lists(batches(ONE, loader, 5)) == lists(batches(ONE, plain, 5))


@workers
def test_a_loader_may_have_been_gone_through_before_it_is_set_up():
    theirs = DataLoader(range(4), batch_size=2, num_workers=2, persistent_workers=True)
    assert lists(theirs) == [[0, 1], [2, 3]]
    rt = ranks_of(2)[1]
    assert lists(batches(rt, setup_dataloader(rt, theirs))) == [[2, 3]]
    assert lists(theirs) == [[0, 1], [2, 3]]


@workers
def test_two_iterations_at_once_over_persistent_workers_are_refused():
    loader = setup_dataloader(ONE, DataLoader(Numbers(24), batch_size=4, num_workers=2, persistent_workers=True))
    first = batches(ONE, loader, 0)
    assert next(first).tolist() == [0, 1, 2, 3]
    second = batches(ONE, loader, 1)
    with pytest.raises(DataError, match="persistent_workers=False"):
        next(first)
    assert len(list(second)) == 6


@workers
def test_workers_are_seeded_by_seed_epoch_and_rank_and_no_global_state_is_touched():
    loaders = [
        (rt, setup_dataloader(rt, DataLoader(Noise(8), batch_size=2, num_workers=2, shuffle=True)))
        for rt in ranks_of(2, seed=1)
    ]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    noise = {
        (rt.rank, epoch, again): torch.cat(list(batches(rt, loader, epoch)))[:, :3]
        for rt, loader in loaders
        for epoch in (0, 1)
        for again in (0, 1)
    }
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(state[0], before[0])
    assert state[1:] == before[1:]
    for rank, epoch in itertools.product((0, 1), (0, 1)):
        assert torch.equal(noise[rank, epoch, 0], noise[rank, epoch, 1])
    values = torch.cat([noise[rank, epoch, 0].flatten() for rank, epoch in itertools.product((0, 1), (0, 1))])
    assert len(values.unique()) == len(values)


def test_ready_batches_are_dealt_out_one_a_step():
    ready = [torch.full((i + 1,), i) for i in range(6)]
    found = []
    for rt in ranks_of(2):
        loader = setup_dataloader(rt, DataLoader(ready, batch_size=None))
        pairs = list(batches(rt, loader, with_cursor=True))
        assert [cursor for _, cursor in pairs] == [Cursor(index=2), Cursor(index=4), Cursor(epoch=1)]
        found.append([len(batch) - 1 for batch, _ in pairs])
    assert found == [[0, 2, 4], [1, 3, 5]]


def test_several_loaders_are_set_up_at_once():
    train, test = setup_dataloaders(ONE, DataLoader(range(8), shuffle=True), DataLoader(range(4), batch_size=4))
    assert (len(train), len(test)) == (8, 1)


def test_batches_are_moved_to_the_device():
    world = World(device=torch.device("meta"))
    rt = Runtime(world=world, precision=Precision(), strategy=single())
    loader = setup_dataloader(rt, DataLoader(TensorDataset(torch.ones(4, 2), torch.arange(4)), batch_size=2))
    assert {tensor.device.type for batch in batches(rt, loader) for tensor in batch} == {"meta"}
    assert {tensor.device.type for batch in batches(rt, loader, move_to_device=False) for tensor in batch} == {"cpu"}
    assert next(batches(rt, [torch.ones(2)])).device.type == "meta"
