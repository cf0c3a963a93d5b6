"""Averages of models, `ema` and `swa`: those of the formula under every strategy, and given away where asked for."""

import dataclasses

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import sharding
from fabricfn.errors import ConfigurationError, ModelError
from tests.support.runtimes import RT64
from tests.support.tools import NET, X
from tests.support.worlds import world_of

two = world_of("threads", 2)


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
def test_averages_are_those_of_the_formula_under_every_strategy(two, strategy):
    start = dict(NET.named_parameters())
    seen, ema, swa, in_place = two.run(averaged, strategy=strategy, precision=64)[1]
    for name, first in start.items():
        by_hand = first.detach()
        for params in seen:
            by_hand = 0.75 * by_hand + 0.25 * params[name]
        torch.testing.assert_close(ema[name], by_hand, rtol=0, atol=1e-14)
        torch.testing.assert_close(swa[name], sum(p[name] for p in seen) / 5, rtol=0, atol=1e-14)
    torch.testing.assert_close(in_place, ema, rtol=0, atol=0)
    torch.testing.assert_close((ema, swa), averaged(RT64)[1:3], rtol=0, atol=1e-12)


def test_an_average_takes_the_newest_buffers_and_leaves_its_arguments_alone():
    model = ff.setup_model(RT64, NET)
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
def test_complex_parameters_are_averaged_and_integers_are_the_newest(donate):
    model = ff.setup_model(RT64, Mixed())
    newer = dataclasses.replace(model, params={name: value * 3 + 1 for name, value in model.params.items()})
    average = ff.ema(ff.tree_map(torch.clone, model), newer, 0.5, donate=donate)
    assert average.params["wave"].tolist() == [2.5, 2.5] and average.params["codes"].tolist() == [1, 1]
    assert newer.params["codes"].tolist() == [1, 1] and average.params["codes"] is not newer.params["codes"]


def test_a_donated_average_is_the_same_memory_and_the_old_one_is_spent():
    model = ff.setup_model(RT64, NET)
    first = ff.tree_map(torch.clone, model)
    loss = ff.value(RT64, squares)(first, X)
    second = ff.ema(first, model, 0.5, donate=True)
    assert [*map(torch.Tensor.data_ptr, second.params.values())] == [*map(torch.Tensor.data_ptr, first.params.values())]
    assert torch.equal(ff.value(RT64, squares)(second, X), loss)
    with pytest.raises(ff.DonatedError, match=r"test_averages\.py"):
        ff.apply(RT64, first, X)
    with pytest.raises(ff.DonatedError):
        ff.swa(model, first, 1)
    third = ff.swa(second, model, 1, donate=True)  # a second time, from what came back
    with pytest.raises(ff.DonatedError):
        ff.ema(second, model, 0.5)
    ff.ema(model, third, 0.5, donate=True)
    with pytest.raises(ff.DonatedError, match=r"test_averages\.py"):
        ff.apply(RT64, model, X)


def test_a_donated_average_of_tensors_that_share_memory_is_refused_or_found_out():
    model = ff.setup_model(RT64, nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2)))
    one = torch.zeros(2, 2)
    twice = dataclasses.replace(model, params=dict.fromkeys(model.params, one))
    with pytest.raises(ModelError, match="share memory"):
        ff.ema(twice, model, 0.5, donate=True)
    assert not one.any()
    alias = dataclasses.replace(model, params={name: value[:] for name, value in model.params.items()})
    ff.ema(alias, ff.map_params(torch.zeros_like, model), 0.5, donate=True)
    with pytest.raises(ff.DonatedError, match="shares tensors"):
        ff.apply(RT64, model, one)


def placed_otherwise(rt):
    model = ff.setup_model(rt, NET)
    whole = dataclasses.replace(model, params=ff.gather_params(rt, model))
    with pytest.raises(ModelError, match=r"0\.weight lies otherwise on the ranks"):
        ff.ema(whole, model, 0.5)


def test_an_average_lies_on_the_ranks_as_the_model_does(two):
    two.run(placed_otherwise, strategy="fsdp", precision=64)


@pytest.mark.parametrize("donate", [False, True])
def test_an_average_in_a_compiled_step_is_that_of_the_eager_one(donate):
    model = ff.setup_model(RT64, NET)
    opt = ff.setup_optimizer(RT64, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(RT64, squares, allow_unused=True)

    def step(model, opt, average, x):
        _, grads = grad_fn(model, x)
        model, opt = ff.optimizer_step(RT64, model, opt, grads, donate=donate)
        return model, opt, ff.ema(average, model, 0.75, donate=donate)

    found = []
    for one in (step, ff.compile_step(RT64, step, backend="eager")):
        state = ff.tree_map(torch.clone, (model, opt, model))
        for _ in range(3):
            before, state = state, one(*state, X)
        found.append(state[2].params)
        if donate:
            with pytest.raises(ff.DonatedError):
                ff.apply(RT64, before[2], X)
    torch.testing.assert_close(dict(found[0]), dict(found[1]), rtol=0, atol=1e-14)


def test_averages_refuse_other_trees_and_numbers():
    model = ff.setup_model(RT64, NET)
    other = ff.setup_model(RT64, nn.Linear(4, 3).double())
    for average in (other, {"net": model}, [model, model], torch.zeros(2)):
        with pytest.raises(ModelError, match=r"Begin with average = ff\.tree_map\(torch\.clone, model\)"):
            ff.ema(average, model, 0.5)
    with pytest.raises(ConfigurationError, match=r"decay=1\.5"):
        ff.ema(model, model, 1.5)
    with pytest.raises(ConfigurationError, match="count=-1"):
        ff.swa(model, model, -1)
