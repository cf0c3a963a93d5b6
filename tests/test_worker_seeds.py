"""Augmentations drawn in workers: functions of (seed, epoch, place), at any number of workers, after any stop."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fabricfn as ff
from fabricfn.data import batches, setup_dataloader
from fabricfn.records import Cursor
from fabricfn.seeding import Seeded
from tests.support.feeds import ranks_of
from tests.support.runtimes import RT

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create",
    "ignore:This process .* is multi-threaded",
    "ignore::fabricfn.errors.UnevenBatchesWarning",
)


class Noise(Dataset):
    """[its place, one number of each of the three global generators]."""

    def __len__(self):
        return 16

    def __getitem__(self, place):
        return torch.tensor([place, float(torch.rand(())), random.random(), np.random.rand()], dtype=torch.float64)


def shaken(rows):
    """A collate function that draws at random, too."""
    return torch.cat([torch.stack(rows), torch.rand(len(rows), 1, dtype=torch.float64)], 1)


def noise(world_size, epoch, start=0, seed=0, **options):
    """[samples, 5]: the batches of all ranks in the global order."""
    found = []
    for rt in ranks_of(world_size, seed):
        options = {"num_workers": 1, "batch_size": 2, "shuffle": True, "collate_fn": shaken, **options}
        loader = setup_dataloader(rt, DataLoader(Noise(), **options))
        if options.get("persistent_workers"):
            list(batches(rt, loader, 77))
        found.append(list(batches(rt, loader, Cursor(seed=seed, epoch=epoch, index=start))))
    return torch.cat([batch for step in zip(*found, strict=True) for batch in step])


def test_the_same_run_has_the_same_augmentations_with_any_workers_and_on_any_number_of_ranks():
    first = noise(1, 0)
    assert sorted(first[:, 0].tolist()) == list(range(16))
    for options in ({"num_workers": 3}, {"num_workers": 2, "persistent_workers": True}, {"prefetch_factor": 5}):
        assert torch.equal(noise(1, 0, **options), first)
    assert torch.equal(noise(2, 0), first), "batches of the same size have the same places"
    assert torch.equal(noise(4, 0, num_workers=2), first)


def test_a_run_that_starts_again_in_mid_epoch_draws_what_it_would_have_drawn():
    assert torch.equal(noise(2, 3, start=8, num_workers=2), noise(2, 3)[8:])
    order = list(range(15, -1, -1))
    for options in ({"shuffle": False, "sampler": order}, {"batch_sampler": [order[:5], order[5:9], order[9:]]}):
        if "batch_sampler" in options:
            options |= {"batch_size": 1, "shuffle": False}
        whole = noise(1, 3, **options)
        start = 9 if "batch_sampler" in options else 8
        assert torch.equal(noise(1, 3, start=start, **options), whole[start:])


def test_no_two_batches_epochs_or_seeds_draw_the_same():
    runs = [
        noise(2, epoch, seed=seed, num_workers=2, **options)[:, 1:]
        for epoch, seed, options in ((0, 0, {}), (1, 0, {}), (0, 1, {}), (2, 0, {"persistent_workers": True}))
    ]
    numbers = torch.cat(runs).flatten()
    assert len(numbers.unique()) == len(numbers)


def test_the_generators_of_workers_can_be_left_alone():
    def init(worker):
        torch.manual_seed(5)

    options = {"worker_init_fn": init, "num_workers": 1, "batch_size": 16}
    (rt,) = ranks_of(1)
    left, ours = (
        [
            next(batches(rt, setup_dataloader(rt, DataLoader(Noise(), **options), seed_workers=flag), epoch))[:, 1]
            for epoch in (0, 1)
        ]
        for flag in (False, True)
    )
    assert torch.equal(left[0], left[1]), "what the user seeded is what is drawn"
    assert not torch.equal(ours[0], ours[1])
    generator = torch.Generator()
    theirs = DataLoader(Noise(), generator=generator, num_workers=1)
    assert setup_dataloader(rt, theirs, seed_workers=False).generator is generator


def test_this_process_is_left_alone_without_workers():
    (rt,) = ranks_of(1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loader = setup_dataloader(rt, DataLoader(Noise(), batch_size=1, num_workers=0))
    found = [float(batch[0, 1]) for batch in itertools.islice(batches(rt, loader), 2)]
    assert found == [pytest.approx(float(number)) for number in expected]


def test_the_indices_of_a_batch_are_a_list_and_travel():
    before = torch.get_rng_state()
    indices = Seeded([3, 1], 7)
    again = pickle.loads(pickle.dumps(indices))
    assert (type(again), again, again.bits) == (Seeded, [3, 1], 7)
    assert [*again] == [3, 1] and torch.tensor(again).tolist() == [3, 1]
    assert torch.equal(torch.get_rng_state(), before), "only a worker is seeded"


class Whole(Dataset):
    """Takes the indices of a batch at once."""

    def __len__(self):
        return 8

    def __getitem__(self, place):
        raise AssertionError

    def __getitems__(self, places):
        assert isinstance(places, list)
        return [torch.tensor([place, int(torch.randint(1 << 30, ()))]) for place in places]


def test_datasets_that_take_a_batch_at_once():
    (rt,) = ranks_of(1)
    one, two = (
        torch.cat(list(batches(rt, setup_dataloader(rt, DataLoader(Whole(), batch_size=2, num_workers=num)))))
        for num in (1, 2)
    )
    assert torch.equal(one, two)


def test_workers_that_persist_cannot_be_seeded_anew_without_batches():
    loader = DataLoader(range(4), batch_size=None, num_workers=1, persistent_workers=True)
    with pytest.raises(ff.ConfigurationError, match="persistent_workers=False"):
        ff.setup_dataloader(RT, loader)
    ff.setup_dataloader(RT, loader, seed_workers=False)
