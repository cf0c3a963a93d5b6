"""Steps by kernels, without an object of the class: the bits of torch's fused classes, whatever the gradients are."""

import dataclasses
import pickle
import subprocess
import sys
from types import MappingProxyType

import optree
import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.errors import ConfigurationError, GradientError, ModelError
from tests.support.optimizers import (
    assert_intact,
    by_hand,
    functionally,
    grads_of,
    inputs,
    loss_fn,
    net,
    same,
    snapshot,
    with_none,
)
from tests.support.runtimes import RT64

DIRECT = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"weight_decay": 0.3, "maximize": True}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.2}),
]


@pytest.mark.parametrize(("cls", "options"), DIRECT)
@pytest.mark.parametrize("donate", [False, True])
def test_kernels_have_the_bits_of_the_fused_class(cls, options, donate):
    module = net()
    options = {"lr": 0.01, **options}
    model = ff.setup_model(RT64, module)
    model, opt = functionally(model, ff.setup_optimizer(RT64, model, cls, **options), donate=donate)
    reference = cls(module.parameters(), **options, fused=True)
    same(model, by_hand(reference, module))
    assert opt.step == 4
    for (name, row), param in zip(opt.state.items(), module.parameters(), strict=True):
        state = reference.state.get(param, {})
        assert set(row) == set(state), name
        assert all(torch.equal(row[slot], state[slot]) for slot in row), name


@pytest.mark.parametrize(("cls", "options"), DIRECT)
def test_kernels_agree_with_the_for_loop(cls, options):
    module = net()
    model = ff.setup_model(RT64, module)
    model, _ = functionally(model, ff.setup_optimizer(RT64, model, cls, lr=0.01, **options))
    same(model, by_hand(cls(module.parameters(), lr=0.01, **options, foreach=False, fused=False), module), atol=1e-12)


def test_counters_go_on_beyond_those_at_hand():
    module = net()
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.01)
    for first in (0, 50, 100):
        model, opt = functionally(model, opt, steps=50, donate=True, first=first)
        opt = pickle.loads(pickle.dumps(opt))
    same(model, by_hand(torch.optim.AdamW(module.parameters(), lr=0.01, fused=True), module, steps=150))
    assert {float(row["step"]) for row in opt.state.values()} == {150.0}


def test_differentiable_goes_to_the_class_itself():
    model = ff.setup_model(RT64, net())
    opts = [
        ff.setup_optimizer(RT64, model, torch.optim.AdamW, foreach=False, **options)
        for options in ({}, {"differentiable": True})
    ]
    one, two = (functionally(model, opt)[0] for opt in opts)
    same(one, list(two.params.values()), atol=1e-6)  # it computes with its float32 counter


@pytest.mark.parametrize(("cls", "options"), [*DIRECT, (torch.optim.RMSprop, {})])
@pytest.mark.parametrize("donate", [False, True])
def test_a_parameter_without_gradient_is_left_out(cls, options, donate):
    module = net()
    fused = {} if cls is torch.optim.RMSprop else {"fused": True}
    if cls is torch.optim.SGD and "momentum" in options:  # the fused class itself fails when only some have a buffer
        fused = {"foreach": False}
    reference = cls(module.parameters(), lr=0.01, **options, **fused)
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, cls, lr=0.01, **options)
    for step, missing in enumerate([("0.bias",), (), ("0.weight", "1.bias"), ()]):
        before = {name: model.params[name].clone() for name in missing}
        model, opt = ff.optimizer_step(RT64, model, opt, with_none(grads_of(model, step), *missing), donate=donate)
        assert all(torch.equal(model.params[name], old) for name, old in before.items())
        module.zero_grad()
        loss_fn(module, inputs(step)).backward()
        for name, param in module.named_parameters():
            if name in missing:
                param.grad = None
        reference.step()
    same(model, [param.detach() for param in module.parameters()], atol=0 if "foreach" not in fused else 1e-12)
    if "step" in opt.state["0.bias"]:
        assert {name: int(row["step"]) for name, row in opt.state.items()} == {
            "0.weight": 3,
            "0.bias": 3,
            "1.weight": 4,
            "1.bias": 3,
        }


@pytest.mark.parametrize("odd", ["transposed", "expanded", "strided"])
@pytest.mark.parametrize("donate", [False, True])
def test_gradients_and_parameters_of_any_memory_layout(odd, donate):
    """The kernels walk over memory; with other strides they would be silently wrong."""
    value = {
        "transposed": lambda: torch.arange(16.0).view(4, 4).t(),
        "expanded": lambda: torch.arange(4.0).view(4, 1).expand(4, 4),
        "strided": lambda: torch.arange(32.0).view(4, 8)[:, ::2],
    }[odd]
    grad = torch.randn(4, 4)
    for param, gradient in ((torch.randn(4, 4), value()), (value(), grad), (value(), value())):
        if donate and odd == "expanded" and param.stride() == (1, 0):
            continue  # several numbers in one place of memory: nothing can be updated there
        model = ff.Model(params={"w": param}, buffers={}, training=frozenset(), ref=ff.setup_model(RT64, net()).ref)
        expected = param.clone().contiguous().requires_grad_()
        expected.grad = gradient.clone().contiguous()
        torch.optim.AdamW([expected], lr=0.1, fused=True).step()
        model = dataclasses.replace(model, ref=type(model.ref)(None, ("w",)))
        opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
        grads = ff.Grads(params=MappingProxyType({"w": gradient}), ref=model.ref)
        model, _ = ff.optimizer_step(RT64, model, opt, grads, donate=donate)
        assert torch.equal(model.params["w"], expected)


def test_channels_last_convolutions():
    module = nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
    reference = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=False)
    for _ in range(3):
        _, grads = ff.value_and_grad(RT64, loss_fn)(model, x)
        model, opt = ff.optimizer_step(RT64, model, opt, grads, donate=True)
        module.zero_grad()
        loss_fn(module, x).backward()
        reference.step()
    same(model, [param.detach() for param in module.parameters()], atol=1e-12)


def test_mixed_dtypes_are_updated_each_in_its_own():
    params = {"a": torch.randn(3), "b": torch.randn(3, dtype=torch.float64), "c": torch.randn(2)}
    model = ff.Model(params=params, buffers={}, training=frozenset(), ref=bare_ref(params))
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
    copies = [value.clone().requires_grad_() for value in params.values()]
    reference = torch.optim.AdamW(copies, lr=0.1, fused=True)
    for _ in range(2):
        gradients = {name: torch.randn_like(value) for name, value in params.items()}
        for param, grad in zip(copies, gradients.values(), strict=True):
            param.grad = grad
        model, opt = ff.optimizer_step(
            RT64, model, opt, ff.Grads(params=MappingProxyType(gradients), ref=model.ref), donate=True
        )
        reference.step()
    same(model, [param.detach() for param in copies])


def bare_ref(params):
    model = ff.setup_model(RT64, net())
    return type(model.ref)(None, tuple((name, tuple(value.shape)) for name, value in params.items()))


def test_state_of_another_shape_is_refused_instead_of_read_beyond_its_end():
    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW)
    short = optree.tree_map(lambda tensor: tensor[:1] if tensor.ndim else tensor, opt)
    with pytest.raises(ConfigurationError, match="shape"):
        ff.optimizer_step(RT64, model, short, grads_of(model))
    cut = optree.tree_map(lambda tensor: tensor[:1].clone(), model)
    with pytest.raises(ModelError, match="shape"):
        ff.optimizer_step(RT64, cut, opt, grads_of(model))
    wrong = optree.tree_map(lambda tensor: tensor[:1], grads_of(model))
    with pytest.raises(GradientError, match=r"gradient of 0\.weight"):
        ff.optimizer_step(RT64, model, opt, wrong)
    single_precision = optree.tree_map(lambda tensor: tensor.float(), grads_of(model))
    for cls in (torch.optim.AdamW, torch.optim.RMSprop):
        before = snapshot(model)
        with pytest.raises((GradientError, RuntimeError)):
            ff.optimizer_step(RT64, model, ff.setup_optimizer(RT64, model, cls), single_precision)
        assert_intact(before, model)


def test_gradients_in_another_order_are_put_right():
    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, torch.optim.SGD, lr=0.1)
    grads = grads_of(model)
    turned = dataclasses.replace(grads, params=MappingProxyType(dict(reversed(grads.params.items()))))
    one, _ = ff.optimizer_step(RT64, model, opt, grads)
    two, _ = ff.optimizer_step(RT64, model, opt, turned)
    same(one, [two.params[name] for name in one.params])


def test_gradients_with_a_graph_leave_none_on_the_model():
    model = ff.setup_model(RT64, net())
    grads = optree.tree_map(lambda tensor: tensor.requires_grad_(), grads_of(model))
    for cls in (torch.optim.AdamW, torch.optim.RMSprop):
        after, opt = ff.optimizer_step(RT64, model, ff.setup_optimizer(RT64, model, cls), grads)
        assert not any(leaf.requires_grad for leaf in optree.tree_leaves((after, opt)))


def test_a_plain_step_imports_neither_dynamo_nor_dtensor_nor_the_elastic_agent():  # which take up to a second each
    code = (
        "import sys, torch, fabricfn as ff\n"
        "rt = ff.init_runtime(accelerator='cpu', devices=1)\n"
        "model = ff.setup_model(rt, torch.nn.Linear(2, 2))\n"
        "grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).sum())\n"
        "for cls in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):\n"
        "    opt = ff.setup_optimizer(rt, model, cls, lr=0.1)\n"
        "    _, grads = grad_fn(model, torch.ones(2, 2))\n"
        "    model, opt = ff.optimizer_step(rt, model, opt, grads)\n"
        "slow = {'torch._dynamo', 'torch.distributed.tensor', 'sympy', 'torch.distributed.elastic.agent'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
