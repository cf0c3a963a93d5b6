"""Early stopping and the guard against spikes: each equals a naive one, and all ranks agree."""

import math

import pytest
import torch
from hypothesis import example, given, strategies as st

import fabricfn as ff
from fabricfn import sharding
from fabricfn.errors import ConfigurationError, DonatedError
from tests.support.runtimes import RT64
from tests.support.tools import NET, X
from tests.support.worlds import world_of

two = world_of("threads", 2)


# quarters, so that means over two ranks are exact
NUMBERS = st.one_of(st.integers(-40, 40).map(lambda n: n / 4), st.sampled_from([math.nan, math.inf, -math.inf]))
SERIES = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=14)
MODES = st.sampled_from(["min", "max"])


def same(found):
    """What both ranks found, which must be one thing."""
    first, second = found
    assert repr(first) == repr(second)
    return first


# early stopping


@given(SERIES, MODES, st.integers(1, 4), st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from(["mean", "max", "min"]))
def test_early_stopping_equals_a_naive_one_and_all_ranks_agree(two, pairs, mode, patience, min_delta, reduce):
    def follow(rt):
        state = ff.EarlyStopping()
        return [
            state := ff.early_stopping(
                rt, state, torch.tensor(pair[rt.rank]), patience=patience, min_delta=min_delta, mode=mode, reduce=reduce
            )
            for pair in pairs
        ]

    sign = 1 if mode == "max" else -1
    reduced = {"mean": lambda a, b: (a + b) / 2, "max": max, "min": min}[reduce]
    found = same(two.run(follow))
    bests, last = [], -1
    for i, (a, b) in enumerate(pairs):
        value = (
            math.nan if math.isnan(a + b) and (math.isnan(a) or math.isnan(b) or reduce == "mean") else reduced(a, b)
        )
        if math.isfinite(value) and all(sign * (value - best) > min_delta for best in bests):
            bests, last = [value], i
        bad = i - last
        assert (found[i].num_bad, found[i].stop, found[i].improved) == (bad, bad >= patience, bad == 0)
        assert [found[i].best] == bests or (not bests and math.isnan(found[i].best))


@pytest.mark.parametrize("wrong", [{"mode": "less"}, {"reduce": "sum"}, {"patience": 0}, {"min_delta": -1.0}])
def test_early_stopping_refuses_what_it_does_not_know(wrong):
    with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))}="):
        ff.early_stopping(RT64, ff.EarlyStopping(), 1.0, **wrong)


# spikes


@given(
    SERIES,
    MODES,
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([None, 0.0, 2.0]),
    st.sampled_from([None, 0.5, 2.0]),
    st.booleans(),
)
@example([(1.0, 1.0), (3.0, 2.0)], "min", 1, 1, None, 2.0, True)  # as far away as it may be
@example([(1.0, 1.0), (3.0, 2.0)], "min", 1, 1, 2.0, None, True)
def test_the_guard_equals_a_naive_one_and_all_ranks_agree(two, pairs, mode, window, warmup, atol, rtol, finite_only):
    options = {"mode": mode, "window": window, "warmup": warmup, "atol": atol, "rtol": rtol, "finite_only": finite_only}

    def follow(rt):
        guard, found = ff.SpikeGuard(), []
        for i, pair in enumerate(pairs):
            guard, state = ff.spike_guard(rt, guard, torch.tensor(pair[rt.rank]), i, **options)
            found.append((guard.spike, guard.in_a_row, state, guard.values))
        return found

    def is_spike(i, values, good):
        if not all(map(math.isfinite, values)) and finite_only:
            return True
        values = [value for value in values if not math.isnan(value)]
        if i < warmup or not good or not values:
            return False
        worst = max(values) if mode == "min" else min(values)
        worse = worst > good[-1] if mode == "min" else worst < good[-1]
        off = abs(worst - sum(good[-window:]) / len(good[-window:]))
        mean = sum(good[-window:]) / len(good[-window:])
        return worse and (atol is None or off >= atol) and (rtol is None or off >= abs(rtol * mean))

    good, kept, in_a_row = [], None, 0
    for i, (pair, found) in enumerate(zip(pairs, same(two.run(follow)), strict=True)):
        spike = is_spike(i, pair, good)
        in_a_row = in_a_row + 1 if spike else 0
        if not spike and all(map(math.isfinite, pair)):
            good.append(max(pair) if mode == "min" else min(pair))
            kept = i
        state = kept if spike and kept is not None else i
        assert found == (spike, in_a_row, state, tuple(good[-window:]))


POISON = 5


def guarded(rt, donate, copy):
    """Ten steps; the batch of one is infinite."""
    model = ff.setup_model(rt, NET[0])
    opt = ff.setup_optimizer(rt, model, torch.optim.Adam, lr=0.1)
    grad_fn, guard, spikes = ff.value_and_grad(rt, lambda net, x: net(x).square().mean()), ff.SpikeGuard(), []
    for i in range(10):
        x = (X + i / 10).tensor_split(rt.world_size)[rt.rank]
        if i == POISON and rt.rank == rt.world_size - 1:
            x = x * math.inf
        loss, grads = grad_fn(model, x)
        guard, (model, opt) = ff.spike_guard(rt, guard, loss, (model, opt), copy=copy)
        spikes.append(guard.spike)
        if not guard.spike:
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)
    return {name: sharding.whole(value) for name, value in model.params.items()}, spikes, opt.step


def left_out(rt):
    """The same without that batch and the one before it."""
    model = ff.setup_model(rt, NET[0])
    opt = ff.setup_optimizer(rt, model, torch.optim.Adam, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())
    for i in set(range(10)) - {POISON - 1, POISON}:
        _, grads = grad_fn(model, (X + i / 10).tensor_split(rt.world_size)[rt.rank])
        model, opt = ff.optimizer_step(rt, model, opt, grads)
    return {name: sharding.whole(value) for name, value in model.params.items()}


@pytest.mark.parametrize("strategy", ["functional", "ddp", "fsdp"])
def test_a_step_back_is_as_if_two_batches_had_not_been(two, strategy):
    expected = two.run(left_out, strategy=strategy, precision=64)[0]
    for donate in (False, True):
        found, spikes, steps = two.run(guarded, donate, donate, strategy=strategy, precision=64)[0]
        assert (spikes.index(True), sum(spikes), steps) == (POISON, 1, 8)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_good_state_that_a_step_overwrote_is_refused_at_the_next_call():
    with pytest.raises(DonatedError, match=r"kept this as the state to go back to.*test_guards\.py.*copy=True"):
        guarded(RT64, donate=True, copy=False)


def test_every_nth_good_state_is_kept():
    guard = ff.SpikeGuard()
    for i in range(6):
        guard, _ = ff.spike_guard(RT64, guard, 1.0, i, every=4)
    assert guard.good == 4
    assert ff.spike_guard(RT64, guard, math.nan, 6, every=4)[1] == 4


def test_what_comes_back_from_a_copy_may_be_donated():
    model = ff.setup_model(RT64, NET[0])
    guard, same_model = ff.spike_guard(RT64, ff.SpikeGuard(), 1.0, model, copy=True)
    guard, back = ff.spike_guard(RT64, guard, math.nan, model, copy=True)
    memory = {one.params["weight"].data_ptr() for one in (model, guard.good, back)}
    assert same_model is model and len(memory) == 3


@pytest.mark.parametrize("wrong", [{"mode": "less"}, {"window": 0}, {"every": 0}])
def test_the_guard_refuses_what_it_does_not_know(wrong):
    with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))}="):
        ff.spike_guard(RT64, ff.SpikeGuard(), 1.0, None, **wrong)
