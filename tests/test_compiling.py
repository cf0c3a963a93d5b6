"""`compile_step`: a compiled step means what the step means, up to rounding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from tests.support.compiled import (
    ATOL,
    BACKEND,
    FUNCTIONAL,
    OPTIMIZERS,
    assert_close,
    assert_others_are_found_out,
    copies,
    make_batch,
    make_net,
    make_step,
    mse,
    one_rank_in_float64,
    tensors_of,
)
from tests.support.worlds import world_of

rt = one_rank_in_float64()
threads = world_of("threads", 2)


@pytest.mark.parametrize(
    ("name", "donate"), [("AdamW", False), ("Nesterov", False), *((name, True) for name in OPTIMIZERS)]
)
def test_a_compiled_step_is_the_eager_step(rt, name, donate):
    cls, options = OPTIMIZERS[name]
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, cls, lr=0.1, **options)
    eager, mine = copies(model, opt), copies(model, opt)
    step = make_step(rt, donate)
    compiled = ff.compile_step(rt, step, backend=FUNCTIONAL if name in ("AdamW", "Nesterov") else BACKEND)
    for number in range(5):
        batch = [*make_batch(number)]
        changing = {"lr": 0.1 / (number + 1), "rng": ff.fold_in(ff.key(1), number)}
        *eager, told = step(*eager, *batch, **changing)
        *mine, mine_told = compiled(*mine, *batch, **changing)
        assert_close(eager, mine)
        assert mine_told["step"] == told["step"] == mine[1].step == number + 1
        for key in ("loss", "norm"):
            torch.testing.assert_close(told[key], mine_told[key], rtol=0, atol=ATOL)
    # a momentum that does not begin with zeros is there after the first step only
    assert compiled.traces == (2 if name == "dampened" else 1)
    assert mine[1].hyperparams == eager[1].hyperparams


def uneven(net, x, y):
    rows = len(x)
    return F.mse_loss(net(x), y, reduction="sum") / 2, rows


def run_on_ranks(rt, net, data, weighted):
    """Each rank has its rows of the whole batch; under `weighted` rank 0 has more, in micro-batches."""
    grad_fn = ff.accumulate(rt, uneven, weighted=True) if weighted else ff.value_and_grad(rt, mse, buffers="mean")

    def step(model, opt, batch):
        loss, grads = grad_fn(model, batch) if weighted else grad_fn(model, *batch)
        grads, _ = ff.clip_gradients(rt, grads, max_norm=0.5)
        return *ff.optimizer_step(rt, model, opt, grads, donate=True), loss

    model = ff.setup_model(rt, net)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9)
    step = ff.compile_step(rt, step, backend=FUNCTIONAL)
    cut = 5 if weighted else 4
    rows = slice(0, 8) if rt.world_size == 1 else slice(0, cut) if rt.rank == 0 else slice(cut, 8)
    for x, y in data:
        mine = (x[rows], y[rows])
        parts = [tuple(pair) for pair in zip(*(one.tensor_split(2) for one in mine), strict=True)]
        model, opt, loss = step(model, opt, parts if weighted else mine)
    return [*model.params.values()], loss if weighted else None


@pytest.mark.parametrize("weighted", [False, True])
def test_functional_on_two_ranks_is_single_on_the_whole_batch(threads, weighted):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    data = [tuple(make_batch(number)) for number in range(3)]

    def on(size, strategy):
        return threads.run(run_on_ranks, net, data, weighted, world_size=size, strategy=strategy, precision="64-true")

    (whole,), both = on(1, "single"), on(2, "functional")
    for mine in both:
        for one, other in zip(whole[0], mine[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=ATOL)
        if weighted:
            torch.testing.assert_close(whole[1], mine[1], rtol=0, atol=ATOL)


def test_inductor_compiles_it(rt):
    """The default back end, on a step that is tiny: a C++ compiler takes seconds."""
    model = ff.setup_model(rt, nn.Linear(2, 1))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    eager, mine = copies(model, opt), copies(model, opt)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())

    def step(model, opt, x):
        loss, grads = grad_fn(model, x)
        return *ff.optimizer_step(rt, model, opt, grads, donate=True), loss

    compiled = ff.compile_step(rt, step)
    for number in range(3):
        x = torch.full((4, 2), number + 1.0, dtype=torch.float64)
        *eager, loss = step(*eager, x)
        *mine, my_loss = compiled(*mine, x)
        assert_close(eager, mine)
        torch.testing.assert_close(loss, my_loss, rtol=0, atol=ATOL)
    assert compiled.traces == 1 and compiled.seconds > 0 and "1 graph," in repr(compiled)
    assert_others_are_found_out(rt, compiled, *mine, x)


def test_results_go_into_eager_functions_and_theirs_go_in(rt, tmp_path):
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    step = make_step(rt, donate=True)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    eager, mixed = copies(model, opt), copies(model, opt)
    for number in range(6):
        batch = [*make_batch(number)]
        changing = {"lr": 0.1, "rng": ff.fold_in(ff.key(2), number)}
        *eager, _ = step(*eager, *batch, **changing)
        *mixed, _ = (step if number % 2 else compiled)(*mixed, *batch, **changing)
        assert_close(eager, mixed)
        if number == 2:
            ff.save(rt, tmp_path / "c", {"model": mixed[0], "opt": mixed[1]})
            loaded = ff.load(rt, tmp_path / "c", {"model": model, "opt": opt})
            mixed = [loaded["model"], loaded["opt"]]
    assert compiled.traces == 1
    before = mixed[0]
    x, y = make_batch(0)
    expected = ff.apply(rt, ff.eval_mode(before), x)
    compiled(*mixed, x, y, 0.1, ff.key(0))
    assert expected.shape == (8, 2)
    with pytest.raises(ff.DonatedError, match="given away"):
        ff.apply(rt, before, x)


def test_several_models_optimizers_constants_and_averages(rt):
    """A GAN-like step: two models, two optimizers, a tree of models, a moving average, a frozen teacher, gradients."""
    torch.manual_seed(0)
    nets = {"a": nn.Linear(4, 4, bias=False), "b": nn.Sequential(nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2))}
    pair = {name: ff.setup_model(rt, net) for name, net in nets.items()}
    critic, teacher = (ff.setup_model(rt, nn.Linear(2, 1)) for _ in range(2))
    opt = ff.setup_optimizer(rt, pair, torch.optim.AdamW, lr=0.01)
    critic_opt = ff.setup_optimizer(rt, critic, torch.optim.SGD, lr=0.1)

    def pair_loss(nets, critic, teacher, x):
        out = nets["b"](nets["a"](x))
        return (critic(out) - teacher(out)).square().mean(), out

    grad_pair = ff.value_and_grad(rt, pair_loss, has_aux=True)
    grad_critic = ff.accumulate(rt, lambda net, out: net(out).square().mean())

    def step(state, batch):
        (loss, out), grads = grad_pair(state["pair"], state["critic"], state["teacher"], batch["x"])
        pair, opt = ff.optimizer_step(rt, state["pair"], state["opt"], grads, donate=True)
        _, grads_critic = grad_critic(state["critic"], [(half,) for half in out.tensor_split(2)])
        critic, critic_opt = ff.optimizer_step(rt, state["critic"], state["critic_opt"], grads_critic)
        ema = ff.map_params(lambda old, new: 0.9 * old + 0.1 * new, state["ema"], pair["b"])
        state = {**state, "pair": pair, "opt": opt, "critic": critic, "critic_opt": critic_opt, "ema": ema}
        return state, {"loss": loss, "out": out, "grads": grads_critic, "name": batch["name"], "none": None}

    def state_of():
        copied = ff.tree_map(torch.clone, {"pair": pair, "opt": opt, "critic": critic, "critic_opt": critic_opt})
        return {**copied, "teacher": teacher, "ema": ff.map_params(torch.clone, pair["b"])}

    compiled = ff.compile_step(rt, step, backend=FUNCTIONAL)
    eager, mine = state_of(), state_of()
    for number in range(3):
        batch = {"x": next(make_batch(number)), "name": "x"}
        (eager, told), (mine, mine_told) = step(eager, batch), compiled(mine, batch)
        for key in ("critic", "ema", "critic_opt"):
            assert_close([eager[key]], [mine[key]])
        for name in pair:
            assert_close([eager["pair"][name]], [mine["pair"][name]])
        assert mine["teacher"] is teacher
        torch.testing.assert_close(told["out"], mine_told["out"], rtol=0, atol=ATOL)
        torch.testing.assert_close(
            told["grads"].params["weight"], mine_told["grads"].params["weight"], rtol=0, atol=ATOL
        )
        assert mine_told["name"] == "x" and mine_told["none"] is None
    assert compiled.traces == 1
    ff.optimizer_step(rt, mine["critic"], mine["critic_opt"], mine_told["grads"])


def test_an_init_update_pair(rt):
    def init(params):
        return {name: torch.zeros_like(value) for name, value in params.items()}

    def update(grads, state, params, scale=1.0):
        state = {name: 0.9 * state[name] + grad for name, grad in grads.items()}
        return {name: -0.1 * scale * value for name, value in state.items()}, state

    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, (init, update))
    grad_fn = ff.value_and_grad(rt, mse)

    def step(model, opt, x, y):
        _, grads = grad_fn(model, x, y, rng=None)
        return ff.optimizer_step(rt, ff.eval_mode(model), opt, grads, scale=0.5, donate=True)

    compiled = ff.compile_step(rt, step, backend=BACKEND)
    eager, mine = copies(ff.eval_mode(model), opt), copies(ff.eval_mode(model), opt)
    for number in range(3):
        batch = [*make_batch(number)]
        eager, mine = step(*eager, *batch), compiled(*mine, *batch)
        assert_close([eager[0]], [mine[0]])
    assert compiled.traces == 1


def test_gradients_in_one_memory_are_clipped_once(rt):
    net = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in "ab"})
    model = ff.setup_model(rt, net)
    grad_fn = ff.value_and_grad(rt, lambda net, x: ((net["a"].unsqueeze(0) + net["b"].unsqueeze(0)) * x).square().sum())

    def step(model, x):
        _, grads = grad_fn(model, x)
        return ff.clip_gradients(rt, grads, max_norm=0.5, donate=True)[0]

    x = torch.arange(3, dtype=torch.float64)
    found = ff.compile_step(rt, step, backend=FUNCTIONAL)(model, x)
    for name, expected in step(model, x).params.items():
        torch.testing.assert_close(found.params[name], expected, rtol=0, atol=ATOL)


def test_bf16_mixed_computes_in_bfloat16():
    rt = ff.init_runtime(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    dtypes = []

    def loss_fn(net, x, y):
        out = net(x)
        dtypes.append(out.dtype)
        return F.mse_loss(out.float(), y)

    step = make_step(rt, loss_fn=loss_fn)
    batch = [one.float() for one in make_batch(0)]
    expected = step(model, opt, *batch, 0.1)
    found = ff.compile_step(rt, step, backend=FUNCTIONAL)(model, opt, *batch, 0.1)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(expected[2]["loss"], found[2]["loss"], rtol=1e-6, atol=0)
    for one, other in zip(tensors_of(expected[0]), tensors_of(found[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
