"""The strategy pipeline and the schedules that go through its stages, against one process that accumulates."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import testing
from fabricfn.sharding import local_of
from fabricfn.testing import cases
from tests.worlds import world_of

VOCAB, WIDTH, TIME, ROWS = 11, 6, 5, 16


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(TIME, TIME)
        self.up, self.down, self.drop = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.drop(self.mix(x.transpose(1, 2)).transpose(1, 2))
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """A small language model: the user's code knows nothing of stages."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.zeros(TIME, WIDTH))
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(6)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def begin(self, tokens):
        return self.embed(tokens) + self.pos

    def forward(self, tokens):
        x = self.begin(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


FIRST = (["embed", "pos"], Net.begin)
BLOCKS = [f"blocks.{i}" for i in range(6)]
TWO = [
    (["embed", "pos", "blocks.0"], lambda net, tokens: net.blocks[0](net.begin(tokens))),
    [*BLOCKS[1:], "norm", "head"],
]
FOUR = [FIRST, BLOCKS[:1], BLOCKS[1:4], [*BLOCKS[4:], "norm", "head"]]
EIGHT = [FIRST, *([block] for block in BLOCKS), ["norm", "head"]]

NET, DROPPED = cases.initialised(Net(), 3), cases.initialised(Net(0.3), 3)  # not in the ranks: one generator a process
TOKENS = torch.randint(VOCAB, (ROWS, TIME + 1), generator=torch.Generator().manual_seed(5))
INPUTS, TARGET = TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()


def cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def whole_loss(net, tokens, target):
    return cross_entropy(net(tokens), target)


ranks = world_of("processes", 4)


def run(ranks, fn, *args, stages, world_size, precision="64-true", **options):
    strategy = ff.strategies.pipeline(stages, **options)
    return ranks.run(fn, *args, strategy=strategy, world_size=world_size, precision=precision)


def alone(fn, *args, strategy="single", precision="64-true"):
    with testing.threads(1) as one:
        return one.run(fn, *args, strategy=strategy, precision=precision)[0]


def mine(rt, tensor):
    return tensor.chunk(rt.world_size)[rt.rank]


def steps(rt, grad_fn, *batch, net=NET, num=3, donate=True, start=None):
    """A few clipped steps of SGD: (losses, norms, parameters)."""
    model = ff.setup_model(rt, copy.deepcopy(net))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.3, momentum=0.9)
    if start is not None:
        loaded = ff.load(rt, start, {"model": model, "opt": opt}, donate=True)
        model, opt = loaded["model"], loaded["opt"]
    seen = []
    for _ in range(num):
        loss, grads = grad_fn(model, *batch)
        grads, norm = ff.clip_gradients(rt, grads, max_norm=0.5, donate=donate)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)
        seen.append((loss, norm))
    return seen, ff.gather_params(rt, model), model, opt


def train(rt, schedule, num_microbatches, donate=True):
    grad_fn = ff.pipeline_value_and_grad(rt, cross_entropy, num_microbatches=num_microbatches, schedule=schedule)
    seen, params, model, _ = steps(rt, grad_fn, mine(rt, INPUTS), mine(rt, TARGET), donate=donate)
    held = sum(local_of(value).numel() for value in model.params.values())
    assert held == sum(slot.numel() for slot in model.ref.engine.frames[0].slots if not slot.is_meta)
    return [(loss.item(), norm.item()) for loss, norm in seen], params, held


def train_single(rt):
    return steps(rt, ff.value_and_grad(rt, whole_loss), INPUTS, TARGET)[:2]


CASES = {
    "gpipe, uneven stages": ("gpipe", 4, TWO, 2),
    "1f1b": ("1f1b", 8, TWO, 2),
    "two stages a rank": ("interleaved_1f1b", 4, FOUR, 2),
    "four stages": ("1f1b", 4, FOUR, 4),
    "eight stages on four ranks": ("interleaved_1f1b", 8, EIGHT, 4),
    "two pipelines of two": ("1f1b", 4, TWO, 4),
    "pipelines of one rank": ("gpipe", 2, TWO, 2, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equivalence(ranks, case):
    """The loop of `single` on the whole batch: losses, norms and parameters within 1e-11."""
    schedule, num_microbatches, stages, world_size, *size = case
    expected, wanted = alone(train_single)
    size = size[0] if size else min(world_size, len(stages))
    options = {"stages": stages, "world_size": world_size, "pipeline_parallel": size}
    results = run(ranks, train, schedule, num_microbatches, **options)
    for row, (loss, norm) in enumerate(expected):
        losses = [seen[row][0] for seen, _, _ in results]
        assert sum(losses) / len(losses) == pytest.approx(loss.item(), abs=1e-11)
        assert [seen[row][1] for seen, _, _ in results] == pytest.approx([norm.item()] * world_size, abs=1e-11)
    for _, params, _ in results:
        assert (text := testing.difference(params, wanted, 1e-11)) is None, text
    assert sum(held for *_, held in results) == world_size // size * sum(value.numel() for value in wanted.values())


def test_pure_and_donated_steps_have_the_same_bits(ranks):
    pure = run(ranks, train, "interleaved_1f1b", 4, False, stages=FOUR, world_size=2)
    donated = run(ranks, train, "interleaved_1f1b", 4, stages=FOUR, world_size=2)
    assert pure[1][0] == donated[1][0]
    assert testing.difference(pure[0][1], donated[0][1], 0.0) is None


def dropped(rt, schedule, seed):
    grad_fn = ff.pipeline_value_and_grad(rt, cross_entropy, num_microbatches=4, schedule=schedule)
    model = ff.setup_model(rt, copy.deepcopy(DROPPED))
    loss, grads = grad_fn(model, INPUTS, TARGET, rng=ff.key(seed))
    return loss, ff.gather_params(rt, dataclasses.replace(model, params=grads.params))


def test_dropout_draws_the_same_bits_on_any_number_of_ranks(ranks):
    loss, grads = run(ranks, dropped, "1f1b", 1, stages=FOUR, world_size=1)[0]
    for world_size, schedule in ((2, "interleaved_1f1b"), (4, "1f1b"), (4, "gpipe")):
        for found in run(ranks, dropped, schedule, 1, stages=FOUR, world_size=world_size):
            assert torch.equal(found[0], loss)
            assert testing.difference(found[1], grads, 0.0) is None
    assert not torch.equal(run(ranks, dropped, "1f1b", 2, stages=FOUR, world_size=1)[0][0], loss)


def test_every_stage_and_micro_batch_draws_its_own_numbers():
    def share(rt):
        model = ff.setup_model(rt, nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)))
        value_fn = ff.pipeline_value(
            rt, lambda output, target: (output.sum(), output != 0), num_microbatches=2, has_aux=True
        )
        _, aux = value_fn(model, torch.ones(2, 4000), torch.zeros(2), rng=ff.key(3))
        return [kept.double().mean().item() for kept in aux], torch.equal(*aux)

    kept, alike = alone(share, strategy=ff.strategies.pipeline([["0"], ["1"]]))
    assert kept == pytest.approx([0.25, 0.25], abs=0.03) and not alike


def go_on(rt, schedule, path, start):
    grad_fn = ff.pipeline_value_and_grad(rt, cross_entropy, num_microbatches=4, schedule=schedule)
    batch = mine(rt, INPUTS), mine(rt, TARGET)
    _, params, model, opt = steps(rt, grad_fn, *batch, start=start)
    ff.save(rt, path, {"model": model, "opt": opt})
    return params


def come_and_go(rt, start, path):
    """What a checkpoint holds, and the same saved again."""
    model = ff.setup_model(rt, cases.initialised(Net(), 8))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9)
    loaded = ff.load(rt, start, {"model": model, "opt": opt})
    ff.save(rt, path, loaded)
    state = {name: slots["momentum_buffer"] for name, slots in loaded["opt"].state.items()}
    return dict(loaded["model"].params), state


def test_checkpoints_go_to_single_and_back_bit_for_bit(ranks, tmp_path):
    first, back = tmp_path / "first", tmp_path / "back"
    params = run(ranks, go_on, "1f1b", first, None, stages=TWO, world_size=4)[0]
    held, state = alone(come_and_go, first, back)
    assert testing.difference(held, params, 0.0) is None
    assert any(value.abs().sum() > 0 for value in state.values())
    ends = [
        run(ranks, go_on, "interleaved_1f1b", tmp_path / "end", start, stages=FOUR, world_size=2)[0]
        for start in (first, back)
    ]
    assert testing.difference(ends[0], ends[1], 0.0) is None
    assert testing.difference(ends[0], params, 1e-3) is not None


class Counting(nn.Module):
    """Stages that change buffers, pass several tensors on (one is not contiguous), and return a tree at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.second, self.late = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.left, self.right = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def begin(self, x, shift):
        return self.bn(self.first(x + shift)).T, x.sum(1, keepdim=True), torch.arange(len(x), device=x.device)

    def end(self, h, total, index):
        scale = self.left.unsqueeze(0) + self.right.unsqueeze(0)  # autograd gives both views of one gradient
        return {"y": self.late(self.second(h.T)) * scale + total, "index": index}

    def forward(self, x, shift):
        return self.end(*self.begin(x, shift))


COUNTING = [(["first", "bn"], Counting.begin), (["second", "late", "left", "right"], Counting.end)]
COUNTED = cases.initialised(Counting(), 4)
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def weighed(output, target):
    error = (output["y"] - target["y"]).square().sum(1) * target["weight"]
    return (error.sum(), target["weight"].sum()), {"last": output["index"][-1], "rows": len(error), "error": error}


def parts(rt):
    weight = torch.arange(1, 9, dtype=torch.float64)
    return (mine(rt, X), mine(rt, X + 1)), {"y": mine(rt, Y), "weight": mine(rt, weight)}


def stepped(rt, model, grads):
    return ff.optimizer_step(rt, model, ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1), grads)[0]


OPTIONS = {"has_aux": True, "weighted": True}


def count(rt):
    model = ff.setup_model(rt, copy.deepcopy(COUNTED))
    num = 8 // rt.world_size // 2
    grad_fn = ff.pipeline_value_and_grad(rt, weighed, num_microbatches=num, schedule="gpipe", buffers="mean", **OPTIONS)
    (loss, aux), grads = grad_fn(model, *parts(rt))
    model = stepped(rt, model, grads)
    value_fn = ff.pipeline_value(rt, weighed, num_microbatches=2, schedule="gpipe", **OPTIONS)
    value, found = value_fn(ff.eval_mode(model), *parts(rt))
    return (
        loss,
        aux,
        ff.gather_params(rt, model),
        dict(model.buffers),
        value,
        torch.cat([one["error"] for one in found]),
    )


def count_single(rt):
    def loss_fn(net, x, shift, y, weight):
        return weighed(net(x, shift), {"y": y, "weight": weight})

    model = ff.setup_model(rt, copy.deepcopy(COUNTED))
    (x, shift), target = parts(rt)
    batch = (x, shift, target["y"], target["weight"])
    rows = list(zip(*(tensor.chunk(4) for tensor in batch), strict=True))
    (loss, aux), grads = ff.accumulate(rt, loss_fn, **OPTIONS)(model, rows)
    model = stepped(rt, model, grads)
    value, found = ff.value(rt, loss_fn, **OPTIONS)(ff.eval_mode(model), *batch)
    return loss, aux, ff.gather_params(rt, model), dict(model.buffers), value, found["error"]


def test_buffers_weights_aux_trees_and_values(ranks):
    expected = alone(count_single)
    for found in run(ranks, count, stages=COUNTING, world_size=2):
        assert (text := testing.difference(found, expected, 1e-11)) is None, text
    results = run(ranks, count, stages=COUNTING, world_size=4)
    assert [one[0].item() for one in results] == pytest.approx([expected[0].item()] * 4, abs=1e-11)
    for one in results:
        assert testing.difference(one[2], expected[2], 1e-11) is None
        assert testing.difference(one[3:5], results[0][3:5], 0.0) is None
    assert testing.difference(results[0][1], results[2][1], 0.0) is None  # one pipeline
    assert testing.difference(results[0][1], results[1][1], 1e-3) is not None


def mixed(rt, schedule):
    grad_fn = ff.pipeline_value_and_grad(rt, cross_entropy, num_microbatches=4, schedule=schedule)
    model = ff.setup_model(rt, copy.deepcopy(NET))
    loss, grads = grad_fn(model, INPUTS, TARGET)
    changed = ff.map_params(lambda value: value * 0.5, model)
    other, _ = grad_fn(changed, INPUTS, TARGET)
    again, _ = grad_fn(model, INPUTS, TARGET)
    assert torch.equal(loss, again) and not torch.equal(loss, other)
    norm = ff.clip_gradients(rt, grads, max_norm=1.0)[1]
    return loss, other, norm, grads.loss_scale


def mixed_single(rt):
    grad_fn = ff.accumulate(rt, whole_loss)
    model = ff.setup_model(rt, copy.deepcopy(NET))
    rows = list(zip(INPUTS.chunk(4), TARGET.chunk(4), strict=True))
    loss, grads = grad_fn(model, rows)
    other, _ = grad_fn(ff.map_params(lambda value: value * 0.5, model), rows)
    return loss, other, ff.clip_gradients(rt, grads, max_norm=1.0)[1], grads.loss_scale


@pytest.mark.parametrize("precision", ["bf16-mixed", ff.Precision.parse("16-mixed"), "bf16-true"], ids=str)
def test_precisions_other_values_and_the_loss_scale(ranks, precision):
    expected = alone(mixed_single, precision=precision)
    for found in run(ranks, mixed, "interleaved_1f1b", stages=FOUR, world_size=2, precision=precision):
        assert (text := testing.difference(found, expected, 2e-2)) is None, text


# What is refused, before the damage


def raised(rt, fn, *args):
    try:
        fn(rt, *args)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def wrong(rt, case):
    inputs, target, options = INPUTS, TARGET, {"num_microbatches": 4}
    if case == "rows":
        options["num_microbatches"] = 3
    elif case == "leaves":
        target = (TARGET, 1.0)
    elif case == "too few":
        options["num_microbatches"] = 1
    elif case == "stages":
        options["schedule"] = "gpipe"
    elif case == "rounds":
        inputs, target = INPUTS[:15], TARGET[:15]
        options = {"num_microbatches": 5, "schedule": "interleaved_1f1b"}
    elif case == "shapes" and rt.global_rank:
        inputs, target = INPUTS[:8], TARGET[:8]
    elif case == "values" and rt.global_rank:
        inputs = INPUTS.flip(0)
    elif case == "other":
        options["num_microbatches"] += 4 * rt.global_rank
    model = ff.setup_model(rt, copy.deepcopy(NET))
    ff.pipeline_value_and_grad(rt, cross_entropy, **options)(model, inputs, target)


@pytest.mark.parametrize(
    ("case", "stages", "kind", "text"),
    [
        ("rows", TWO, "DataError", "num_microbatches=3 equal parts"),
        ("leaves", TWO, "DataError", "a Python float"),
        ("too few", TWO, "ConfigurationError", 'schedule="gpipe"'),
        ("stages", FOUR, "ConfigurationError", 'schedule="interleaved_1f1b"'),
        ("rounds", FOUR, "ConfigurationError", "num_microbatches=4"),
        ("shapes", TWO, "MismatchError", "int64[8, 5]"),
        ("values", TWO, "MismatchError", "work on one batch"),
        ("other", TWO, "MismatchError", "num_microbatches=8"),
    ],
)
def test_the_same_error_on_every_rank(ranks, case, stages, kind, text):
    found = run(ranks, raised, wrong, case, stages=stages, world_size=2)
    assert [name for name, _ in found] == [kind] * 2, found
    assert all(text in message for _, message in found), found


class Odd(nn.Module):
    """Stages that do what they should not; the second one has a parameter that no loss depends on."""

    def __init__(self, spare=False):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0
        if spare:
            self.second.spare = nn.Parameter(torch.zeros(2))

    def shrinking(self, x):
        self.calls += 1
        return self.first(x)[: len(x) if self.calls < 4 else 1]

    def picking(self, x):
        return self.first(x)[x.sum(1) > 0]

    def naming(self, x):
        return {"h": self.first(x)}


def odd(rt, loss_fn, spare=False):
    grad_fn = ff.pipeline_value_and_grad(rt, loss_fn, num_microbatches=4)
    grad_fn(ff.setup_model(rt, Odd(spare)), X, X)


def failing(output, target):
    raise ZeroDivisionError("a fault of the user's")


def ends(ranks, first, loss_fn=F.mse_loss, fn=odd):
    return run(ranks, fn, loss_fn, stages=[(["first"], first), ["second"]], world_size=2)


def begin(net, x):
    return net.first(x)


@pytest.mark.parametrize(
    ("first", "loss_fn", "kind", "text"),
    [
        (Odd.picking, F.mse_loss, ff.ModelError, "depends on its numbers"),
        (Odd.naming, F.mse_loss, ff.ModelError, "stage 0 returned dict"),
        (
            Odd.shrinking,
            F.mse_loss,
            ff.ModelError,
            r"stage 0 returned \[\(\(1, 3\), torch.float64\)\] for micro-batch 2",
        ),
        (begin, failing, ZeroDivisionError, "a fault of the user's"),
        (begin, lambda output, target: target.sum(), ff.GradientError, "does not depend"),
    ],
)
def test_the_error_of_a_stage_ends_the_call(ranks, first, loss_fn, kind, text):
    with pytest.raises(kind, match=text):
        ends(ranks, first, loss_fn)


def spare(rt, loss_fn):
    return raised(rt, lambda rt: odd(rt, loss_fn, spare=True))


def test_a_parameter_without_a_gradient_is_named_on_every_rank(ranks):
    first, second = ends(ranks, begin, fn=spare)
    assert first[0] == "MismatchError" and "second.spare" in first[1]
    assert second[0] == "GradientError" and "second.spare" in second[1]


# What is refused before any batch


def refusals(rt):
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    calls = (
        lambda: ff.value_and_grad(rt, lambda net, x: net(x).sum())(model, X),
        lambda: ff.value(rt, lambda net, x: net(x).sum())(model, X),
        lambda: ff.apply(rt, model, X),
        lambda: ff.setup_model(rt, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), compile=True),
        lambda: ff.pipeline_value_and_grad(rt, F.mse_loss, num_microbatches=1)([model], X, X),
        lambda: ff.pipeline_value_and_grad(rt, F.mse_loss, num_microbatches=0),
        lambda: ff.pipeline_value(rt, F.mse_loss, num_microbatches=2, schedule="zigzag"),
    )
    return [raised(rt, lambda rt, call=call: call())[0] for call in calls]


def test_what_needs_the_whole_net_is_refused():
    expected = ["CapabilityError"] * 3 + ["ModelError"] + ["ConfigurationError"] * 3
    strategy = ff.strategies.pipeline([["0"], ["1"]])
    for world_size in (1, 2):
        assert testing.run(refusals, world_size=world_size, strategy=strategy) == [expected] * world_size


def test_other_strategies_are_refused():
    with pytest.raises(ff.ConfigurationError, match="strategy='single'"):
        testing.run(lambda rt: ff.pipeline_value(rt, F.mse_loss, num_microbatches=1), world_size=1)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([], "no stage"),
        (["embed", "head"], "stage 0 is 'embed'"),
        ([["embed"], []], "stage 1 is"),
    ],
)
def test_stages_are_lists_of_names(stages, text):
    with pytest.raises(ff.ConfigurationError, match=text):
        ff.strategies.pipeline(stages)


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        ([["embed", "pos"], BLOCKS], "stage 0 names 'pos', which is no sub-module"),
        ([FIRST, [*BLOCKS, "norm"]], "head.weight belongs to no stage"),
        ([FIRST, ["blocks"], ["blocks.5", "norm", "head"]], "blocks.5.mix.weight belongs to the stages 1, 2"),
        ([FIRST, ["tail"]], "names 'tail'"),
    ],
)
def test_stages_fit_the_net(stages, text):
    with pytest.raises(ff.ModelError, match=text):
        testing.run(lambda rt: ff.setup_model(rt, Net()), strategy=ff.strategies.pipeline(stages), world_size=1)


@pytest.mark.parametrize(("stages", "options"), [(TWO, {"pipeline_parallel": 4}), (FOUR, {"pipeline_parallel": 3})])
def test_stages_are_dealt_out_evenly(stages, options):
    with pytest.raises(ff.ConfigurationError, match="pipeline_parallel=[24]"):
        testing.run(lambda rt: rt.rank, strategy=ff.strategies.pipeline(stages, **options), world_size=4)


def guide(rt, text):
    found = {}
    exec(text, found)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(32, (8, 7), generator=generator)] * 12
    _, opt, loss = found["train"](rt, batches)
    return loss.item(), opt.step


def test_the_guide_runs_as_it_stands(ranks):
    page = (Path(__file__).parents[1] / "docs/pipeline.md").read_text()
    text = re.search(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL).group(1)
    found = {}
    exec(text, found)
    results = ranks.run(guide, text, strategy=found["strategy"], world_size=2)
    assert results[0] == results[1] and results[0][1] == 12
    assert results[0][0] < 3.0
