"""The strategy xla over the real torch_xla on the CPU: `nox -s xla`. What it computes is what torch itself does."""

import importlib
import operator
import subprocess
import sys

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import testing
from fabricfn.testing import cases

pytest.importorskip("torch_xla", reason="an extra, with a torch of its own: nox -s xla")

TOLERANCES = {"64-true": 1e-12, "32-true": 3e-6}


@pytest.fixture(scope="module")
def ranks():
    with testing.processes(2) as world:
        world.run(operator.attrgetter("rank"), strategy="xla", timeout=120)  # before their first backward pass
        yield world


def loop(kind="tied", precision="64-true", optimizer=torch.optim.SGD, **options):
    dtype = ff.Precision.parse(precision).param_dtype
    module, x_shape, y_shape = cases.build(kind, 5, 2)
    batch = tuple(cases.filled((23, *shape), dtype, seed) for seed, shape in enumerate((x_shape, y_shape)))
    net = cases.initialised(module, 7).to(dtype)
    return testing.training_loop(net, cases.mean_square, batch, optimizer, batch_size=17, **{"lr": 0.1, **options})


# The laws


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_laws_of_training(ranks, precision):
    train, tolerance = loop(precision=precision, momentum=0.9), TOLERANCES[precision]
    settings = {"strategies": ("xla",), "ranks": ranks, "precision": precision, "timeout": 240}
    testing.check_equivalence(train, accumulation=(1, 2), tolerance=tolerance, world_sizes=(1, 2), **settings)
    testing.check_accumulation(train, accumulation=(3,), tolerance=tolerance, world_sizes=(2,), **settings)
    testing.check_purity(train, world_sizes=(2,), **settings)
    testing.check_donation(train, world_sizes=(2,), **settings)
    testing.check_resume(train, tolerance=tolerance, world_sizes=(1, 2), **settings)


def test_adam_and_batch_statistics_obey_the_laws_that_hold_bit_for_bit(ranks):
    settings = {"strategies": ("xla",), "ranks": ranks, "world_sizes": (2,), "timeout": 240}
    testing.check(loop(optimizer=torch.optim.AdamW, lr=1e-2), ("purity", "donation", "resume"), **settings)
    testing.check(loop("norm", momentum=0.9), ("purity", "resume"), **settings)


def test_the_capabilities_are_those_of_the_table(ranks):
    """As `test_capabilities.py` has it: unused parameters, canonical sums, torch.func, any optimizer, whole values."""

    def jobs(rt):
        model = ff.setup_model(rt, cases.initialised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), 3))
        x = ff.to_device(rt, cases.filled((4, 3), torch.float32, 5))
        _, some = ff.value_and_grad(rt, lambda net, x: net[0](x).square().mean(), allow_unused=True)(model, x)
        parts = [(x[:2],), (x[2:],)] if rt.world_size == 1 else [(x[2 * rt.rank : 2 * rt.rank + 2],)]
        loss, grads = ff.accumulate(rt, square, reduce="canonical")(model, parts)
        rows = torch.func.vmap(lambda row: ff.apply(rt, model, row))(x)
        opt = ff.setup_optimizer(rt, model, torch.optim.LBFGS, lr=0.1, max_iter=2)
        model, opt = ff.optimizer_step(rt, model, opt, closure=lambda m: ff.value_and_grad(rt, square)(m, x))
        return [name for name, grad in some.params.items() if grad is None], on_cpu(
            [loss, grads, rows, model, opt.step]
        )

    def square(net, x):
        return net(x).square().mean()

    (alone,) = ranks.run(jobs, world_size=1, strategy="xla", timeout=120)
    (whole,) = ranks.run(jobs, world_size=1, strategy="single", timeout=120)
    assert alone[0] == whole[0] == ["2.weight", "2.bias"]
    assert testing.difference(alone[1], whole[1], 3e-6) is None
    for one in ranks.run(jobs, strategy="xla", timeout=120):
        assert one[0] == whole[0]
        assert testing.difference(one[1][:2], alone[1][:2]) is None  # the same bits on one rank and on two


def on_cpu(tree):
    """What can be shown to another process."""
    return [
        [value.cpu() for value in leaf.params.values()] if isinstance(leaf, ff.Model | ff.Grads)
        else leaf.cpu() if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf in tree
    ]  # fmt: skip


# What else a step consists of


def test_collectives_take_tensors_of_the_device_and_give_them_back_there(ranks):
    def work(rt):
        x = torch.arange(4.0, device=rt.device) + rt.rank
        found = {
            "mean": ff.all_reduce(rt, {"x": x, "n": 2})["x"],
            "max": ff.all_reduce(rt, x, "max"),
            "all": ff.all_gather(rt, x),
            "uneven": ff.all_gather(rt, x[: rt.rank + 1], uneven=True),
            "first": ff.broadcast(rt, x),
            "part": ff.reduce_scatter(rt, x, "sum"),
            "exchanged": ff.all_to_all(rt, x),
            "some": ff.all_reduce(rt, x, axis=(0, 1)),
        }
        leaf = x.clone().requires_grad_()
        (ff.all_reduce(rt, leaf, differentiable=True) * (rt.rank + 1)).sum().backward()
        kinds = {value.device.type for value in [*found.values(), leaf.grad]}
        objects = ff.all_gather_object(rt, rt.rank), ff.run_once(rt, lambda: "told")
        ff.barrier(rt)
        return kinds, {name: value.tolist() for name, value in found.items()}, leaf.grad.tolist(), objects

    for rank, (kinds, found, grad, objects) in enumerate(ranks.run(work, strategy="xla", timeout=120)):
        assert kinds == {"xla"} and objects == ([0, 1], "told") and grad == [1.5] * 4
        assert found == {
            "mean": [0.5, 1.5, 2.5, 3.5],
            "max": [1.0, 2.0, 3.0, 4.0],
            "all": [[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]],
            "uneven": [0.0, 1.0, 2.0],
            "first": [0.0, 1.0, 2.0, 3.0],
            "part": [[1.0, 3.0], [5.0, 7.0]][rank],
            "exchanged": [[0.0, 1.0, 1.0, 2.0], [2.0, 3.0, 3.0, 4.0]][rank],
            "some": [0.5, 1.5, 2.5, 3.5],
        }


def test_a_key_decides_what_dropout_draws_and_leaves_the_generator_alone():
    with ff.runtime(strategy="xla", devices=1) as rt:
        model = ff.setup_model(rt, nn.Dropout(0.5))
        x = torch.ones(64, device=rt.device)

        def drawn(number):
            return ff.apply(rt, model, x, rng=ff.fold_in(ff.key(0), number)).cpu()

        before = rt_state(rt)
        first, again, other = drawn(1), drawn(1), drawn(2)
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert 0 < int((first == 0).sum()) < 64
        assert rt_state(rt) == before


def rt_state(rt):
    return importlib.import_module("torch_xla.core.xla_model").get_rng_state(str(rt.device))


def test_checkpoints_go_between_strategies_and_tensors_of_one_shape_stay_apart(tmp_path):
    values = {name: cases.filled((3, 4), torch.float64, seed) for seed, name in enumerate("abc")}
    with ff.runtime(strategy="xla", devices=1) as rt, ff.runtime(accelerator="cpu", devices=1) as host:
        there = ff.to_device(rt, values)
        ff.save(rt, tmp_path / "xla", there)
        ff.save(host, tmp_path / "cpu", values)
        for path in ("xla", "cpu"):
            assert testing.difference(ff.load(host, tmp_path / path), values) is None
            for like in (None, ff.tree_map(torch.zeros_like, there)):
                found = ff.load(rt, tmp_path / path, like=like)
                assert {value.device.type for value in found.values()} == {"xla"}
                assert testing.difference(found, values) is None
        filled = ff.load(rt, tmp_path / "cpu", like=ff.tree_map(torch.zeros_like, there), donate=True)
        assert testing.difference(filled, values) is None


def test_mixed_precision_computes_in_bfloat16_and_steps_in_float32():
    with ff.runtime(strategy="xla", devices=1, precision="bf16-mixed") as rt:
        model = ff.setup_model(rt, cases.initialised(nn.Linear(4, 3), 1).float())
        seen = []

        def loss_fn(net, x):
            y = net(x)
            seen.append(y.dtype)
            return y.float().square().mean()

        x = ff.to_device(rt, cases.filled((5, 4), torch.float32, 2))
        _, grads = ff.value_and_grad(rt, loss_fn)(model, x)
        net = ff.to_module(rt, model).cpu()
        expected = torch.autograd.grad(net(x.cpu()).square().mean(), list(net.parameters()))
        assert seen == [torch.bfloat16]
        for found, exact in zip(grads.params.values(), expected, strict=True):
            assert found.dtype is torch.float32
            assert (found.cpu() - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_loop_compiles_its_steps_once():
    metrics = importlib.import_module("torch_xla.debug.metrics")
    with ff.runtime(strategy="xla", devices=1) as rt:
        model = ff.setup_model(rt, cases.initialised(nn.Linear(4, 3), 1).float())
        opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-2)
        grad_fn = ff.accumulate(rt, lambda net, x: net(x).square().mean())
        counts = []
        for step in range(30):
            parts = [(ff.to_device(rt, cases.filled((5, 4), torch.float32, 2 * step + i)),) for i in range(2)]
            loss, grads = grad_fn(model, parts)
            grads, norm = ff.clip_gradients(rt, grads, max_norm=1.0)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
            assert loss.isfinite() and norm.isfinite()
            counts.append(metrics.counter_value("UncachedCompile"))
        saved = [value.cpu() for value in model.params.values()]  # computed when the step returned
        counts.append(metrics.counter_value("UncachedCompile"))
        # autograd's thread of the device drops what lies between two products when it likes to, and what is there yet
        # when a graph is cut is a result of it: each graph may have a second form, which comes sooner or later
        assert len(saved) == 2 and 0 < counts[-1] < counts[0] + 10, counts


# The door


def work_on_two(rt, train):
    found = train(rt)
    return str(rt), rt.accelerator, {name: value.cpu() for name, value in found["params"].items()}


def test_launch_starts_a_process_for_each_device():
    """CPU_NUM_DEVICES=2, as the session has it."""
    train = loop()
    (whole,) = ff.launch(work_on_two, train, devices=1, accelerator="cpu", precision="64-true")
    for rank, (text, kind, params) in enumerate(ff.launch(work_on_two, train, strategy="xla", precision="64-true")):
        assert text == f"Runtime(rank {rank} of 2 on xla:0, xla, float64, seed 0)" and kind == "xla"
        assert testing.difference(params, whole[2], TOLERANCES["64-true"]) is None


def test_a_backward_pass_before_xla_was_started_is_said():
    code = (
        "import torch, fabricfn as ff\ntorch.ones(1, requires_grad=True).sum().backward()\n"
        "ff.init_runtime(strategy='xla', devices=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "ConfigurationError: a backward pass has run in this process before XLA was started" in done.stderr
