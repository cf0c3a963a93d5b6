"""The loss scale of a compiled step: the same verdicts and the same scales as of the eager one."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn.optimizers.skipping import SMALL
from tests.support.compiled import (
    ATOL,
    BACKEND,
    FUNCTIONAL,
    OPTIMIZERS,
    assert_close,
    copies,
    make_batch,
    make_net,
    make_step,
    tensors_of,
)
from tests.support.worlds import world_of

threads = world_of("threads", 2)


DOUBLE = ff.Precision(param_dtype=torch.float64, compute_dtype=torch.float64, output_dtype=torch.float64)
GROWING = ff.DynamicScale(init_scale=1024.0, growth_interval=2)
SCALES = {"dynamic": GROWING, "static": 128.0, "uneven": dataclasses.replace(GROWING, backoff_factor=0.3)}


def scaled(scale, precision=DOUBLE, **options):
    precision = dataclasses.replace(precision, loss_scale=scale)
    return ff.init_runtime(accelerator="cpu", devices=1, precision=precision, **options)


def poisoned(number):
    """A batch; every third one has a number that is not finite."""
    x, y = make_batch(number)
    if number % 3 == 0:
        x[number % 8, 0] = (float("inf"), float("nan"))[number % 2]
    return x, y


def assert_same_scales(eager, mine):
    assert eager[0].loss_scale == mine[0].loss_scale
    assert isinstance(mine[0].loss_scale.good_steps, int) and mine[1].step == eager[1].step


@pytest.mark.parametrize(
    ("name", "scale", "donate"),
    [
        ("AdamW", "dynamic", True),
        ("AdamW", "uneven", False),
        ("Nesterov", "dynamic", True),
        ("Adagrad", "static", True),
    ],
)
def test_a_step_whose_gradients_are_not_finite_is_left_out(name, scale, donate):
    rt = scaled(SCALES[scale])
    cls, options = OPTIMIZERS[name]
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, cls, lr=0.1, **options)
    eager, mine = copies(model, opt), copies(model, opt)
    step = make_step(rt, donate)
    compiled = ff.compile_step(rt, step, backend=FUNCTIONAL if scale == "dynamic" else BACKEND)
    for number in range(8):
        batch, changing = poisoned(number), {"lr": 0.1 / (number + 1), "rng": ff.fold_in(ff.key(1), number)}
        *eager, told = step(*eager, *batch, **changing)
        *mine, mine_told = compiled(*mine, *batch, **changing)
        assert_same_scales(eager, mine)
        if name != "Nesterov" or number:  # a momentum that is 0 is there before the first step that is made
            assert_close(eager, mine)
        torch.testing.assert_close(told["norm"], mine_told["norm"], rtol=0, atol=ATOL, equal_nan=True)
    assert compiled.traces == 1 and mine[0].loss_scale.scale != 1024.0
    assert_same_scales(*[step(*records, *make_batch(8), 0.1)[:2] for records in (eager, mine)])


def test_an_overflow_in_float16_is_found():
    rt = scaled(ff.DynamicScale(init_scale=2.0**22, growth_interval=2), ff.Precision.parse("16-mixed"))
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.01)
    eager, mine = copies(model, opt), copies(model, opt)
    step = make_step(rt, True, lambda net, x, y: F.mse_loss(net(x), y.half()))
    compiled = ff.compile_step(rt, step, backend=FUNCTIONAL)
    scales = []
    for number in range(12):
        batch = [one.float() for one in make_batch(number)]
        *eager, _ = step(*eager, *batch, 0.01)
        *mine, _ = compiled(*mine, *batch, 0.01)
        assert_same_scales(eager, mine)
        scales.append(mine[0].loss_scale.scale)
        for one, other in zip(tensors_of(*eager), tensors_of(*mine), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert min(scales) < 2.0**18 and any(one < other for one, other in itertools.pairwise(scales))


@pytest.mark.parametrize("small", [True, False])
def test_large_gradients_are_looked_at_like_small_ones(small):
    rt = scaled(GROWING)
    sizes = (SMALL + 1, 3, 1) if small else (SMALL + 1, SMALL + 1)
    model = ff.setup_model(rt, nn.ParameterList([torch.ones(size) for size in sizes]))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, *xs: sum((one * x).sum() for one, x in zip(net, xs, strict=True)))

    def step(model, opt, *xs):
        return ff.optimizer_step(rt, model, opt, grad_fn(model, *xs)[1])

    compiled = ff.compile_step(rt, step, backend=BACKEND)
    for place in (None, *range(len(sizes))):
        xs = [torch.ones_like(value) for value in model.params.values()]
        if place is not None:
            xs[place][-1] = float("nan")
        assert_same_scales(step(model, opt, *xs), compiled(model, opt, *xs))
        assert (compiled(model, opt, *xs)[0].loss_scale.scale < 1024.0) is (place is not None)


def test_two_models_in_one_loss_use_the_smaller_scale():
    rt = scaled(GROWING)
    pair = [ff.setup_model(rt, nn.Linear(width, 2)) for width in (4, 2)]
    opts = [ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1) for model in pair]
    larger = ff.LossScale(scale=4096.0, good_steps=1)
    other = dataclasses.replace(ff.tree_map(torch.clone, pair[1]), loss_scale=larger)
    grad_fn = ff.value_and_grad(rt, lambda nets, x: nets[1](nets[0](x)).square().mean())

    def step(one, other, opts, x):
        _, grads = grad_fn((one, other), x)
        stepped = [
            ff.optimizer_step(rt, *three) for three in zip((one, other), opts, (grads[0], grads[1]), strict=True)
        ]
        return stepped, grads

    compiled = ff.compile_step(rt, step, backend=BACKEND)
    for number in range(3):
        x, _ = poisoned(number)
        stepped, grads = step(pair[0], other, opts, x)
        mine, my_grads = compiled(pair[0], other, opts, x)
        for left, right, one, two in zip(stepped, mine, grads, my_grads, strict=True):
            assert_same_scales(left, right)
            assert_close(left, right)
            assert one.loss_scale == two.loss_scale
        again = ff.optimizer_step(rt, other, opts[1], my_grads[1])
        assert again[0].loss_scale == mine[1][0].loss_scale, "gradients of a compiled step in an eager one"


def on_ranks_with_a_scale(rt, net, compile_it):
    model = ff.setup_model(rt, net)
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    step = make_step(rt, donate=True)
    step = ff.compile_step(rt, step, backend=FUNCTIONAL) if compile_it else step
    seen = []
    for number in range(5):
        x, y = poisoned(number) if rt.rank == 1 else make_batch(number)
        model, opt, _ = step(model, opt, x, y, 0.1)
        seen.append(model.loss_scale)
    return seen, tensors_of(model, opt)


def test_ranks_agree_about_an_overflow_on_one_of_them(threads):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    precision = dataclasses.replace(DOUBLE, loss_scale=GROWING)
    eager, mine = (
        threads.run(on_ranks_with_a_scale, net, compile_it, strategy="functional", precision=precision)
        for compile_it in (False, True)
    )
    for (seen, values), (my_seen, my_values) in zip(eager, mine, strict=True):
        assert seen == my_seen == eager[0][0] and len({one.scale for one in seen}) > 1
        for one, other in zip(values, my_values, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=ATOL)


def test_a_scale_that_cannot_fall_any_further_is_an_error():
    rt = scaled(ff.DynamicScale(init_scale=2.0, min_scale=1.0))
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    compiled = ff.compile_step(rt, make_step(rt, donate=True), backend=BACKEND)
    x, y = make_batch(0)
    x[0] = float("inf")
    model, opt, _ = compiled(model, opt, x, y, 0.1)
    assert model.loss_scale.scale == 1.0
    with pytest.raises(ff.GradientError, match="loss scale below 2"):
        compiled(model, opt, x, y, 0.1)
    with pytest.raises(ff.DonatedError):
        compiled(model, opt, x, y, 0.1)


def test_weights_that_sum_to_zero_are_an_error():
    rt = scaled(GROWING)
    model = ff.setup_model(rt, nn.Linear(4, 2))
    grad_fn = ff.value_and_grad(rt, lambda net, x, mask: ((net(x).sum(1) * mask).sum(), mask.sum()), weighted=True)
    compiled = ff.compile_step(rt, grad_fn, backend=BACKEND)
    x, _ = make_batch(0)
    mask = torch.ones(8, dtype=torch.float64)
    mask[0] = 0
    (loss, grads), (my_loss, my_grads) = grad_fn(model, x, mask), compiled(model, x, mask)
    torch.testing.assert_close(loss, my_loss, rtol=0, atol=ATOL)
    torch.testing.assert_close(grads.params["weight"], my_grads.params["weight"], rtol=0, atol=ATOL)
    with pytest.raises(ff.GradientError, match="sum to zero"):
        compiled(model, x, 0 * mask)


def test_a_state_that_the_first_step_makes_cannot_be_left_out():
    rt = scaled(GROWING)
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5)
    step = make_step(rt)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    with pytest.raises(ff.CapabilityError, match="first step of SGD"):
        compiled(model, opt, *make_batch(0), 0.1)
    model, opt, _ = step(model, opt, *make_batch(0), 0.1)
    assert_close(step(model, opt, *make_batch(1), 0.1)[:2], compiled(model, opt, *make_batch(1), 0.1)[:2])
