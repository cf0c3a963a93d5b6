"""How fast a loop is: throughput adds up over ranks, floating-point operations and the peak are counted right."""

import warnings

import pytest
import torch
from hypothesis import given, strategies as st

import fabricfn as ff
from fabricfn.errors import ConfigurationError
from tests.support.runtimes import RT64
from tests.support.tools import NET, X
from tests.support.worlds import world_of

two = world_of("threads", 2)


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


def test_the_clock_is_the_machines_unless_given_and_never_goes_back():
    meter = ff.throughput(ff.throughput(ff.Throughput(), samples=1), samples=1)
    assert ff.rates(RT64, meter)["samples_per_sec"] > 0
    with pytest.raises(ConfigurationError, match=r"now=-1\.0 after"):
        ff.throughput(meter, samples=1, now=-1.0)
    with pytest.raises(ConfigurationError, match="window=0"):
        ff.throughput(ff.Throughput(window=0), samples=1)


def test_learning_rates_are_those_of_the_next_step():
    model = ff.setup_model(RT64, NET)
    opt = ff.setup_optimizer(RT64, model, torch.optim.Adam, lr=0.1)
    assert ff.learning_rates(opt) == {"lr": 0.1}
    assert ff.learning_rates(opt, lr=0.01) == {"lr": 0.01}
    groups = ff.setup_optimizer(RT64, model, torch.optim.Adam, lr=0.1, groups={"0.*": {"lr": 0.3}})
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
def test_the_peak_is_found_by_the_name_of_the_device(name, dtype, peak):
    assert ff.available_flops(RT64, name=name, dtype=dtype) == pytest.approx(peak)


def test_tf32_counts_where_it_is_used():
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = [ff.available_flops(RT64, name=n, dtype=torch.float32) for n in ("A100", "T4")]
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
def test_an_unknown_peak_is_none_with_a_word_but_on_a_cpu(name, dtype):
    with pytest.warns(UserWarning, match=f"the peak of '{name}' in {dtype} is not known"):
        assert ff.available_flops(RT64, name=name, dtype=dtype) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ff.available_flops(RT64) is None
