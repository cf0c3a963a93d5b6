"""`compile_step`: a compiled step means what the step means, up to rounding."""

import copy
import dataclasses
import gc
import inspect
import itertools
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fabricfn as ff
from fabricfn.optimizers.skipping import SMALL

BACKEND = "eager"
"""The graph as it was traced, run operation by operation."""
FUNCTIONAL = "aot_eager"
"""The graph in which changes in place are values, as inductor gets it."""
ATOL = 1e-12


def make_net():
    torch.manual_seed(0)
    # no bias before the normalisation: its gradient is 0 up to rounding, which Adam would make large
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def make_batch(seed, rows=8):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (4, 2))


@pytest.fixture
def rt():
    return ff.init_runtime(accelerator="cpu", devices=1, precision="64-true")


def mse(net, x, y):
    return F.mse_loss(net(x), y)


def make_step(rt, donate=False, loss_fn=mse):
    grad_fn = ff.value_and_grad(rt, loss_fn)

    def step(model, opt, x, y, lr, rng=None):
        loss, grads = grad_fn(model, x, y, rng=rng)
        grads, norm = ff.clip_gradients(rt, grads, max_norm=0.5)
        model, opt = ff.optimizer_step(rt, model, opt, grads, lr=lr, donate=donate)
        return model, opt, {"loss": loss, "norm": norm, "step": opt.step}

    return step


def tensors_of(*records):
    found = []
    for record in records:
        if isinstance(record, ff.Optimizer):
            found += [value for row in record.state.values() for value in row.values()]
        else:
            found += [*record.params.values(), *record.buffers.values()]
    return found


def assert_close(left, right):
    left, right = tensors_of(*left), tensors_of(*right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ATOL)


def copies(*records):
    return [ff.tree_map(torch.clone, record) for record in records]


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AMSGrad": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "SGD": (torch.optim.SGD, {}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "dampened": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
}


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


@pytest.fixture(scope="module")
def threads():
    with ff.testing.threads(2) as world:
        yield world


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


def assert_others_are_found_out(rt, compiled, model, opt, *batch):
    """Records over the same memory as those that a step gives away."""
    other, other_opt = ff.tree_map(lambda value: value, (model, opt))
    model, opt, *_ = compiled(model, opt, *batch)
    with pytest.raises(ff.DonatedError, match="shares tensors"):
        ff.apply(rt, other, batch[0])
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).sum())(model, batch[0])
    with pytest.raises(ff.DonatedError, match="shares tensors"):
        ff.optimizer_step(rt, model, other_opt, grads)
    ff.optimizer_step(rt, model, opt, grads)


def test_a_long_compilation_is_told_once(rt, capsys, monkeypatch):
    monkeypatch.setattr("fabricfn.compiling.step.SHOWN", 0.0)
    model = ff.setup_model(rt, make_net())
    compiled = ff.compile_step(rt, lambda model, x: ff.apply(rt, model, x), backend=BACKEND)
    for _ in range(2):
        compiled(model, next(make_batch(0)))
    told = capsys.readouterr()
    assert re.fullmatch(r"fabricfn: CompiledStep\(<lambda>, 1 graph, \d+\.\d s of compiling\)\n", told.err)
    assert not told.out


def test_numbers_that_change_are_not_traced_again(rt):
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1, groups={"*.bias": {"weight_decay": 0.0}})
    grad_fn = ff.value_and_grad(rt, mse)

    def step(model, opt, x, y, betas):
        loss, grads = grad_fn(ff.eval_mode(model), x, y)
        return ff.optimizer_step(rt, model, opt, grads, betas=(betas, 0.99), donate=True)

    inner = ff.compile_step(rt, step, backend=BACKEND)
    compiled = ff.compile_step(rt, inner, backend=BACKEND)
    eager, mine = copies(model, opt), copies(model, opt)
    for number in range(4):
        batch = [*make_batch(number)]
        rate = (float, np.float64)[number % 2](0.1 / (number + 1))
        eager, mine = (
            (one, dataclasses.replace(opt, hyperparams=tuple({**group, "lr": rate} for group in opt.hyperparams)))
            for one, opt in (eager, mine)
        )
        eager, mine = step(*eager, *batch, 0.9 - rate), compiled(*mine, *batch, 0.9 - rate)
        assert_close(eager, mine)
        assert mine[1].hyperparams == eager[1].hyperparams
        assert mine[1].hyperparams[0]["lr"] == rate
    assert (compiled.traces, inner.traces) == (1, 0), "a step within a step is a part of it"


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


def test_what_is_given_away_is_spent_and_what_is_not_keeps_its_bits(rt):
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    x, y = make_batch(0)
    kept = copy.deepcopy(tensors_of(model, opt))
    pure = ff.compile_step(rt, make_step(rt), backend=BACKEND)
    first, again = (pure(model, opt, x, y, 0.1, ff.key(0)) for _ in range(2))
    for one, other in zip(kept, tensors_of(model, opt), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(tensors_of(*first[:2]), tensors_of(*again[:2]), strict=True):
        assert torch.equal(one, other)
    donating = ff.compile_step(rt, make_step(rt, donate=True), backend=BACKEND)
    after, next_opt, _ = donating(model, opt, x, y, 0.1, ff.key(0))
    line = inspect.currentframe().f_lineno - 1
    assert all(after.params[name] is value for name, value in model.params.items()), "updated in place"
    assert_close(first[:2], (after, next_opt))
    for spoilt in ((model, next_opt), (after, opt)):
        with pytest.raises(ff.DonatedError, match=rf"test_compiling\.py:{line}"):
            donating(*spoilt, x, y, 0.1, ff.key(0))
    with pytest.raises(ff.DonatedError):
        ff.optimizer_step(rt, after, opt, ff.value_and_grad(rt, mse)(after, x, y)[1])


@pytest.mark.parametrize("backend", [BACKEND, FUNCTIONAL])
def test_other_records_over_what_is_given_away_are_found_out(rt, backend):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    compiled = ff.compile_step(rt, make_step(rt, donate=True), backend=backend)
    for _ in range(2):
        assert_others_are_found_out(rt, compiled, *copies(model, opt), *make_batch(0), 0.1)


def test_an_older_graph_over_donated_values_fails_in_backward(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    x, y = make_batch(0)
    wanted = ff.apply(rt, model, x.requires_grad_()).square().sum()
    ff.compile_step(rt, make_step(rt, donate=True), backend=BACKEND)(model, opt, x.detach(), y, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        wanted.backward()


def test_memory_of_two_arguments_is_not_given_away(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    x, _ = make_batch(0)
    grad_fn = ff.value_and_grad(rt, lambda net, other, x: net(x).square().mean() + other(x).mean())

    def step(model, opt, ema, x):
        _, grads = grad_fn(model, ema, x)
        return *ff.optimizer_step(rt, model, opt, grads, donate=True), ema

    compiled = ff.compile_step(rt, step, backend=BACKEND)
    with pytest.raises(ff.ModelError, match="model and ema"):
        compiled(model, opt, model, x)
    ema = ff.map_params(torch.clone, model)
    model, opt, ema = compiled(model, opt, ema, x)
    with pytest.raises(ff.ModelError, match="model and x"):
        compiled(model, opt, ema, model.params["weight"])
    compiled(model, opt, ema, x)


def test_a_step_that_fails_loses_what_it_was_given(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    x, y = make_batch(0)

    def failing(graph, examples):
        def run(*inputs):
            raise RuntimeError("out of memory")

        return run

    with pytest.raises(RuntimeError, match="out of memory"):
        ff.compile_step(rt, make_step(rt, donate=True), backend=failing)(model, opt, x, y, 0.1)
    with pytest.raises(ff.DonatedError):
        ff.apply(rt, model, x)


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


def test_another_state_in_an_optimizer_is_seen(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.Adagrad, lr=0.1)
    step = make_step(rt)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    x, y = make_batch(0)
    for state in (opt, dataclasses.replace(opt, store=ff.tree_map(torch.ones_like, opt).store)):
        assert_close(step(model, state, x, y, 0.1)[:2], compiled(model, state, x, y, 0.1)[:2])


@pytest.mark.parametrize("made", ["arithmetic", "torch", "lambda"])
def test_a_step_computes_with_the_count_of_steps(rt, made):
    lr_scheduler = torch.optim.lr_scheduler
    options = {"max_lr": 0.1, "total_steps": 8} if made == "torch" else {"lr_lambda": lambda step: min(1.0, step / 3)}
    schedule = ff.schedule_from_torch(
        lr_scheduler.OneCycleLR if made == "torch" else lr_scheduler.LambdaLR, 0.1, **options
    )
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1, groups={"*.bias": {"weight_decay": 0.0}})
    grad_fn = ff.value_and_grad(rt, lambda net, x, y, weight: mse(net, x, y) * weight)
    outside = ff.key(3)

    def step(model, opt, x, y, key):
        count = -(2 * (opt.step + 1) % 7 // 1 - 3)
        key, other = ff.fold_in(key, opt.step), ff.fold_in(outside, 1 + opt.step)
        _, grads = grad_fn(model, x, y, 1 / (1 + opt.step), rng=key)
        loss, more = grad_fn(model, x, y, torch.clamp(x[0, 0].abs(), max=opt.step + 0.5) ** opt.step, rng=other)
        grads = ff.tree_map(torch.add, grads, more)
        rates = {"lr": [0.1 * 0.5**opt.step, 0.1]} if made == "arithmetic" else schedule(opt.step)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True, **rates)
        return model, opt, loss, x.long() * opt.step, {"count": count, "key": key, "step": opt.step, **rates}

    compiled = ff.compile_step(rt, step, backend=BACKEND)
    eager, mine = copies(model, opt), copies(model, opt)
    for number in range(5):
        batch = [*make_batch(number)]
        *eager, loss, integers, told = step(*eager, *batch, ff.key(1))
        *mine, my_loss, my_integers, mine_told = compiled(*mine, *batch, ff.key(1))
        assert_close(eager, mine)
        torch.testing.assert_close(loss, my_loss, rtol=0, atol=ATOL)
        torch.testing.assert_close(integers, my_integers)
        assert mine_told == told and told["step"] == number + 1
    assert compiled.traces == 1


def test_a_whole_number_that_becomes_a_fraction_is_an_error(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).mean())

    def step(model, opt, x):
        model, opt = ff.optimizer_step(rt, model, opt, grad_fn(model, x)[1], lr=1)
        return model, opt, x * 2 ** (2 - opt.step), x * 2.0 ** (2 - opt.step)

    compiled = ff.compile_step(rt, step, backend=BACKEND)
    x, _ = make_batch(0)
    for factor in (2, 1):
        model, opt, *found = compiled(model, opt, x)
        assert all(torch.equal(one, factor * x) for one in found)
    with pytest.raises(ff.CapabilityError, match=r"is 0\.5 now, and was an int"):
        compiled(model, opt, x)


def test_random_operations_draw_the_same_numbers(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)

    def noisy(net, x, y):
        x = x + torch.randn_like(x) + torch.rand(4, dtype=torch.float64)
        keep = torch.empty(8, 1, dtype=torch.float64).bernoulli_(0.5) + torch.randint(3, (8, 1))
        return F.mse_loss(F.dropout(net(x)) * keep, y) + torch.native_dropout(x, 0.5, True)[0].sum()

    step = make_step(rt, loss_fn=noisy)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    for rng in (None, ff.key(1), ff.key(2)):
        batch = [*make_batch(0)]
        torch.manual_seed(0)
        expected = step(model, opt, *batch, 0.1, rng)
        after = torch.rand(1)
        torch.manual_seed(0)
        found = compiled(model, opt, *batch, 0.1, rng)
        assert_close(expected[:2], found[:2])
        assert torch.equal(after, torch.rand(1)), "the global generator is where the eager step leaves it"
    assert compiled.traces == 2, "one without a key, one with one"


@pytest.mark.parametrize("reentrant", [False, None])
def test_what_is_recomputed_meets_the_same_masks(rt, reentrant):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    model = ff.setup_model(rt, net, activation_checkpointing=nn.Linear if reentrant is None else None)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)

    def loss_fn(net, x, y):
        return mse(net, x, y) + checkpoint(lambda x: F.dropout(net(x)), x, use_reentrant=False).square().mean()

    step = make_step(rt, loss_fn=loss_fn)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    for number in range(2):
        batch = [*make_batch(number)]
        expected = step(model, opt, *batch, 0.1, ff.key(number))
        assert_close(expected[:2], compiled(model, opt, *batch, 0.1, ff.key(number))[:2])


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


def test_an_autocast_around_the_call_is_another_graph(rt):
    model = ff.setup_model(ff.init_runtime(accelerator="cpu", devices=1), nn.Linear(4, 2))
    compiled = ff.compile_step(rt, lambda model, x: ff.apply(rt, model, x) @ x[:2], backend=FUNCTIONAL)
    x = next(make_batch(0)).float()
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, found = ff.apply(rt, model, x) @ x[:2], compiled(model, x)
        assert expected.dtype == found.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert compiled.traces == 2


def test_other_shapes_and_constants_are_traced_once_each(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x, y, kind: mse(net, x, y) if kind == "mse" else net(x).abs().mean())

    def step(model, opt, batch, kind):
        loss, grads = grad_fn(model, *batch, kind)
        return *ff.optimizer_step(rt, model, opt, grads), loss

    compiled = ff.compile_step(rt, step, backend=BACKEND, limit=2)
    for rows, kind in ((8, "mse"), (3, "mse"), (8, "mse"), (3, "mse")):
        batch = tuple(make_batch(0, rows))
        torch.testing.assert_close(
            compiled(model, opt, batch, kind)[2], step(model, opt, batch, kind)[2], rtol=0, atol=ATOL
        )
    assert compiled.traces == 2
    batch = tuple(make_batch(0, 5))
    with pytest.warns(
        UserWarning, match=r"batch/0: float64 \(3, 4\).* -> float64 \(5, 4\).*batch/1.*kind: 'mse' -> 'l1'"
    ):
        loss = compiled(model, opt, batch, "l1")[2]
    torch.testing.assert_close(loss, step(model, opt, batch, "l1")[2], rtol=0, atol=ATOL)


def test_another_module_behind_an_equal_model_is_another_graph(rt):
    one, other = (ff.setup_model(rt, nn.Sequential(nn.Linear(4, 2), act)) for act in (nn.ReLU(), nn.Tanh()))
    compiled = ff.compile_step(rt, lambda model, x: ff.apply(rt, model, x), backend=BACKEND)
    x, _ = make_batch(0)
    for model in (one, other, ff.eval_mode(one)):
        torch.testing.assert_close(compiled(model, x), ff.apply(rt, model, x), rtol=0, atol=ATOL)
    assert compiled.traces == 3


# the loss scale

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


# what a compiled step refuses


def line_of(text):
    """The number of the line in this file that holds the text."""
    lines = inspect.getsource(inspect.getmodule(line_of)).splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def by_branch(net, x):
    loss = net(x).mean()
    if loss > 0:  # a question to a tensor
        loss = -loss
    return loss


def by_item(net, x):
    return net(x).mean() * net(x).mean().item()  # a number of a tensor


def by_mask(net, x):
    out = net(x)
    return out[out > 0].mean()  # a shape that depends on numbers


def by_numpy(net, x):
    return net(x).mean() + float(x.numpy().sum())  # the memory of a tensor


@pytest.mark.parametrize("loss_fn", [by_branch, by_item, by_mask, by_numpy])
def test_a_look_at_numbers_names_the_line(rt, loss_fn):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    grad_fn = ff.value_and_grad(rt, loss_fn)
    compiled = ff.compile_step(rt, grad_fn, backend=BACKEND)
    marks = {by_branch: "a question to", by_item: "a number of", by_mask: "a shape that", by_numpy: "the memory of"}
    number = line_of(f"# {marks[loss_fn]}")
    x, _ = make_batch(0)
    with pytest.raises(ff.CapabilityError, match=rf"test_compiling\.py:{number}:.*(?s:.*)torch\.where"):
        compiled(model, x)
    assert compiled.traces == 0
    grad_fn(model, x)  # nothing is left broken


@pytest.mark.parametrize("case", ["model", "key", "schedule", "fold", "multinomial", "optimizer"])
def test_what_a_graph_would_keep_for_ever_is_refused(rt, case):
    model, other = (ff.setup_model(rt, nn.Linear(4, 2)) for _ in range(2))
    optimizer = torch.optim.RMSprop if case == "optimizer" else torch.optim.SGD
    opt = ff.setup_optimizer(rt, model, optimizer, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())

    def step(model, opt, x, rng):
        key = {"key": ff.key(1), "fold": ff.fold_in(rng, x.sum()) if case == "fold" else rng}.get(case, rng)
        _, grads = grad_fn(other if case == "model" else model, x, rng=key)
        if case == "multinomial":
            x.abs().multinomial(2)
        rate = 0.1 * min(1, opt.step / 10) if case == "schedule" else 0.1
        return ff.optimizer_step(rt, model, opt, grads, lr=rate)

    words = {
        "model": r"takes its models as arguments",
        "key": r"takes its random key as an argument",
        "schedule": r"lr=schedule\(opt.step\).*LambdaLR",
        "fold": r"opt.step into a key, found a tensor",
        "multinomial": r"torch.rand_like",
        "optimizer": r"RMSprop cannot be compiled.*return the gradients",
    }
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    x, _ = make_batch(0)
    with pytest.raises(ff.CapabilityError, match=words[case]) as caught:
        compiled(model, opt, x, ff.key(0))
    if case != "optimizer":
        assert re.search(
            r"while compile_step traced your step, at\n.*test_compiling\.py:\d+", "".join(caught.value.__notes__)
        )


def refused_on_ranks(rt, net):
    model = ff.setup_model(rt, net)
    x, _ = make_batch(rt.rank)

    def step(model, x):
        return ff.all_reduce(rt, ff.apply(rt, model, x).mean())

    with pytest.raises(ff.CapabilityError, match="messages of its own"):
        ff.compile_step(rt, step, backend=BACKEND)(model, x)


def test_collectives_of_the_users_own_are_refused(threads):
    threads.run(refused_on_ranks, nn.Linear(4, 2), strategy="functional", precision="64-true")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_other_strategies_are_refused_before_anything_runs(strategy):
    rt = ff.init_runtime(accelerator="cpu", devices=1, strategy=strategy)
    with pytest.raises(ff.CapabilityError, match=r"compile=True"):
        ff.compile_step(rt, lambda model: model)


def test_the_canonical_reduction_is_refused(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    grad_fn = ff.accumulate(rt, lambda net, x: net(x).mean(), reduce="canonical")
    with pytest.raises(ff.CapabilityError, match="promises bits"):
        ff.compile_step(rt, grad_fn, backend=BACKEND)(model, [next(make_batch(0))])


def test_errors_of_the_step_itself_come_through(rt):
    def step(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        ff.compile_step(rt, step, backend=BACKEND)(torch.ones(2))
    with pytest.raises(ff.CapabilityError, match="set"):
        ff.compile_step(rt, lambda x: x, backend=BACKEND)({1, 2})


def test_nothing_of_the_arguments_and_results_is_kept(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
    model, opt = copies(model, opt)  # the engine of a new model looks at its first values
    compiled = ff.compile_step(rt, make_step(rt), backend=BACKEND)
    x, y = make_batch(0)
    result = compiled(model, opt, x, y, 0.1, ff.key(0))
    gone = [weakref.ref(one) for one in (x, y, *tensors_of(model, opt), *tensors_of(*result[:2]))]
    del model, opt, x, y, result
    gc.collect()
    assert [ref for ref in gone if ref() is not None] == []
