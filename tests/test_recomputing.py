"""Activation checkpointing: modules that are computed again give the same values under any strategy."""

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import ConfigurationError
from fabricfn.strategies import ddp, fsdp
from tests.support.blocks import NORMED, PASSES, Norm, X, rows, squares, wholes
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

threads = world_of("threads", 4)


def trained(rt, options):
    model = ff.setup_model(rt, NORMED, **options)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    for _ in range(2):
        PASSES.clear()
        _, grads = ff.accumulate(rt, squares)(model, rows(rt).chunk(2))
        model, opt = ff.optimizer_step(rt, model, opt, grads)
    ff.apply(rt, model, X)
    return wholes(model.params), dict(model.buffers), list(map(type, ff.to_module(rt, model)))


@pytest.mark.parametrize(
    ("strategy", "units"),
    [
        (ff.strategies.functional(), Norm),
        (ddp(), "auto"),
        (ddp(static_graph=True), Norm),
        (ddp(find_unused_parameters=True), lambda name, module: name in ("", "1", "1.fc")),
        (fsdp(units=Norm), Norm),
        (fsdp(units=None), (Norm, nn.Linear)),
        (fsdp(units=nn.Linear), Norm),
        (ff.strategies.flat_sharded(units=Norm), Norm),
    ],
)
def test_activation_checkpointing_changes_nothing_under_any_strategy(threads, strategy, units):
    plain = threads.run(trained, {}, strategy=strategy, precision=64, world_size=2)
    again = threads.run(trained, {"activation_checkpointing": units}, strategy=strategy, precision=64, world_size=2)
    for found, expected in zip(again, plain, strict=True):
        assert testing.difference(found, expected) is None


def test_activation_checkpointing_computes_again_only_for_gradients_of_parameters():
    def passes(**options):
        model = ff.setup_model(RT64, NORMED, **options)
        counts = []
        x = X.clone().requires_grad_()
        for call in (
            lambda: ff.value_and_grad(RT64, squares)(model, X),
            lambda: ff.value(RT64, squares)(model, X),
            lambda: ff.apply(RT64, model, x).sum().backward(),
            lambda: ff.value_and_grad(RT64, lambda net, fixed: squares(net, X) + squares(fixed, X))(model, model),
            lambda: ff.to_module(RT64, model)(X).sum().backward(),
        ):
            PASSES.clear()
            call()
            counts.append(len(PASSES))
        return counts

    assert passes() == [2, 2, 2, 4, 2]
    assert passes(activation_checkpointing=Norm) == [4, 2, 2, 6, 2]
    assert passes(activation_checkpointing=lambda name, module: name == "1") == [3, 2, 2, 5, 2]


def test_a_module_that_was_checkpointed_leaves_as_it_was_written():
    module = ff.to_module(RT64, ff.setup_model(RT64, NORMED, activation_checkpointing=Norm))
    assert not any("forward" in vars(part) for part in module.modules())
    for wrong, match in ((nn.GRU, "chooses no module"), ("all", "chooses no modules"), (nn.ModuleList, "chooses no")):
        with pytest.raises(ConfigurationError, match=match):
            ff.setup_model(RT64, NORMED, activation_checkpointing=wrong)
