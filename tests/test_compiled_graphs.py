"""What a compiled step traces anew, what it says of it, and that it keeps no argument and no result."""

import dataclasses
import gc
import re
import weakref

import pytest
import torch
from torch import nn

import fabricfn as ff
from tests.support.compiled import (
    ATOL,
    BACKEND,
    FUNCTIONAL,
    assert_close,
    copies,
    make_batch,
    make_net,
    make_step,
    mse,
    one_rank_in_float64,
    tensors_of,
)

rt = one_rank_in_float64()


def test_a_long_compilation_is_told_once(rt, capsys, monkeypatch):
    monkeypatch.setattr("fabricfn.compiling.step.SHOWN", 0.0)
    model = ff.setup_model(rt, make_net())
    compiled = ff.compile_step(rt, lambda model, x: ff.apply(rt, model, x), backend=BACKEND)
    for _ in range(2):
        compiled(model, next(make_batch(0)))
    told = capsys.readouterr()
    assert re.fullmatch(r"fabricfn: CompiledStep\(<lambda>, 1 graph, \d+\.\d s of compiling\)\n", told.err)
    assert not told.out


def test_another_state_in_an_optimizer_is_seen(rt):
    model = ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.Adagrad, lr=0.1)
    step = make_step(rt)
    compiled = ff.compile_step(rt, step, backend=BACKEND)
    x, y = make_batch(0)
    for state in (opt, dataclasses.replace(opt, store=ff.tree_map(torch.ones_like, opt).store)):
        assert_close(step(model, state, x, y, 0.1)[:2], compiled(model, state, x, y, 0.1)[:2])


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
