"""The strategy pipeline and the schedules that go through its stages, against one process that accumulates."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import testing
from fabricfn.testing import cases
from tests.support.pipelines import (
    COUNTING,
    DROPPED,
    EIGHT,
    FOUR,
    INPUTS,
    NET,
    TARGET,
    TWO,
    Net,
    Odd,
    X,
    alone,
    count,
    count_single,
    cross_entropy,
    mine,
    raised,
    run,
    steps,
    train,
    train_single,
    whole_loss,
)
from tests.support.worlds import world_of

ranks = world_of("processes", 4)


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
