"""Precision: names, what is cast where, and what is left alone."""

import dataclasses
import threading

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import testing
from fabricfn.default_dtypes import default_dtype
from fabricfn.sharding import full
from fabricfn.testing import cases


@pytest.fixture
def runtime(one_rank):
    return lambda precision, strategy="single": one_rank(strategy, precision)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        *[(64, "64-true"), ("64", "64-true"), (32, "32-true"), ("32", "32-true"), ("bf16", "bf16-mixed")],
        *[(16, "16-mixed"), ("16", "16-mixed"), ("fp16", "16-mixed"), ("half", "16-true")],
    ],
)
def test_aliases(name, same):
    assert ff.Precision.parse(name) == ff.Precision.parse(same)


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match=r"'8-bit' is unknown; there are 64-true, 32-true, bf16-true, bf16-mixed"):
        ff.Precision.parse("8-bit")
    with pytest.raises(ValueError, match="'16-bit' is unknown; .* 16-true, 16-mixed"):
        ff.Precision.parse("16-bit")


@pytest.mark.parametrize("name", [16, "16", "fp16", "16-mixed"])
def test_a_cpu_refuses_the_name_16_mixed_and_names_bf16_mixed(name):
    with pytest.raises(ValueError, match="bf16-mixed") as found:
        ff.init_runtime(accelerator="cpu", precision=name)
    assert isinstance(found.value, ff.ConfigurationError)
    with pytest.raises(ValueError, match="bf16-mixed"):
        ff.launch(len, devices=2, accelerator="cpu", precision=name)


def test_a_cpu_takes_the_record_16_mixed_and_the_name_16_true():
    record = ff.Precision.parse("16-mixed")
    assert (record.compute_dtype, record.autocast) == (torch.float16, True)
    assert record.loss_scale == ff.DynamicScale(
        init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000
    )
    assert ff.init_runtime(accelerator="cpu", precision=record).precision is record
    assert ff.init_runtime(accelerator="cpu", precision="16-true").precision.loss_scale is None


def test_16_true_trains_on_cpu(runtime):
    rt = runtime("16-true")
    model = ff.setup_model(rt, cases.initialised(nn.Linear(4, 1), 0))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.125)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())
    losses = []
    for _ in range(5):
        loss, grads = grad_fn(model, torch.ones(8, 4))
        model, opt = ff.optimizer_step(rt, model, opt, grads)
        losses.append(loss.item())
    assert {value.dtype for value in model.params.values()} == {torch.float16}
    assert losses[-1] < 1e-2 * losses[0]
    assert loss.dtype is torch.float32


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss_scale": 0.0},
        {"loss_scale": -1.0},
        {"loss_scale": float("nan")},
        {"loss_scale": float("inf")},
        {"reduce_dtype": torch.int32},
    ],
)
def test_senseless_records_are_refused(wrong):
    with pytest.raises(ff.ConfigurationError, match=next(iter(wrong))):
        ff.Precision(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"init_scale": 0.0},
        {"init_scale": float("inf")},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0.0},
        {"growth_interval": 0},
        {"min_scale": 0.0},
        {"min_scale": 1e6},
    ],
)
def test_senseless_settings_of_a_scale_are_refused(wrong):
    with pytest.raises(ff.ConfigurationError, match=next(iter(wrong))):
        ff.DynamicScale(**wrong)


class Probe(nn.Module):
    """Keeps what its forward saw."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0))
        self.seen = {}

    def forward(self, x, *, labels, extra):
        out = self.linear(x)
        self.seen.update(x=x.dtype, labels=labels.dtype, extra=extra["z"].dtype, out=out.dtype)
        return {"out": out, "labels": labels}


@pytest.mark.parametrize("strategy", ff.strategies.NAMES)
@pytest.mark.parametrize(
    ("precision", "params", "seen", "inside", "output"),
    [
        ("64-true", torch.float64, torch.float64, torch.float64, torch.float64),
        ("32-true", torch.float32, torch.float32, torch.float32, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
        ("bf16-mixed", torch.float32, torch.float32, torch.bfloat16, torch.bfloat16),
        ("16-true", torch.float16, torch.float16, torch.float16, torch.float32),
        ("16-mixed", torch.float32, torch.float32, torch.float16, torch.float16),
    ],
)
def test_what_is_cast_where(runtime, strategy, precision, params, seen, inside, output):
    rt = runtime(precision, strategy)
    model = ff.setup_model(rt, Probe())
    inputs = {"labels": torch.zeros(2, dtype=torch.long), "extra": {"z": torch.ones(2)}}
    found = {}

    def loss_fn(net, x):
        result = net(x, **inputs)
        found.update(net.seen, output=result["out"].dtype, kept=result["labels"].dtype)
        return result["out"].float().square().mean()

    _, grads = ff.value_and_grad(rt, loss_fn)(model, torch.ones(2, 4))
    assert model.params["linear.weight"].dtype is grads.params["linear.weight"].dtype is params
    assert model.buffers["table"].dtype is params
    assert found == {
        "x": seen, "labels": torch.long, "extra": seen, "out": inside, "output": output, "kept": torch.long,
    }  # fmt: skip


def test_doubles_meet_a_32_true_net(runtime):
    rt = runtime("32-true")
    model = ff.setup_model(rt, nn.Linear(4, 1).double())
    assert ff.apply(rt, model, torch.ones(2, 4, dtype=torch.float64)).dtype is torch.float32


def test_mixed_leaves_modules_and_inputs_alone(runtime):
    rt = runtime("bf16-mixed")
    model = ff.setup_model(rt, nn.Linear(4, 1).double())
    assert model.params["weight"].dtype is torch.float64


def test_the_whole_loss_function_is_under_autocast_and_not_after_it(runtime):
    rt = runtime("bf16-mixed")
    model = ff.setup_model(rt, nn.Linear(4, 4))

    def loss_fn(net, x):
        assert (x @ x.T).dtype is torch.bfloat16
        return (net(x) @ x.T).float().mean()

    ff.value_and_grad(rt, loss_fn)(model, torch.ones(2, 4))
    assert (torch.ones(2, 4) @ torch.ones(4, 2)).dtype is torch.float32
    with ff.autocast(rt):
        assert (torch.ones(2, 4) @ torch.ones(4, 2)).dtype is torch.bfloat16
    with ff.autocast(runtime(32)):
        assert (torch.ones(2, 4) @ torch.ones(4, 2)).dtype is torch.float32


def test_a_step_inside_and_outside_of_the_weight_cache_agree(runtime):
    """A stale cache of cast weights would make the second step see the first step's weights."""
    rt = runtime("bf16-mixed")
    model = ff.setup_model(rt, cases.initialised(nn.Linear(4, 1), 0).float())
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).float().square().mean())
    scaled = ff.map_params(lambda a: 3 * a, model)
    first, _ = grad_fn(model, torch.ones(2, 4))
    second, _ = grad_fn(scaled, torch.ones(2, 4))
    torch.testing.assert_close(second, 9 * first, rtol=2e-2, atol=0)


def test_a_record_of_ones_own(runtime):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def convert(module):
        module.__class__ = Doubled
        return module

    precision = dataclasses.replace(ff.Precision.parse(64), convert=convert, output_dtype=torch.float32)
    rt = runtime(precision)
    module = nn.Linear(4, 1)
    out = ff.apply(rt, ff.setup_model(rt, module), torch.ones(2, 4))
    assert out.dtype is torch.float32 and type(module) is nn.Linear
    torch.testing.assert_close(out, 2 * module(torch.ones(2, 4)))


def test_init_module_makes_parameters_in_place_and_in_dtype(runtime):
    made = []

    def factory():
        made.append(torch.get_default_dtype())
        return nn.Linear(4, 1)

    rt = runtime("bf16-true")
    assert ff.init_module(rt, factory).weight.dtype is torch.bfloat16
    assert ff.setup_model(rt, factory).params["weight"].dtype is torch.bfloat16
    assert made == [torch.bfloat16] * 2 and torch.get_default_dtype() is torch.float32
    with pytest.raises(ZeroDivisionError):
        ff.init_module(rt, lambda: 1 / 0)
    assert torch.get_default_dtype() is torch.float32


VALUES = torch.tensor([[1.0, 1 + 2**-7, 1 + 2**-10, 3e-5], [1 + 2**-9, 2.0, 1 - 2**-9, 7e-5]])
"""What the gradients of two ranks are: numbers that 16 bits round."""


def means(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1, bias=False))
    loss_fn = lambda net, x: (net.weight * x).sum()  # noqa: E731
    _, grads = ff.value_and_grad(rt, loss_fn)(model, VALUES[rt.rank])
    return full(grads.params["weight"])


@pytest.mark.parametrize("kind", ["threads", "processes"])
@pytest.mark.parametrize("strategy", ["functional", "ddp", "flat", "fsdp", "flat_sharded"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_are_averaged_in_the_dtype_that_the_record_says(worlds, kind, strategy, dtype):
    precision = ff.Precision(reduce_dtype=dtype)
    sent = VALUES.to(torch.float32 if dtype is None else dtype)
    expected = (sent / 2).sum(0).to(torch.float32)
    for mean in worlds[kind].run(means, strategy=strategy, precision=precision):
        assert mean.dtype is torch.float32
        assert mean.flatten().tolist() == expected.tolist()
    if dtype in (torch.bfloat16, torch.float16):
        assert expected.tolist() != (VALUES / 2).sum(0).tolist()


@pytest.fixture(scope="module")
def worlds():
    with testing.threads(2) as some, testing.processes(2) as others:
        yield {"threads": some, "processes": others}


def test_a_hook_and_a_dtype_for_the_same_thing_are_refused(worlds):
    strategy = ff.strategies.ddp(comm_hook=print)
    with pytest.raises(ff.ConfigurationError, match=r"comm_hook=.*reduce_dtype=torch\.float16"):
        worlds["threads"].run(means, strategy=strategy, precision=ff.Precision(reduce_dtype=torch.float16))


def test_the_default_dtype_outlives_threads_that_change_it_at_a_time():
    both = threading.Barrier(2)

    def first():
        with default_dtype(torch.float64):
            both.wait()  # the second one is about to enter
            both.wait()  # it is inside

    def second():
        both.wait()
        with default_dtype(torch.float64):
            both.wait()
            one.join()  # the first one has left
            with default_dtype(torch.float16):
                assert torch.get_default_dtype() is torch.float16
            assert torch.get_default_dtype() is torch.float64

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    for thread in (one, other):
        thread.start()
    for thread in (one, other):
        thread.join()
    assert torch.get_default_dtype() is torch.float32
