"""Law 7: over the ranks every sample comes exactly once, in an order that (seed, epoch) alone decide."""

import itertools
import math
import random
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
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    get_worker_info,
)

from fabricfn.data import batches, setup_dataloader, setup_dataloaders
from fabricfn.errors import ConfigurationError, DataError, UnevenBatchesWarning
from fabricfn.order import BLOCK, Deal, cut, num_steps, rank_indices, rank_places, step_ends
from fabricfn.permutations import make_permutation, permuted
from fabricfn.precision import Precision
from fabricfn.random import fold_in, key
from fabricfn.records import Cursor
from fabricfn.runtimes import Runtime
from fabricfn.strategies.single import single
from fabricfn.world import World

uneven = pytest.mark.filterwarnings("ignore::fabricfn.errors.UnevenBatchesWarning")
# Two workers on a machine with one core; fork in a process with threads (Python 3.12).
workers = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .* is multi-threaded")


def ranks_of(world_size: int, seed: int = 0) -> list[Runtime]:
    """One runtime per rank: sharing out data needs no communication, so no processes either."""
    return [
        Runtime(world=World(rank=rank, world_size=world_size), precision=Precision(), strategy=single(), seed=seed)
        for rank in range(world_size)
    ]


ONE = ranks_of(1)[0]


# Permutations


def reference(permutation, place):
    """The same permutation in Python's own integers, one number at a time."""
    mask = (1 << 64) - 1
    while True:
        right, left = divmod(place, permutation.base)
        for round_key in permutation.round_keys:
            mixed = (right + round_key) * 0xBF58476D1CE4E5B9 & mask
            mixed = (mixed ^ mixed >> 32) * 0x94D049BB133111EB & mask
            left, right = right, (left + ((mixed >> 32) * permutation.base >> 32)) % permutation.base
        place = right * permutation.base + left
        if place < permutation.num:
            return place


@given(st.integers(1, 300), st.integers())
@settings(deadline=None)
def test_a_permutation_holds_every_number_once(num, seed):
    assert sorted(permuted(make_permutation(num, key(seed)), np.arange(num))) == list(range(num))


@given(st.integers(1, 2**63 - 1), st.integers(), st.data())
@settings(deadline=None)
def test_any_place_of_a_permutation_is_computed_by_itself(num, seed, data):
    places = data.draw(st.lists(st.integers(0, num - 1), min_size=1, max_size=5))
    permutation = make_permutation(num, key(seed))
    found = permuted(permutation, np.array([places])).tolist()
    assert found == [[reference(permutation, place) for place in places]]


@pytest.mark.parametrize("num", [2, 3, 4])
def test_all_orders_of_a_few_numbers_are_equally_frequent(num):
    draws, orders = 1000, math.factorial(num)
    seen = Counter(tuple(permuted(make_permutation(num, fold_in(key(7), i)), np.arange(num))) for i in range(draws))
    mean = draws / orders
    chi_square = sum((seen[order] - mean) ** 2 / mean for order in itertools.permutations(range(num)))
    assert chi_square < orders + 5 * math.sqrt(2 * orders)


def test_neighbours_at_n_16_are_not_correlated():
    """The size at which too few rounds show first: 8 rounds give about 4 here, 6 give 25."""
    draws, num = 3000, 16
    jumps = Counter()
    for i in range(draws):
        order = permuted(make_permutation(num, fold_in(key(1), i)), np.arange(num))
        jumps.update((np.diff(order) % num).tolist())
    assert sum((jumps[jump] - draws) ** 2 / draws for jump in range(1, num)) / (num - 2) < 2


def test_the_order_is_the_same_in_every_version_of_every_library():
    assert [*rank_indices(Deal(num_samples=10, batch_size=10), 0, seed=0, epoch=0)] == [[1, 9, 2, 7, 6, 8, 5, 0, 4, 3]]
    places = np.array([0, 1, 10**18 - 1])
    expected = [343059385691051582, 739557180739581178, 989267412468497490]
    assert permuted(make_permutation(10**18, key(0)), places).tolist() == expected


# Plans


@st.composite
def deals(draw, tails=("spread", "drop")):
    deal = Deal(
        num_samples=draw(st.integers(1, 120)),
        world_size=draw(st.integers(1, 6)),
        batch_size=draw(st.integers(1, 9)),
        tail=draw(st.sampled_from(tails)),
    )
    assume(deal.tail == "drop" or deal.num_samples >= deal.world_size)
    return deal


def indices(deal, **options):
    """rank -> its lists of samples."""
    return [list(rank_indices(deal, rank, **options)) for rank in range(deal.world_size)]


def in_order(deal, **options):
    """The samples of all ranks in the order in which the steps take them."""
    return [sample for step in zip(*indices(deal, **options), strict=True) for rows in step for sample in rows]


seeds, epochs = st.integers(0, 2**64), st.integers(0, 1000)


@given(deals(tails=["spread"]), seeds, epochs)
@settings(deadline=None)
def test_every_sample_comes_exactly_once(deal, seed, epoch):
    samples = in_order(deal, seed=seed, epoch=epoch)
    assert sorted(samples) == list(range(deal.num_samples))


@given(deals(tails=["drop"]), seeds, epochs)
@settings(deadline=None)
def test_dropping_leaves_out_less_than_a_step_at_the_end_of_the_order(deal, seed, epoch):
    whole = in_order(Deal(num_samples=deal.num_samples), seed=seed, epoch=epoch)
    samples = in_order(deal, seed=seed, epoch=epoch)
    assert samples == whole[: len(samples)]
    assert 0 <= deal.num_samples - len(samples) < deal.step_size
    assert {len(rows) for rank in indices(deal, seed=seed, epoch=epoch) for rows in rank} <= {deal.batch_size}


@given(deals(tails=["spread"]), seeds, epochs)
@settings(deadline=None)
def test_the_global_order_is_the_same_at_every_world_and_batch_size(deal, seed, epoch):
    assert in_order(deal, seed=seed, epoch=epoch) == in_order(
        Deal(num_samples=deal.num_samples), seed=seed, epoch=epoch
    )


@given(deals())
@settings(deadline=None)
def test_every_rank_takes_the_same_number_of_steps_with_at_least_one_row_each(deal):
    rows = [[len(list_) for list_ in rank] for rank in indices(deal, seed=0, epoch=0)]
    assert {len(steps) for steps in rows} == {num_steps(deal)}
    limit = max(deal.batch_size, 2)  # with batches of one row, a joined last step has two on some ranks
    for step in zip(*rows, strict=True):
        assert 1 <= min(step) <= max(step) <= min(step) + 1
        assert max(step) <= limit
    for step in list(zip(*rows, strict=True))[:-2]:
        assert set(step) == {deal.batch_size}, "only the last two steps are cut anew"


@given(deals(), seeds, epochs, st.data())
@settings(deadline=None)
def test_going_on_after_any_step_is_as_if_never_stopped(deal, seed, epoch, data):
    whole, ends = indices(deal, seed=seed, epoch=epoch), list(step_ends(deal))
    assume(ends)
    step = data.draw(st.integers(0, len(ends) - 1))
    rest = indices(deal, seed=seed, epoch=epoch, start=ends[step])
    assert rest == [steps[step + 1 :] for steps in whole]


@given(deals(tails=["spread"]), seeds, st.integers(1, 6), st.integers(1, 9), st.data())
@settings(deadline=None)
def test_going_on_at_another_world_and_batch_size_loses_no_sample(deal, seed, world_size, batch_size, data):
    stop = data.draw(st.sampled_from([0, *step_ends(deal)]))
    other = Deal(num_samples=deal.num_samples, world_size=world_size, batch_size=batch_size)
    assume(deal.num_samples - stop >= world_size or deal.num_samples == stop)
    before = in_order(deal, seed=seed, epoch=0)[:stop]
    assert sorted(before + in_order(other, seed=seed, epoch=0, start=stop)) == list(range(deal.num_samples))


def test_ranks_take_contiguous_slices_of_each_step():
    deal = Deal(num_samples=20, world_size=2, batch_size=4)
    assert indices(deal, seed=0, epoch=0, shuffle=False) == [
        [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17]],
        [[4, 5, 6, 7], [12, 13, 14, 15], [18, 19]],
    ]


def test_a_tail_with_less_than_a_row_a_rank_is_shared_with_the_step_before():
    assert cut(Deal(num_samples=26, world_size=3, batch_size=4)) == (1, (7, 7))
    assert cut(Deal(num_samples=25, world_size=3, batch_size=4)) == (1, (7, 6))
    assert cut(Deal(num_samples=27, world_size=3, batch_size=4)) == (2, (3,))
    assert cut(Deal(num_samples=7, world_size=3, batch_size=1)) == (1, (4,))


@given(seeds, epochs)
@settings(deadline=None)
def test_epochs_and_seeds_have_orders_of_their_own(seed, epoch):
    deal = Deal(num_samples=50, batch_size=50)
    orders = [in_order(deal, seed=s, epoch=e) for s, e in ((seed, epoch), (seed, epoch + 1), (seed + 1, epoch))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_trillion_samples_need_no_list():
    deal = Deal(num_samples=10**12 + 1, world_size=1000, batch_size=8)
    middle = deal.step_size * (10**8 // 2)
    first, second = itertools.islice(rank_indices(deal, 999, seed=0, epoch=0, start=middle), 2)
    permutation_places = next(rank_places(deal, 999, middle))
    assert permutation_places.size <= BLOCK
    assert len(set(first + second)) == 16
    assert num_steps(deal, middle) == math.ceil((deal.num_samples - middle) / deal.step_size)


def test_what_is_computed_in_blocks_is_what_is_computed_at_once():
    deal = Deal(num_samples=3 * BLOCK + 5, world_size=2, batch_size=7)
    long = [rows for rank in indices(deal, seed=0, epoch=0, shuffle=False) for rows in rank]
    assert sorted(itertools.chain.from_iterable(long)) == list(range(deal.num_samples))


# Loaders


class Numbers(Dataset):
    """0 .. num - 1, and which of them were read in this process."""

    def __init__(self, num):
        self.num = num
        self.read = []

    def __len__(self):
        return self.num

    def __getitem__(self, place):
        self.read.append(place)
        return torch.tensor(place)


class Noise(Numbers):
    """Three random numbers of each of the global generators, as an augmentation draws them in a worker."""

    def __getitem__(self, place):
        return torch.tensor([float(torch.rand(())), random.random(), np.random.rand(), get_worker_info().id])


def lists(found):
    return [batch.tolist() for batch in found]


@uneven
@given(deals(), st.integers(0, 99), epochs, st.booleans())
@settings(max_examples=40, deadline=None)
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
@settings(max_examples=40, deadline=None)
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
