"""The stages of a pipeline: what each draws, how a net is cut into them, and what is refused before any batch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import testing
from tests.support.pipelines import BLOCKS, FIRST, FOUR, TWO, Net, X, alone, raised


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
