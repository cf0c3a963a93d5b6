"""What a compiled step refuses, with the line of the user's that asked for it."""

import inspect
import re

import pytest
import torch
from torch import nn

import fabricfn as ff
from tests.support.compiled import BACKEND, make_batch, one_rank_in_float64
from tests.support.worlds import world_of

rt = one_rank_in_float64()
threads = world_of("threads", 2)


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
    with pytest.raises(ff.CapabilityError, match=rf"test_compiled_refusals\.py:{number}:.*(?s:.*)torch\.where"):
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
            r"while compile_step traced your step, at\n.*test_compiled_refusals\.py:\d+",
            "".join(caught.value.__notes__),
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
