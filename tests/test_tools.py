"""What a loop is made up of: each tool equals a naive one, on every rank and under every strategy."""

import dataclasses
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, strategies as st
from torch import nn

import fabricfn as ff
from fabricfn import sharding
from fabricfn.errors import ConfigurationError, DonatedError, ModelError
from tests.worlds import world_of

GUIDE = Path(__file__).parents[1] / "docs/tools.md"
# quarters, so that means over two ranks are exact
NUMBERS = st.one_of(st.integers(-40, 40).map(lambda n: n / 4), st.sampled_from([math.nan, math.inf, -math.inf]))
SERIES = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=14)
MODES = st.sampled_from(["min", "max"])


two = world_of("threads", 2)


@pytest.fixture(scope="module")
def alone():
    return ff.init_runtime(devices=1, accelerator="cpu", precision=64)


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
def test_early_stopping_refuses_what_it_does_not_know(alone, wrong):
    with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))}="):
        ff.early_stopping(alone, ff.EarlyStopping(), 1.0, **wrong)


# averages


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()


NET = net()  # not in the ranks: threads share the generator
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def squares(net, x):
    return (net[2](net[0](x)) ** 2).mean()


def averaged(rt):
    """The models of five donated steps, and their averages, whole: pure, mean, in place."""
    model = ff.setup_model(rt, NET)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, squares, allow_unused=True)
    averages, mean, seen = ff.tree_map(torch.clone, {"net": [model]}), model, []
    given = ff.tree_map(torch.clone, averages)
    for count in range(5):
        _, grads = grad_fn(model, X.tensor_split(rt.world_size)[rt.rank])
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
        averages = ff.ema(averages, {"net": [model]}, 0.75)
        given = ff.ema(given, {"net": [model]}, 0.75, donate=True)
        mean = ff.swa(mean if count else model, model, count)
        seen.append({name: sharding.whole(value).clone() for name, value in model.params.items()})
    means = (averages["net"][0], mean, given["net"][0])
    return seen, *({name: sharding.whole(value) for name, value in one.params.items()} for one in means)


@pytest.mark.parametrize("strategy", ["functional", "ddp_find_unused_parameters_true", "fsdp"])
def test_averages_are_those_of_the_formula_under_every_strategy(two, alone, strategy):
    start = dict(NET.named_parameters())
    seen, ema, swa, in_place = two.run(averaged, strategy=strategy, precision=64)[1]
    for name, first in start.items():
        by_hand = first.detach()
        for params in seen:
            by_hand = 0.75 * by_hand + 0.25 * params[name]
        torch.testing.assert_close(ema[name], by_hand, rtol=0, atol=1e-14)
        torch.testing.assert_close(swa[name], sum(p[name] for p in seen) / 5, rtol=0, atol=1e-14)
    torch.testing.assert_close(in_place, ema, rtol=0, atol=0)
    torch.testing.assert_close((ema, swa), averaged(alone)[1:3], rtol=0, atol=1e-12)


def test_an_average_takes_the_newest_buffers_and_leaves_its_arguments_alone(alone):
    model = ff.setup_model(alone, NET)
    newer = dataclasses.replace(model, buffers={name: value + 1 for name, value in model.buffers.items()})
    before = ff.tree_map(torch.clone, model)
    average = ff.ema(ff.eval_mode(model), newer, 0.5)
    assert average.buffers["1.num_batches_tracked"] == 1 and not average.training
    torch.testing.assert_close(dict(average.params), dict(before.params), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.buffers), dict(before.buffers), rtol=0, atol=0)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.wave = nn.Parameter(torch.ones(2, dtype=torch.complex128))
        self.codes = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)


@pytest.mark.parametrize("donate", [False, True])
def test_complex_parameters_are_averaged_and_integers_are_the_newest(alone, donate):
    model = ff.setup_model(alone, Mixed())
    newer = dataclasses.replace(model, params={name: value * 3 + 1 for name, value in model.params.items()})
    average = ff.ema(ff.tree_map(torch.clone, model), newer, 0.5, donate=donate)
    assert average.params["wave"].tolist() == [2.5, 2.5] and average.params["codes"].tolist() == [1, 1]
    assert newer.params["codes"].tolist() == [1, 1] and average.params["codes"] is not newer.params["codes"]


def test_a_donated_average_is_the_same_memory_and_the_old_one_is_spent(alone):
    model = ff.setup_model(alone, NET)
    first = ff.tree_map(torch.clone, model)
    loss = ff.value(alone, squares)(first, X)
    second = ff.ema(first, model, 0.5, donate=True)
    assert [*map(torch.Tensor.data_ptr, second.params.values())] == [*map(torch.Tensor.data_ptr, first.params.values())]
    assert torch.equal(ff.value(alone, squares)(second, X), loss)
    with pytest.raises(ff.DonatedError, match=r"test_tools\.py"):
        ff.apply(alone, first, X)
    with pytest.raises(ff.DonatedError):
        ff.swa(model, first, 1)
    third = ff.swa(second, model, 1, donate=True)  # a second time, from what came back
    with pytest.raises(ff.DonatedError):
        ff.ema(second, model, 0.5)
    ff.ema(model, third, 0.5, donate=True)
    with pytest.raises(ff.DonatedError, match=r"test_tools\.py"):
        ff.apply(alone, model, X)


def test_a_donated_average_of_tensors_that_share_memory_is_refused_or_found_out(alone):
    model = ff.setup_model(alone, nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2)))
    one = torch.zeros(2, 2)
    twice = dataclasses.replace(model, params=dict.fromkeys(model.params, one))
    with pytest.raises(ModelError, match="share memory"):
        ff.ema(twice, model, 0.5, donate=True)
    assert not one.any()
    alias = dataclasses.replace(model, params={name: value[:] for name, value in model.params.items()})
    ff.ema(alias, ff.map_params(torch.zeros_like, model), 0.5, donate=True)
    with pytest.raises(ff.DonatedError, match="shares tensors"):
        ff.apply(alone, model, one)


def placed_otherwise(rt):
    model = ff.setup_model(rt, NET)
    whole = dataclasses.replace(model, params=ff.gather_params(rt, model))
    with pytest.raises(ModelError, match=r"0\.weight lies otherwise on the ranks"):
        ff.ema(whole, model, 0.5)


def test_an_average_lies_on_the_ranks_as_the_model_does(two):
    two.run(placed_otherwise, strategy="fsdp", precision=64)


@pytest.mark.parametrize("donate", [False, True])
def test_an_average_in_a_compiled_step_is_that_of_the_eager_one(alone, donate):
    model = ff.setup_model(alone, NET)
    opt = ff.setup_optimizer(alone, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(alone, squares, allow_unused=True)

    def step(model, opt, average, x):
        _, grads = grad_fn(model, x)
        model, opt = ff.optimizer_step(alone, model, opt, grads, donate=donate)
        return model, opt, ff.ema(average, model, 0.75, donate=donate)

    found = []
    for one in (step, ff.compile_step(alone, step, backend="eager")):
        state = ff.tree_map(torch.clone, (model, opt, model))
        for _ in range(3):
            before, state = state, one(*state, X)
        found.append(state[2].params)
        if donate:
            with pytest.raises(ff.DonatedError):
                ff.apply(alone, before[2], X)
    torch.testing.assert_close(dict(found[0]), dict(found[1]), rtol=0, atol=1e-14)


def test_averages_refuse_other_trees_and_numbers(alone):
    model = ff.setup_model(alone, NET)
    other = ff.setup_model(alone, nn.Linear(4, 3).double())
    for average in (other, {"net": model}, [model, model], torch.zeros(2)):
        with pytest.raises(ModelError, match=r"Begin with average = ff\.tree_map\(torch\.clone, model\)"):
            ff.ema(average, model, 0.5)
    with pytest.raises(ConfigurationError, match=r"decay=1\.5"):
        ff.ema(model, model, 1.5)
    with pytest.raises(ConfigurationError, match="count=-1"):
        ff.swa(model, model, -1)


# how fast

TICKS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 50), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12
)


@given(TICKS, TICKS, st.integers(1, 5))
def test_rates_equal_those_of_a_naive_list_and_add_up_over_uneven_ranks(two, first, second, window):
    def follow(rt):
        meter, now = ff.Throughput(window=window), 100.0
        for pause, samples, tokens, flops in (first, second)[rt.rank]:
            now += pause
            meter = ff.throughput(meter, samples=samples, tokens=tokens, flops=flops, now=now)
        assert len(meter.marks) <= window + 1
        return ff.rates(rt, meter, available_flops=4.0)

    def naive(ticks):
        lately = ticks[1:][-window:]
        seconds = sum(tick[0] for tick in lately)
        rows = [(1, *tick[1:]) for tick in lately]
        return [sum(row[i] for row in rows) / seconds if seconds else 0.0 for i in range(4)]

    names = ["batches_per_sec", "samples_per_sec", "tokens_per_sec", "flops_per_sec"]
    owns = [naive(first), naive(second)]
    for own, found in zip(owns, two.run(follow), strict=True):
        sums = [a + b for a, b in zip(*owns, strict=True)]
        expected = {name: total for name, total in zip(names, sums, strict=True) if total}
        expected |= {f"device/{name}": rate for name, rate, total in zip(names, own, sums, strict=True) if total}
        if sums[3]:
            expected["device/mfu"] = own[3] / 4
        assert found == pytest.approx(expected)


def test_the_clock_is_the_machines_unless_given_and_never_goes_back(alone):
    meter = ff.throughput(ff.throughput(ff.Throughput(), samples=1), samples=1)
    assert ff.rates(alone, meter)["samples_per_sec"] > 0
    with pytest.raises(ConfigurationError, match=r"now=-1\.0 after"):
        ff.throughput(meter, samples=1, now=-1.0)
    with pytest.raises(ConfigurationError, match="window=0"):
        ff.throughput(ff.Throughput(window=0), samples=1)


def test_learning_rates_are_those_of_the_next_step(alone):
    model = ff.setup_model(alone, NET)
    opt = ff.setup_optimizer(alone, model, torch.optim.Adam, lr=0.1)
    assert ff.learning_rates(opt) == {"lr": 0.1}
    assert ff.learning_rates(opt, lr=0.01) == {"lr": 0.01}
    groups = ff.setup_optimizer(alone, model, torch.optim.Adam, lr=0.1, groups={"0.*": {"lr": 0.3}})
    assert sorted(ff.learning_rates(groups).values()) == [0.1, 0.3]
    with pytest.raises(ConfigurationError, match="no hyperparameter speed"):
        ff.learning_rates(opt, speed=1)


@pytest.mark.parametrize("strategy", ["functional", "ddp", "fsdp"])
def test_flops_are_those_of_this_ranks_batch(two, strategy):
    def measure(rt):
        model = ff.setup_model(rt, NET[0])
        forward = ff.value(rt, lambda net, x: net(x).mean())
        x = X.tensor_split(rt.world_size)[rt.rank]
        return ff.measure_flops(forward, model, x), ff.measure_flops(
            ff.value_and_grad(rt, lambda net, x: net(x).mean()), model, x
        )

    product = 2 * 4 * 4 * 3  # of four rows; the backward pass has one more, that of the weight
    assert two.run(measure, strategy=strategy, precision=64) == [(product, 2 * product)] * 2


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.5e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989.5e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.float64, 19.5e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("Tesla V100-PCIE-32GB", torch.float16, 112e12),
        ("Tesla T4", torch.float32, 8.1e12),
        ("NVIDIA GeForce RTX 3080 Ti", torch.float32, 34.1e12),
        ("TPU v4", torch.bfloat16, 275e12),
    ],
)
def test_the_peak_is_found_by_the_name_of_the_device(alone, name, dtype, peak):
    assert ff.available_flops(alone, name=name, dtype=dtype) == pytest.approx(peak)


def test_tf32_counts_where_it_is_used(alone):
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = [ff.available_flops(alone, name=n, dtype=torch.float32) for n in ("A100", "T4")]
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == {"highest": [19.5e12, 8.1e12], "high": [156e12, 8.1e12]}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA GeForce RTX 3080 Laptop GPU", torch.float32),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.float32),
        ("Tesla T4", torch.bfloat16),
        ("NVIDIA H200", torch.int8),
        ("Difference Engine", torch.float64),
    ],
)
def test_an_unknown_peak_is_none_with_a_word_but_on_a_cpu(alone, name, dtype):
    with pytest.warns(UserWarning, match=f"the peak of '{name}' in {dtype} is not known"):
        assert ff.available_flops(alone, name=name, dtype=dtype) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ff.available_flops(alone) is None


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


def test_a_good_state_that_a_step_overwrote_is_refused_at_the_next_call(alone):
    with pytest.raises(DonatedError, match=r"kept this as the state to go back to.*test_tools\.py.*copy=True"):
        guarded(alone, donate=True, copy=False)


def test_every_nth_good_state_is_kept(alone):
    guard = ff.SpikeGuard()
    for i in range(6):
        guard, _ = ff.spike_guard(alone, guard, 1.0, i, every=4)
    assert guard.good == 4
    assert ff.spike_guard(alone, guard, math.nan, 6, every=4)[1] == 4


def test_what_comes_back_from_a_copy_may_be_donated(alone):
    model = ff.setup_model(alone, NET[0])
    guard, same_model = ff.spike_guard(alone, ff.SpikeGuard(), 1.0, model, copy=True)
    guard, back = ff.spike_guard(alone, guard, math.nan, model, copy=True)
    memory = {one.params["weight"].data_ptr() for one in (model, guard.good, back)}
    assert same_model is model and len(memory) == 3


@pytest.mark.parametrize("wrong", [{"mode": "less"}, {"window": 0}, {"every": 0}])
def test_the_guard_refuses_what_it_does_not_know(alone, wrong):
    with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))}="):
        ff.spike_guard(alone, ff.SpikeGuard(), 1.0, None, **wrong)


# together


def test_their_states_are_saved_and_loaded(two, tmp_path):
    def follow(rt):
        stopper, guard = ff.EarlyStopping(), ff.SpikeGuard()
        model = ff.setup_model(rt, NET[0])
        for value in (0.3, 0.1, 0.2, 9.0):
            stopper = ff.early_stopping(rt, stopper, value)
            guard, _ = ff.spike_guard(rt, guard, value, model)
        ff.save(rt, tmp_path / "state", {"stopper": stopper, "guard": guard})
        like = {"stopper": ff.EarlyStopping(), "guard": ff.SpikeGuard(good="mine")}
        return stopper, guard, ff.load(rt, tmp_path / "state", like=like)

    for stopper, guard, loaded in two.run(follow, strategy="fsdp", precision=64):
        assert loaded == {"stopper": stopper, "guard": dataclasses.replace(guard, good="mine")}
        assert guard.values == (0.3, 0.1, 0.2) and guard.spike and guard.good is not None


def test_the_snippet_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    rt = ff.init_runtime(devices=1, accelerator="cpu", loggers=ff.loggers.jsonl("logs"))
    x = torch.linspace(-1, 1, 64)[:, None]
    data = torch.utils.data.TensorDataset(x, 3 * x + 1)
    loader = ff.setup_dataloader(rt, torch.utils.data.DataLoader(data, batch_size=16, shuffle=True))
    model = ff.setup_model(rt, nn.Linear(1, 1))
    mse = ff.value(rt, lambda net, x, y: nn.functional.mse_loss(net(x), y))
    names = {
        "ff": ff, "torch": torch, "rt": rt, "model": model, "loader": loader, "first_batch": (x[:16], x[:16]),
        "opt": ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1), "schedule": lambda step: {"lr": 0.2},
        "grad_fn": ff.value_and_grad(rt, lambda net, x, y: nn.functional.mse_loss(net(x), y)),
        "validate": lambda model: mse(model, x, 3 * x + 1).item(),
    }  # fmt: skip
    exec(compile(snippet, str(GUIDE), "exec"), names)
    ff.shutdown(rt)
    assert names["stopper"].stop and 2 < names["epoch"] < 49
    kept = ff.list_checkpoints(tmp_path / "checkpoints")
    assert 2 <= len(kept) <= 3
    rows = (tmp_path / "logs/version_0/metrics.jsonl").read_text()
    assert '"lr"' in rows and "samples_per_sec" in rows and "device/flops_per_sec" in rows
