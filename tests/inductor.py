"""Compiled steps by the real compiler: `nox -s compiling`. Not part of the round, since a C++ compiler takes its time.

What the graph must be is tested in `test_compil*.py`; here it is inductor that must keep it so.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import testing

ATOL = 1e-11
PRECISIONS = {
    "plain": ff.Precision.parse("64-true"),
    "loss scale": dataclasses.replace(
        ff.Precision.parse("64-true"), loss_scale=ff.DynamicScale(init_scale=1024.0, growth_interval=2)
    ),
}


def make_net(layers=2, width=8):
    torch.manual_seed(0)
    middle = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.1))]
    return nn.Sequential(nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), *middle, nn.Linear(width, 2))


def make_batch(number, rows=8, poisoned=False):
    generator = torch.Generator().manual_seed(number)
    x, y = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (4, 2))
    if poisoned:
        x[1, 0] = float("inf")
    return x, y


def make_step(rt, seed=0):
    grad_fn = ff.value_and_grad(rt, lambda net, x, y: F.mse_loss(net(x), y), buffers="mean")

    def step(model, opt, x, y):
        loss, grads = grad_fn(model, x, y, rng=ff.fold_in(ff.key(seed), opt.step))
        grads, norm = ff.clip_gradients(rt, grads, max_norm=0.5)
        model, opt = ff.optimizer_step(rt, model, opt, grads, lr=0.1 / (1 + opt.step), donate=True)
        return model, opt, loss

    return step


def train(rt, net, optimizer, data, compile_it, **options):
    """(loss scales, all tensors, the compiled step)."""
    model = ff.setup_model(rt, net)
    opt = ff.setup_optimizer(rt, model, optimizer, lr=0.1, **options)
    step = make_step(rt)
    step = ff.compile_step(rt, step) if compile_it else step
    scales = []
    for x, y in data:
        model, opt, _ = step(model, opt, x, y)
        scales.append(model.loss_scale)
    state = [value for row in opt.state.values() for value in row.values()]
    return scales, [*model.params.values(), *model.buffers.values(), *state], step


def assert_close(left, right):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("layers", "precision"), [(40, "plain"), (2, "loss scale")])
def test_a_compiled_step_is_the_eager_step(layers, precision):
    rt = ff.init_runtime(accelerator="cpu", devices=1, precision=PRECISIONS[precision])
    data = [make_batch(number, poisoned=precision == "loss scale" and number == 1) for number in range(4)]
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    eager, mine = (train(rt, make_net(layers), torch.optim.SGD, data, it, **options) for it in (False, True))
    assert_close(eager[1], mine[1])
    assert eager[0] == mine[0] and mine[2].traces == 1
    print(f"{layers} layers, {precision}: {mine[2]}")


def on_a_rank(rt, net, data, precision, compile_it):
    rows = slice(4 * rt.rank, 4 * rt.rank + 4)
    data = [(x[rows], y[rows]) for x, y in data]
    scales, tensors, step = train(rt, net, torch.optim.AdamW, data, compile_it)
    return scales, [tensor.clone() for tensor in tensors], step.traces if compile_it else 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ranks_reduce_inside_of_the_graph(precision):
    net, options = make_net(), {"strategy": "functional", "precision": PRECISIONS[precision]}
    data = [make_batch(number, poisoned=precision == "loss scale" and number == 1) for number in range(4)]
    with testing.processes(2) as ranks:
        eager, mine = (ranks.run(on_a_rank, net, data, precision, it, **options) for it in (False, True))
    for (scales, tensors, _), (my_scales, my_tensors, traces) in zip(eager, mine, strict=True):
        assert_close(tensors, my_tensors)
        assert scales == my_scales and traces == 1
    assert_close(mine[0][1], mine[1][1])


PROGRAM = """
import json, torch, fabricfn as ff
from torch._dynamo.utils import counters
from tests.inductor import make_batch, make_net, train

rt = ff.init_runtime(accelerator="cpu", devices=1, precision="64-true")
_, tensors, step = train(rt, make_net(10), torch.optim.AdamW, [make_batch(0)], True)
print(json.dumps([step.seconds, dict(counters["inductor"]), [tensor.tolist() for tensor in tensors]]))
"""


def test_the_next_run_finds_what_this_one_compiled(tmp_path):
    def run():
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, check=True, text=True)
        return json.loads(done.stdout)

    (first, counts, values), (second, next_counts, next_values) = run(), run()
    print(f"{first:.1f} s of compiling, then {second:.1f} s")
    assert counts["fxgraph_cache_miss"] == 1 and next_counts["fxgraph_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in next_counts and values == next_values
    assert second < first / 2
