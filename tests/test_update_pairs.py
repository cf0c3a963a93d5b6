"""Optimizers that are a pair of functions, init and update."""

from collections import namedtuple

import optree
import pytest
import torch

import fabricfn as ff
from fabricfn.errors import ConfigurationError
from fabricfn.states import optimizer_from_tree, optimizer_to_tree
from tests.support.optimizers import assert_intact, by_hand, functionally, grads_of, net, same, snapshot, with_none
from tests.support.runtimes import RT64

MomentumState = namedtuple("MomentumState", ["count", "trace"])


def momentum(lr=0.1, decay=0.9):
    """What optax calls a gradient transformation; here written with torch."""

    def init(params):
        return MomentumState(0, optree.tree_map(torch.zeros_like, params))

    def update(grads, state, params, scale=1.0):
        trace = optree.tree_map(lambda g, t: g + decay * t, grads, state.trace)
        return optree.tree_map(lambda t: -lr * scale * t, trace), MomentumState(state.count + 1, trace)

    return init, update


Transformation = namedtuple("Transformation", ["init", "update"])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("shape", [tuple, lambda pair: Transformation(*pair)])
def test_an_init_update_pair(shape, donate):
    module = net()
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, shape(momentum()))
    before = snapshot(model)
    start = model
    model, opt = ff.optimizer_step(RT64, model, opt, grads_of(model, 0))
    assert_intact(before, start)
    model, opt = functionally(model, opt, first=1, donate=donate, steps=3)
    same(model, by_hand(torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), module), atol=1e-14)
    assert opt.state.count == 4
    saved = optimizer_to_tree(opt)
    saved["state"] = tuple(saved["state"])
    assert isinstance(optimizer_from_tree(opt, saved).state, MomentumState)
    still, _ = ff.optimizer_step(RT64, model, opt, grads_of(model), scale=0.0)
    same(still, list(model.params.values()))
    with pytest.raises(ConfigurationError, match="leave out"):
        ff.setup_optimizer(RT64, model, shape(momentum()), lr=0.1)


@pytest.mark.parametrize("donate", [False, True])
def test_what_a_pair_keeps_of_its_arguments_stays_as_it_was(donate):
    def init(params):
        return {"first": params, "before": params, "grads": params}

    def update(grads, state, params):
        return {name: -0.1 * grad for name, grad in grads.items()}, {**state, "before": dict(params), "grads": grads}

    model = ff.setup_model(RT64, net())
    first = ff.map_params(torch.clone, model)
    opt = ff.setup_optimizer(RT64, model, (init, update))
    for step in range(3):
        before, grads = ff.map_params(torch.clone, model), grads_of(model, step)
        wanted = snapshot(dict(first.params), dict(before.params), dict(grads.params))
        model, opt = ff.optimizer_step(RT64, model, opt, grads, donate=donate)
        if not donate:
            ff.clip_gradients(RT64, grads, max_norm=1e-3, donate=True)
        assert_intact(wanted, opt.state["first"], opt.state["before"], opt.state["grads"])


@pytest.mark.parametrize("donate", [False, True])
def test_the_updates_of_a_pair_may_be_the_parameters_themselves(donate):
    def update(grads, state, params):
        return {"0.weight": params["1.weight"], "1.weight": params["0.weight"]}, state

    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, (lambda params: (), update), params="*.weight")
    total = model.params["0.weight"] + model.params["1.weight"]
    after, _ = ff.optimizer_step(RT64, model, opt, grads_of(model), donate=donate)
    assert torch.equal(after.params["0.weight"], total)
    assert torch.equal(after.params["1.weight"], total)


def test_a_pair_over_a_part_of_two_models():
    models = [ff.setup_model(RT64, net(1)), ff.setup_model(RT64, net(2))]
    opt = ff.setup_optimizer(RT64, models, momentum(), params="*bias")
    grads = [grads_of(model) for model in models]
    after, opt = ff.optimizer_step(RT64, models, opt, [with_none(grads[0], "1.bias"), grads[1]])
    changed = [[not torch.equal(new, old) for new, old in pairs(a, m)] for a, m in zip(after, models, strict=True)]
    assert changed == [[False, True, False, False], [False, True, False, True]]


def pairs(one, other):
    return zip(one.params.values(), other.params.values(), strict=True)
