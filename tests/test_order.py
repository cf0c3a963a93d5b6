"""Law 7, the plan: over the ranks every sample comes exactly once, in an order that (seed, epoch) alone decide."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from fabricfn.order import BLOCK, Deal, cut, num_steps, rank_indices, rank_places, step_ends
from fabricfn.permutations import make_permutation, permuted
from fabricfn.random import fold_in, key
from tests.support.feeds import deals, epochs, seeds

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
def test_a_permutation_holds_every_number_once(num, seed):
    assert sorted(permuted(make_permutation(num, key(seed)), np.arange(num))) == list(range(num))


@given(st.integers(1, 2**63 - 1), st.integers(), st.data())
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


def indices(deal, **options):
    """rank -> its lists of samples."""
    return [list(rank_indices(deal, rank, **options)) for rank in range(deal.world_size)]


def in_order(deal, **options):
    """The samples of all ranks in the order in which the steps take them."""
    return [sample for step in zip(*indices(deal, **options), strict=True) for rows in step for sample in rows]


@given(deals(tails=["spread"]), seeds, epochs)
def test_every_sample_comes_exactly_once(deal, seed, epoch):
    samples = in_order(deal, seed=seed, epoch=epoch)
    assert sorted(samples) == list(range(deal.num_samples))


@given(deals(tails=["drop"]), seeds, epochs)
def test_dropping_leaves_out_less_than_a_step_at_the_end_of_the_order(deal, seed, epoch):
    whole = in_order(Deal(num_samples=deal.num_samples), seed=seed, epoch=epoch)
    samples = in_order(deal, seed=seed, epoch=epoch)
    assert samples == whole[: len(samples)]
    assert 0 <= deal.num_samples - len(samples) < deal.step_size
    assert {len(rows) for rank in indices(deal, seed=seed, epoch=epoch) for rows in rank} <= {deal.batch_size}


@given(deals(tails=["spread"]), seeds, epochs)
def test_the_global_order_is_the_same_at_every_world_and_batch_size(deal, seed, epoch):
    assert in_order(deal, seed=seed, epoch=epoch) == in_order(
        Deal(num_samples=deal.num_samples), seed=seed, epoch=epoch
    )


@given(deals())
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
def test_going_on_after_any_step_is_as_if_never_stopped(deal, seed, epoch, data):
    whole, ends = indices(deal, seed=seed, epoch=epoch), list(step_ends(deal))
    assume(ends)
    step = data.draw(st.integers(0, len(ends) - 1))
    rest = indices(deal, seed=seed, epoch=epoch, start=ends[step])
    assert rest == [steps[step + 1 :] for steps in whole]


@given(deals(tails=["spread"]), seeds, st.integers(1, 6), st.integers(1, 9), st.data())
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
