"""What is given away to a compiled step is spent, whoever else looks at it; what is not keeps its bits."""

import copy
import inspect

import pytest
import torch
from torch import nn

import fabricfn as ff
from tests.support.compiled import (
    BACKEND,
    FUNCTIONAL,
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

rt = one_rank_in_float64()


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
        with pytest.raises(ff.DonatedError, match=rf"test_compiled_donation\.py:{line}"):
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
