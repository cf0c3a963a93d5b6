"""Optimizers as functions of values: the bits of torch's own classes, purity, donation, groups, closures, pairs."""

import copy
import dataclasses
import pickle
import subprocess
import sys
import weakref
from collections import namedtuple
from types import MappingProxyType

import optree
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn.errors import ConfigurationError, DonatedError, GradientError, ModelError
from fabricfn.states import optimizer_from_tree, optimizer_to_tree
from fabricfn.strategies import single

RT = ff.Runtime(world=ff.World(), precision=ff.Precision.parse("64-true"), strategy=single())

DIRECT = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"weight_decay": 0.3, "maximize": True}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.2}),
]
STOCK = [
    (torch.optim.ASGD, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adafactor, {}),
    (torch.optim.Adagrad, {"fused": False}),
    (torch.optim.Adam, {"foreach": True, "amsgrad": True}),
    (torch.optim.Adam, {"lr": torch.tensor(0.01)}),
    (torch.optim.AdamW, {"foreach": False}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (torch.optim.RAdam, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.Rprop, {}),
    (torch.optim.SGD, {"foreach": True, "momentum": 0.9}),
]


def loss_fn(net, x):
    return net(x).square().mean()


def inputs(step):
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def net(seed=0, width=4, depth=2):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)]).double()
    for param in module.parameters():
        nn.init.normal_(param, generator=generator)
    return module


def grads_of(model, step=0):
    return ff.value_and_grad(RT, loss_fn)(model, inputs(step))[1]


def by_hand(optimizer, module, steps=4, first=0):
    """Plain torch, on gradients that were computed likewise."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_fn(module, inputs(step)).backward()
        optimizer.step()
    return [param.detach() for param in module.parameters()]


def functionally(model, opt, steps=4, donate=False, first=0):
    for step in range(first, first + steps):
        model, opt = ff.optimizer_step(RT, model, opt, grads_of(model, step), donate=donate)
    return model, opt


def same(model, expected, atol=0.0):
    for (name, found), wanted in zip(model.params.items(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def snapshot(*trees):
    return [leaf.clone() for leaf in optree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def assert_intact(before, *trees):
    for old, new in zip(before, snapshot(*trees), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(("cls", "options"), DIRECT)
@pytest.mark.parametrize("donate", [False, True])
def test_kernels_have_the_bits_of_the_fused_class(cls, options, donate):
    module = net()
    options = {"lr": 0.01, **options}
    model = ff.setup_model(RT, module)
    model, opt = functionally(model, ff.setup_optimizer(RT, model, cls, **options), donate=donate)
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
    model = ff.setup_model(RT, module)
    model, _ = functionally(model, ff.setup_optimizer(RT, model, cls, lr=0.01, **options))
    same(model, by_hand(cls(module.parameters(), lr=0.01, **options, foreach=False, fused=False), module), atol=1e-12)


@pytest.mark.parametrize(("cls", "options"), STOCK)
@pytest.mark.parametrize("donate", [False, True])
def test_every_class_has_its_own_bits(cls, options, donate):
    module = net()
    model = ff.setup_model(RT, module)
    model, opt = functionally(model, ff.setup_optimizer(RT, model, cls, **options), donate=donate)
    same(model, by_hand(cls(module.parameters(), **options), module))
    assert opt.step == 4
    assert all(param.grad is None for param in model.params.values())


def test_counters_go_on_beyond_those_at_hand():
    module = net()
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.01)
    for first in (0, 50, 100):
        model, opt = functionally(model, opt, steps=50, donate=True, first=first)
        opt = pickle.loads(pickle.dumps(opt))
    same(model, by_hand(torch.optim.AdamW(module.parameters(), lr=0.01, fused=True), module, steps=150))
    assert {float(row["step"]) for row in opt.state.values()} == {150.0}


def test_differentiable_goes_to_the_class_itself():
    model = ff.setup_model(RT, net())
    opts = [
        ff.setup_optimizer(RT, model, torch.optim.AdamW, foreach=False, **options)
        for options in ({}, {"differentiable": True})
    ]
    one, two = (functionally(model, opt)[0] for opt in opts)
    same(one, list(two.params.values()), atol=1e-6)  # it computes with its float32 counter


def test_muon_on_matrices_beside_adamw_on_the_rest():
    module = net()
    model = ff.setup_model(RT, module)
    muon = ff.setup_optimizer(RT, model, torch.optim.Muon, params="*weight", lr=0.01)
    adamw = ff.setup_optimizer(RT, model, torch.optim.AdamW, params=lambda name: name.endswith("bias"), lr=0.02)
    named = dict(module.named_parameters())
    reference = [
        torch.optim.Muon([named["0.weight"], named["1.weight"]], lr=0.01),
        torch.optim.AdamW([named["0.bias"], named["1.bias"]], lr=0.02, fused=True),
    ]
    for step in range(3):
        grads = grads_of(model, step)
        model, muon = ff.optimizer_step(RT, model, muon, grads)
        model, adamw = ff.optimizer_step(RT, model, adamw, grads)
        module.zero_grad()
        loss_fn(module, inputs(step)).backward()
        for optimizer in reference:
            optimizer.step()
    same(model, [param.detach() for param in module.parameters()])
    assert set(adamw.state) == {"0.bias", "1.bias"}


def test_sparse_adam():
    table = nn.Embedding(5, 3, sparse=True).double()
    model = ff.setup_model(RT, table)
    opt = ff.setup_optimizer(RT, model, torch.optim.SparseAdam, lr=0.1)
    reference = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    for rows in ([0, 1], [1, 4]):
        table.zero_grad()
        table(torch.tensor(rows)).sum().backward()
        params = MappingProxyType({"weight": table.weight.grad.clone()})
        model, opt = ff.optimizer_step(RT, model, opt, ff.Grads(params=params, ref=model.ref))
        reference.step()
    same(model, [table.weight.detach()])
    dense = ff.setup_optimizer(RT, model, torch.optim.AdamW)
    with pytest.raises(GradientError, match="SparseAdam"):
        ff.optimizer_step(RT, model, dense, ff.Grads(params=params, ref=model.ref))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_a_pure_step_leaves_its_inputs_as_they_are(cls):
    model = ff.setup_model(RT, net())
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    model, opt = functionally(model, ff.setup_optimizer(RT, model, cls, lr=0.1, **options), steps=1)
    grads = grads_of(model)
    before = snapshot(model, opt, grads)
    one, opt_one = ff.optimizer_step(RT, model, opt, grads)
    two, opt_two = ff.optimizer_step(RT, model, opt, grads)
    assert_intact(before, model, opt, grads)
    assert_intact(snapshot(one, opt_one), two, opt_two)
    ours = {tensor.data_ptr() for tensor in snapshot()} | {t.data_ptr() for t in optree.tree_leaves((model, opt))}
    assert not ours & {t.data_ptr() for t in optree.tree_leaves((one, opt_one))}


def test_donation_spends_all_three_and_says_where():
    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
    grads = grads_of(model)
    new, new_opt = ff.optimizer_step(RT, model, opt, grads, donate=True)
    fresh = grads_of(new)
    for arguments in ((model, new_opt, fresh), (new, opt, fresh), (new, new_opt, grads)):
        with pytest.raises(DonatedError, match=r"test_optimizers\.py:\d+"):
            ff.optimizer_step(RT, *arguments)
    with pytest.raises(DonatedError):
        optree.tree_map(torch.clone, opt)
    with pytest.raises(DonatedError):
        optimizer_to_tree(opt)
    ff.optimizer_step(RT, new, new_opt, fresh)


def test_an_optimizer_that_shares_tensors_finds_out_in_both_directions():
    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
    alias = optree.tree_map(lambda tensor: tensor, opt)
    copied = optree.tree_map(torch.clone, opt)
    grads = grads_of(model)
    mine = optree.tree_map(torch.clone, model)
    ff.optimizer_step(RT, mine, opt, optree.tree_map(torch.clone, grads), donate=True)
    with pytest.raises(DonatedError, match="shares tensors"):
        ff.optimizer_step(RT, model, alias, grads)
    again = optree.tree_map(lambda tensor: tensor, copied)
    ff.optimizer_step(RT, optree.tree_map(torch.clone, model), again, grads, donate=True)
    with pytest.raises(DonatedError, match="shares tensors"):
        ff.optimizer_step(RT, model, copied, grads_of(model))


def test_a_lineage_that_was_taken_apart_can_go_on_donating():
    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
    first = optree.tree_map(lambda tensor: tensor, opt)
    for step in range(3):
        model, opt = ff.optimizer_step(RT, model, opt, grads_of(model, step), donate=True)
        optree.tree_leaves(opt)
    assert opt.step == 3
    with pytest.raises(DonatedError):
        first.lease.check("Optimizer")


def test_a_failing_step_leaves_pure_inputs_and_spends_donated_ones():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise ArithmeticError("in the middle")

    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, model, Failing, lr=0.1)
    grads = grads_of(model)
    before = snapshot(model, grads)
    with pytest.raises(ArithmeticError):
        ff.optimizer_step(RT, model, opt, grads)
    assert_intact(before, model, grads)
    with pytest.raises(ArithmeticError):
        ff.optimizer_step(RT, model, opt, grads, donate=True)
    with pytest.raises(DonatedError):
        ff.optimizer_step(RT, model, opt, grads)


def test_after_a_failing_donated_step_no_record_over_the_tensors_goes_on():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                self.param_groups[0]["params"][0].data.add_(1.0)  # as a kernel: no version tells of it
            raise ArithmeticError("in the middle")

    for bound in (0, 1):
        model = ff.setup_model(RT, net())
        opt = ff.setup_optimizer(RT, model, Failing, lr=0.1)
        grads = grads_of(model)
        records = model, ff.tree_map(lambda tensor: tensor, model)
        grads_of(records[bound])
        with pytest.raises(ArithmeticError):
            ff.optimizer_step(RT, model, opt, grads, donate=True)
        for record in records:
            with pytest.raises(DonatedError):
                grads_of(record)
        assert not model.lease.frames
        assert all(frame.owner is None for frame in model.ref.engine.frames)


def with_none(grads, *names):
    params = {name: None if name in names else grad for name, grad in grads.params.items()}
    return dataclasses.replace(grads, params=MappingProxyType(params), lease=type(grads.lease)())


@pytest.mark.parametrize(("cls", "options"), [*DIRECT, (torch.optim.RMSprop, {})])
@pytest.mark.parametrize("donate", [False, True])
def test_a_parameter_without_gradient_is_left_out(cls, options, donate):
    module = net()
    fused = {} if cls is torch.optim.RMSprop else {"fused": True}
    if cls is torch.optim.SGD and "momentum" in options:  # the fused class itself fails when only some have a buffer
        fused = {"foreach": False}
    reference = cls(module.parameters(), lr=0.01, **options, **fused)
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, cls, lr=0.01, **options)
    for step, missing in enumerate([("0.bias",), (), ("0.weight", "1.bias"), ()]):
        before = {name: model.params[name].clone() for name in missing}
        model, opt = ff.optimizer_step(RT, model, opt, with_none(grads_of(model, step), *missing), donate=donate)
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
        model = ff.Model(params={"w": param}, buffers={}, training=frozenset(), ref=ff.setup_model(RT, net()).ref)
        expected = param.clone().contiguous().requires_grad_()
        expected.grad = gradient.clone().contiguous()
        torch.optim.AdamW([expected], lr=0.1, fused=True).step()
        model = dataclasses.replace(model, ref=type(model.ref)(None, ("w",)))
        opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
        grads = ff.Grads(params=MappingProxyType({"w": gradient}), ref=model.ref)
        model, _ = ff.optimizer_step(RT, model, opt, grads, donate=donate)
        assert torch.equal(model.params["w"], expected)


def test_channels_last_convolutions():
    module = nn.Conv2d(3, 4, 3).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
    reference = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=False)
    for _ in range(3):
        _, grads = ff.value_and_grad(RT, loss_fn)(model, x)
        model, opt = ff.optimizer_step(RT, model, opt, grads, donate=True)
        module.zero_grad()
        loss_fn(module, x).backward()
        reference.step()
    same(model, [param.detach() for param in module.parameters()], atol=1e-12)


def test_mixed_dtypes_are_updated_each_in_its_own():
    params = {"a": torch.randn(3), "b": torch.randn(3, dtype=torch.float64), "c": torch.randn(2)}
    model = ff.Model(params=params, buffers={}, training=frozenset(), ref=bare_ref(params))
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
    copies = [value.clone().requires_grad_() for value in params.values()]
    reference = torch.optim.AdamW(copies, lr=0.1, fused=True)
    for _ in range(2):
        gradients = {name: torch.randn_like(value) for name, value in params.items()}
        for param, grad in zip(copies, gradients.values(), strict=True):
            param.grad = grad
        model, opt = ff.optimizer_step(
            RT, model, opt, ff.Grads(params=MappingProxyType(gradients), ref=model.ref), donate=True
        )
        reference.step()
    same(model, [param.detach() for param in copies])


def bare_ref(params):
    model = ff.setup_model(RT, net())
    return type(model.ref)(None, tuple((name, tuple(value.shape)) for name, value in params.items()))


def test_groups_by_pattern_and_predicate():
    module = net()
    model = ff.setup_model(RT, module)
    named = dict(module.named_parameters())
    groups = {"*.bias": {"weight_decay": 0.0}, lambda name: name.startswith("0"): {"lr": 0.5}}
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1, weight_decay=0.2, groups=groups)
    reference = torch.optim.AdamW(
        [
            {"params": [named["0.bias"], named["1.bias"]], "weight_decay": 0.0},
            {"params": [named["0.weight"]], "lr": 0.5},
            {"params": [named["1.weight"]]},
        ],
        lr=0.1,
        weight_decay=0.2,
        fused=True,
    )
    model, opt = functionally(model, opt, donate=True)
    same(model, by_hand(reference, module))
    assert [group["lr"] for group in opt.hyperparams] == [0.1, 0.5, 0.1]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.RMSprop])
def test_overrides_hold_for_one_step(cls):
    module = net()
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, cls, lr=0.1, groups={"*.bias": {}})
    named = dict(module.named_parameters())
    fused = {"fused": True} if cls is torch.optim.AdamW else {}
    pairs = [[named["0.bias"], named["1.bias"]], [named["0.weight"], named["1.weight"]]]
    reference = cls([{"params": pair} for pair in pairs], lr=0.1, **fused)
    for step, lr in enumerate([0.5, [0.01, 0.02], 0.1]):
        options = {} if step == 2 else {"lr": lr}
        model, opt = ff.optimizer_step(RT, model, opt, grads_of(model, step), **options)
        for i, group in enumerate(reference.param_groups):
            group["lr"] = lr[i] if isinstance(lr, list) else lr
        by_hand(reference, module, steps=1, first=step)
    same(model, [param.detach() for param in module.parameters()])
    assert [group["lr"] for group in opt.hyperparams] == [0.1, 0.1]


def test_several_models_in_one_optimizer():
    modules = {"gen": net(1), "disc": net(2)}
    models = {name: ff.setup_model(RT, module) for name, module in modules.items()}
    opt = ff.setup_optimizer(RT, models, torch.optim.AdamW, lr=0.1, groups={"disc/*": {"lr": 0.2}})
    reference = torch.optim.AdamW(
        [
            {"params": modules["disc"].parameters(), "lr": 0.2},
            {"params": modules["gen"].parameters()},
        ],
        lr=0.1,
        fused=True,
    )

    def joint(nets, x):
        return nets["disc"](nets["gen"](x)).square().mean()

    for step in range(3):
        _, grads = ff.value_and_grad(RT, joint)(models, inputs(step))
        models, opt = ff.optimizer_step(RT, models, opt, grads, donate=step % 2 == 0)
        reference.zero_grad()
        joint(modules, inputs(step)).backward()
        reference.step()
    for name, module in modules.items():
        same(models[name], [param.detach() for param in module.parameters()])
    assert set(opt.state) == {"gen", "disc"}
    assert set(opt.state["gen"]["0.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(ConfigurationError, match="structure"):
        ff.optimizer_step(RT, models["gen"], opt, grads["gen"])
    rebuilt = optimizer_from_tree(opt, optimizer_to_tree(opt))
    assert_intact(snapshot(opt), rebuilt)


def test_the_same_model_twice_cannot_be_donated():
    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, [model, model], torch.optim.SGD, lr=0.1)
    grads = grads_of(model)
    with pytest.raises(ModelError, match="twice"):
        ff.optimizer_step(RT, [model, model], opt, [grads, grads], donate=True)


def test_parameters_that_share_memory_cannot_be_donated():
    model = ff.setup_model(RT, net())
    grads = grads_of(model)
    pair = model, ff.tree_map(torch.detach, model)
    opt = ff.setup_optimizer(RT, pair, torch.optim.SGD, lr=0.1)
    with pytest.raises(ModelError, match=r"0\.weight and 0\.weight share memory"):
        ff.optimizer_step(RT, pair, opt, (grads, grads), donate=True)
    pure, _ = ff.optimizer_step(RT, pair, opt, (grads, grads))
    donated, _ = ff.optimizer_step(RT, ff.tree_map(torch.clone, pair), opt, (grads, grads), donate=True)
    assert_intact(snapshot(pure), donated)
    sgd = ff.setup_optimizer(RT, model, torch.optim.SGD)
    once, _ = ff.optimizer_step(RT, model, sgd, grads_of(model), donate=True)
    grads = grads_of(once)
    pair = once, ff.tree_map(torch.detach, once)
    opt = ff.setup_optimizer(RT, pair, torch.optim.SGD)
    with pytest.raises(ModelError, match="share memory"):
        ff.optimizer_step(RT, pair, opt, (grads, grads), donate=True)
    model = ff.map_params(torch.clone, once)
    tensor = model.params["0.weight"]
    tied = dataclasses.replace(model, params={**model.params, "0.weight": tensor, "1.weight": tensor})
    with pytest.raises(ModelError, match=r"0\.weight and 1\.weight share memory"):
        ff.optimizer_step(RT, tied, ff.setup_optimizer(RT, tied, torch.optim.SGD), grads_of(tied), donate=True)


def test_frozen_and_empty_parameters_that_share_memory_can_be_donated():
    module = nn.ModuleList([nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)])
    module.append(nn.ParameterDict({"weight": torch.ones(0)}))
    model = ff.setup_model(RT, module.double())

    def loss(models):
        return sum(one[1](one[0](torch.ones(1, 2, dtype=torch.float64))).sum() + one[2].weight.sum() for one in models)

    other = ff.map_params(torch.clone, model)
    other = dataclasses.replace(other, params={**other.params, "0.weight": model.params["0.weight"]})
    opt = ff.setup_optimizer(RT, (model, other), torch.optim.SGD, lr=0.1)
    _, grads = ff.value_and_grad(RT, loss)((model, other))
    after, _ = ff.optimizer_step(RT, (model, other), opt, grads, donate=True)
    assert after[0].params["0.weight"] is after[1].params["0.weight"]


def test_frozen_parameters_are_left_out_and_shared():
    module = net()
    module[0].requires_grad_(False)
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
    assert set(opt.state) == {"1.weight", "1.bias"}
    after, opt = ff.optimizer_step(RT, model, opt, grads_of(model))
    assert after.params["0.weight"] is model.params["0.weight"]
    before = snapshot(model)
    donated, opt = ff.optimizer_step(RT, after, opt, grads_of(after), donate=True)
    assert_intact(before, model)
    model.lease.check("Model")  # the pure step's input is not condemned by what happened to its successor
    reference = torch.optim.AdamW(module[1].parameters(), lr=0.1, fused=True)
    for found in (model, after):
        assert torch.equal(found.params["0.bias"], module[0].bias)
    for _ in range(2):
        module.zero_grad()
        loss_fn(module, inputs(0)).backward()
        reference.step()
    same(donated, [param.detach() for param in module.parameters()])


def test_pure_steps_of_a_part_share_nothing_that_a_later_step_overwrites():
    model = ff.setup_model(RT, net())
    first = ff.setup_optimizer(RT, model, torch.optim.SGD, params="0.*", lr=0.1)
    second = ff.setup_optimizer(RT, model, torch.optim.SGD, params="1.*", lr=0.1)
    grads = grads_of(model)
    before = snapshot(model)
    after, _ = ff.optimizer_step(RT, model, first, grads)
    ff.optimizer_step(RT, after, second, grads, donate=True)
    assert_intact(before, model)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("cls", "stepped"), [(torch.optim.AdamW, 0), (torch.optim.AdamW, 2), (torch.optim.RMSprop, 2)])
def test_an_instance_goes_on_from_its_own_state(cls, stepped, named):
    module = net()
    twin = copy.deepcopy(module)

    def build(target):
        if named:
            return cls(list(target.named_parameters()), lr=0.05)
        return cls([{"params": target[1].parameters(), "lr": 0.2}, {"params": target[0].parameters()}], lr=0.05)

    reference, instance = build(twin), build(module)
    by_hand(reference, twin, stepped)
    by_hand(instance, module, stepped)
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, instance)
    assert len(opt.hyperparams) == (1 if named else 2)
    model, opt = functionally(model, opt, first=stepped)
    same(model, by_hand(reference, twin, first=stepped), atol=1e-12)
    same(ff.setup_model(RT, module), [param.detach() for param in module.parameters()])


def test_an_instance_over_named_parameters_of_a_copy_is_matched_by_name():
    module = net()
    instance = torch.optim.AdamW(list(copy.deepcopy(module).named_parameters()), lr=0.1)
    model = ff.setup_model(RT, module)
    model, _ = functionally(model, ff.setup_optimizer(RT, model, instance))
    same(model, by_hand(torch.optim.AdamW(module.parameters(), lr=0.1, fused=True), module))


def test_an_instance_over_other_parameters_is_refused():
    model = ff.setup_model(RT, net())
    with pytest.raises(ConfigurationError, match="none of the module"):
        ff.setup_optimizer(RT, model, torch.optim.AdamW(net(1).parameters()))
    with pytest.raises(ConfigurationError, match="leave out lr"):
        ff.setup_optimizer(RT, model, torch.optim.AdamW(net(1).parameters()), lr=0.1)


def test_hooks_of_an_instance_are_called():
    module = net()
    instance = torch.optim.AdamW(module.parameters(), lr=0.1)
    calls = []
    instance.register_step_post_hook(lambda *_: calls.append(1))
    model = ff.setup_model(RT, module)
    functionally(model, ff.setup_optimizer(RT, model, instance), steps=2)
    assert calls == [1, 1]


class Halving(torch.optim.SGD):
    """Changes gradients in place, as gradient centralisation and clipping within the optimizer do."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.halve()
        super().step()
        return loss

    def halve(self):
        for param in self.param_groups[0]["params"]:
            param.grad.mul_(0.5)


@pytest.mark.parametrize("how", ["class", "hook", "closure"])
def test_a_pure_step_keeps_the_gradients_that_the_users_code_changes(how):
    module = net()
    instance = (Halving if how != "hook" else torch.optim.SGD)(module.parameters(), lr=0.1)
    if how == "hook":
        instance.register_step_pre_hook(lambda opt, *_: Halving.halve(opt))
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, instance)
    grads = grads_of(model)
    before = snapshot(grads)
    arguments = {"closure": lambda _: (0.0, grads)} if how == "closure" else {"grads": grads}
    one, _ = ff.optimizer_step(RT, model, opt, **arguments)
    two, _ = ff.optimizer_step(RT, model, opt, **arguments)
    assert_intact(before, grads)
    same(two, list(one.params.values()))
    plain = ff.setup_optimizer(RT, model, torch.optim.SGD, lr=0.05)
    same(one, list(ff.optimizer_step(RT, model, plain, grads)[0].params.values()), atol=1e-15)


class Late(torch.optim.Optimizer):
    """Creates its attributes in the first step; one of them looks at the parameters."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        self.t = getattr(self, "t", 0) + 1
        self.moving = getattr(self, "moving", None) or [p for group in self.param_groups for p in group["params"]]
        for param in self.moving:
            param.add_(param.grad, alpha=-0.1 / self.t)


@pytest.mark.parametrize("donate", [False, True])
def test_attributes_that_appear_in_the_first_step_are_kept(donate):
    module = net()
    model = ff.setup_model(RT, module)
    model, opt = functionally(model, ff.setup_optimizer(RT, model, Late), donate=donate)
    same(model, by_hand(Late(module.parameters()), module))
    assert opt.shared == {"t": 4}


def test_a_class_of_the_users_own_over_lbfgs():
    class Own(torch.optim.LBFGS):
        """`t` is a slot of LBFGS, too."""

        def step(self, closure):
            self.t = getattr(self, "t", 0) + 1
            return super().step(closure)

    model = ff.setup_model(RT, net())
    found = []
    for cls in (torch.optim.LBFGS, Own):
        after, opt = model, ff.setup_optimizer(RT, model, cls, lr=0.5, max_iter=5)
        for _ in range(2):
            after, opt = ff.optimizer_step(
                RT, after, opt, closure=lambda m: ff.value_and_grad(RT, loss_fn)(m, inputs(0))
            )
            opt = optimizer_from_tree(opt, optimizer_to_tree(opt))
        found.append(after)
    same(found[1], list(found[0].params.values()))
    assert opt.shared["self.t"] == 2
    assert opt.shared["t"] == 0.5


class Counting(torch.optim.SGD):
    """State on itself, under a string, and among its hyperparameters, as schedule-free and Prodigy have it."""

    def __init__(self, params, lr=0.1, *, scale):
        super().__init__(params, lr)
        self.scale = scale
        self.calls = 0
        self.momentum_of_all = torch.zeros(())

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        self.momentum_of_all += self.scale
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["params"][0].mul_(1 + 0.1 * self.calls)
        self.state["global"] = {"seen": self.calls}


def test_a_class_of_the_users_own_keeps_all_of_its_state():
    module = net()
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, Counting, lr=0.1, scale=2.0)
    model, early = functionally(model, opt, steps=2)
    model, opt = functionally(model, optimizer_from_tree(opt, optimizer_to_tree(early)), steps=2, first=2)
    reference = Counting(module.parameters(), lr=0.1, scale=2.0)
    same(model, by_hand(reference, module))
    assert (opt.shared["calls"], early.shared["calls"], opt.hyperparams[0]["k"]) == (4, 2, 4)
    assert float(opt.shared["momentum_of_all"]) == float(reference.momentum_of_all) == 8.0
    assert float(early.shared["momentum_of_all"]) == 4.0


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("donate", [False, True])
def test_lbfgs_by_closure(search, donate):
    module = net()
    model = ff.setup_model(RT, module)
    grad_fn = ff.value_and_grad(RT, loss_fn)
    options = {"lr": 0.5, "max_iter": 5, "line_search_fn": search}
    opt = ff.setup_optimizer(RT, model, torch.optim.LBFGS, **options)
    with pytest.raises(ConfigurationError, match="closure="):
        ff.optimizer_step(RT, model, opt, grads_of(model))
    reference = torch.optim.LBFGS(module.parameters(), **options)
    before = snapshot(model)
    start = model
    for step in range(4):
        x = inputs(step)
        if step == 2:
            opt = optimizer_from_tree(opt, optimizer_to_tree(opt))
        model, opt = ff.optimizer_step(RT, model, opt, closure=lambda m, x=x: grad_fn(m, x), donate=donate and step > 0)

        def closure(x=x):
            reference.zero_grad()
            loss = loss_fn(module, x)
            loss.backward()
            return loss

        reference.step(closure)
    same(model, [param.detach() for param in module.parameters()])
    assert opt.shared["func_evals"] == next(iter(reference.state.values()))["func_evals"]
    assert set(opt.state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert_intact(before, start)


def test_a_closure_also_serves_the_other_optimizers_and_moves_buffers():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    model = ff.setup_model(RT, module)
    grad_fn = ff.value_and_grad(RT, loss_fn)
    opt = ff.setup_optimizer(RT, model, torch.optim.SGD, lr=0.1)
    one, _ = ff.optimizer_step(RT, model, opt, closure=lambda m: grad_fn(m, inputs(0)))
    two, _ = ff.optimizer_step(RT, model, opt, grads_of(model))
    assert_intact(snapshot(one), two)
    assert int(one.buffers["1.num_batches_tracked"]) == 1
    assert int(model.buffers["1.num_batches_tracked"]) == 0
    lbfgs = ff.setup_optimizer(RT, model, torch.optim.LBFGS, max_iter=3)
    after, lbfgs = ff.optimizer_step(RT, model, lbfgs, closure=lambda m: grad_fn(m, inputs(0)))
    assert int(after.buffers["1.num_batches_tracked"]) == lbfgs.shared["func_evals"] > 1


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
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, shape(momentum()))
    before = snapshot(model)
    start = model
    model, opt = ff.optimizer_step(RT, model, opt, grads_of(model, 0))
    assert_intact(before, start)
    model, opt = functionally(model, opt, first=1, donate=donate, steps=3)
    same(model, by_hand(torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), module), atol=1e-14)
    assert opt.state.count == 4
    saved = optimizer_to_tree(opt)
    saved["state"] = tuple(saved["state"])
    assert isinstance(optimizer_from_tree(opt, saved).state, MomentumState)
    still, _ = ff.optimizer_step(RT, model, opt, grads_of(model), scale=0.0)
    same(still, list(model.params.values()))
    with pytest.raises(ConfigurationError, match="leave out"):
        ff.setup_optimizer(RT, model, shape(momentum()), lr=0.1)


@pytest.mark.parametrize("donate", [False, True])
def test_what_a_pair_keeps_of_its_arguments_stays_as_it_was(donate):
    def init(params):
        return {"first": params, "before": params, "grads": params}

    def update(grads, state, params):
        return {name: -0.1 * grad for name, grad in grads.items()}, {**state, "before": dict(params), "grads": grads}

    model = ff.setup_model(RT, net())
    first = ff.map_params(torch.clone, model)
    opt = ff.setup_optimizer(RT, model, (init, update))
    for step in range(3):
        before, grads = ff.map_params(torch.clone, model), grads_of(model, step)
        wanted = snapshot(dict(first.params), dict(before.params), dict(grads.params))
        model, opt = ff.optimizer_step(RT, model, opt, grads, donate=donate)
        if not donate:
            ff.clip_gradients(RT, grads, max_norm=1e-3, donate=True)
        assert_intact(wanted, opt.state["first"], opt.state["before"], opt.state["grads"])


@pytest.mark.parametrize("donate", [False, True])
def test_the_updates_of_a_pair_may_be_the_parameters_themselves(donate):
    def update(grads, state, params):
        return {"0.weight": params["1.weight"], "1.weight": params["0.weight"]}, state

    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, model, (lambda params: (), update), params="*.weight")
    total = model.params["0.weight"] + model.params["1.weight"]
    after, _ = ff.optimizer_step(RT, model, opt, grads_of(model), donate=donate)
    assert torch.equal(after.params["0.weight"], total)
    assert torch.equal(after.params["1.weight"], total)


def test_a_pair_over_a_part_of_two_models():
    models = [ff.setup_model(RT, net(1)), ff.setup_model(RT, net(2))]
    opt = ff.setup_optimizer(RT, models, momentum(), params="*bias")
    grads = [grads_of(model) for model in models]
    after, opt = ff.optimizer_step(RT, models, opt, [with_none(grads[0], "1.bias"), grads[1]])
    changed = [[not torch.equal(new, old) for new, old in pairs(a, m)] for a, m in zip(after, models, strict=True)]
    assert changed == [[False, True, False, False], [False, True, False, True]]


def pairs(one, other):
    return zip(one.params.values(), other.params.values(), strict=True)


@pytest.mark.parametrize(
    ("cls", "options"), [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.RMSprop, {})]
)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "tree_map", "flatten", "containers"])
def test_copies_go_on_to_the_same_bits(cls, options, way):
    model = ff.setup_model(RT, net())
    model, opt = functionally(model, ff.setup_optimizer(RT, model, cls, lr=0.1, **options), steps=2)
    other = {
        "pickle": lambda: pickle.loads(pickle.dumps(opt)),
        "deepcopy": lambda: copy.deepcopy(opt),
        "tree_map": lambda: optree.tree_map(torch.clone, opt),
        "flatten": lambda: optree.tree_unflatten(*reversed(optree.tree_flatten(opt)[:2])),
        "containers": lambda: optimizer_from_tree(
            ff.setup_optimizer(RT, model, cls, lr=9.0, **options), copy.deepcopy(optimizer_to_tree(opt))
        ),
    }[way]()
    assert (other.step, other.hyperparams[0]["lr"]) == (2, 0.1)
    expected, opt = functionally(model, opt, steps=2, first=2)
    found, other = functionally(model, other, steps=2, first=2)
    same(found, list(expected.params.values()))
    assert_intact(snapshot(opt), other)


def test_optimizers_of_two_engines_combine():
    one, two = ff.setup_model(RT, net(1)), ff.setup_model(RT, net(2))
    opts = [ff.setup_optimizer(RT, model, torch.optim.AdamW) for model in (one, two)]
    total = optree.tree_map(torch.add, *opts)
    assert total.step == 0
    assert repr(total) == "Optimizer(AdamW, 4 params, lr 0.001, step 0)"
    with pytest.raises(ValueError, match="Mismatch"):
        optree.tree_map(torch.add, opts[0], ff.setup_optimizer(RT, one, torch.optim.Adam))


def test_state_of_another_shape_is_refused_instead_of_read_beyond_its_end():
    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW)
    short = optree.tree_map(lambda tensor: tensor[:1] if tensor.ndim else tensor, opt)
    with pytest.raises(ConfigurationError, match="shape"):
        ff.optimizer_step(RT, model, short, grads_of(model))
    cut = optree.tree_map(lambda tensor: tensor[:1].clone(), model)
    with pytest.raises(ModelError, match="shape"):
        ff.optimizer_step(RT, cut, opt, grads_of(model))
    wrong = optree.tree_map(lambda tensor: tensor[:1], grads_of(model))
    with pytest.raises(GradientError, match=r"gradient of 0\.weight"):
        ff.optimizer_step(RT, model, opt, wrong)
    single_precision = optree.tree_map(lambda tensor: tensor.float(), grads_of(model))
    for cls in (torch.optim.AdamW, torch.optim.RMSprop):
        before = snapshot(model)
        with pytest.raises((GradientError, RuntimeError)):
            ff.optimizer_step(RT, model, ff.setup_optimizer(RT, model, cls), single_precision)
        assert_intact(before, model)


def test_gradients_in_another_order_are_put_right():
    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, model, torch.optim.SGD, lr=0.1)
    grads = grads_of(model)
    turned = dataclasses.replace(grads, params=MappingProxyType(dict(reversed(grads.params.items()))))
    one, _ = ff.optimizer_step(RT, model, opt, grads)
    two, _ = ff.optimizer_step(RT, model, opt, turned)
    same(one, [two.params[name] for name in one.params])


def test_gradients_with_a_graph_leave_none_on_the_model():
    model = ff.setup_model(RT, net())
    grads = optree.tree_map(lambda tensor: tensor.requires_grad_(), grads_of(model))
    for cls in (torch.optim.AdamW, torch.optim.RMSprop):
        after, opt = ff.optimizer_step(RT, model, ff.setup_optimizer(RT, model, cls), grads)
        assert not any(leaf.requires_grad for leaf in optree.tree_leaves((after, opt)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.optim.AdamW,), {"learning_rate": 1}, "there are: lr, betas"),
        ((torch.optim.RMSprop,), {"groups": {"*": {"decay": 1}}}, "there are: lr, alpha"),
        ((torch.optim.AdamW,), {"groups": {"*.biases": {}}}, "fits no trainable parameter; there are: 0.weight"),
        ((torch.optim.AdamW,), {"params": "2.*"}, "fits no trainable parameter"),
        (("adamw",), {}, "is a torch.optim class"),
        (((1, 2),), {}, "is a torch.optim class"),
    ],
)
def test_what_cannot_be_set_up_says_what_there_is(arguments, options, message):
    model = ff.setup_model(RT, net())
    with pytest.raises(ConfigurationError, match=message):
        ff.setup_optimizer(RT, model, *arguments, **options)


def test_the_class_checks_its_own_arguments():
    model = ff.setup_model(RT, net())
    with pytest.raises(ValueError, match="Invalid learning rate"):
        ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=-1.0)
    with pytest.raises(ValueError, match="Nesterov"):
        ff.setup_optimizer(RT, model, torch.optim.SGD, nesterov=True)


def test_wrong_steps_are_refused():
    model, other = ff.setup_model(RT, net()), ff.setup_model(RT, net(depth=3))
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW)
    grads = grads_of(model)
    with pytest.raises(GradientError, match="another model"):
        ff.optimizer_step(RT, model, opt, grads_of(other))
    with pytest.raises(ModelError, match="does not fit the optimizer"):
        ff.optimizer_step(RT, other, opt, grads_of(other))
    with pytest.raises(ConfigurationError, match="neither"):
        ff.optimizer_step(RT, model, opt)
    with pytest.raises(ConfigurationError, match="both"):
        ff.optimizer_step(RT, model, opt, grads, closure=lambda m: (0, grads))
    with pytest.raises(ConfigurationError, match="no hyperparameter learning_rate; there are: lr"):
        ff.optimizer_step(RT, model, opt, grads, learning_rate=1)
    with pytest.raises(ConfigurationError, match="1 groups"):
        ff.optimizer_step(RT, model, opt, grads, lr=[1, 2])
    with pytest.raises(ConfigurationError, match="amsgrad .* must be given to setup_optimizer"):
        ff.optimizer_step(RT, model, opt, grads, amsgrad=True, donate=True)
    ff.optimizer_step(RT, model, opt, grads, amsgrad=False)
    with pytest.raises(ConfigurationError, match="must return"):
        ff.optimizer_step(RT, model, opt, closure=lambda m: grads)
    with pytest.raises(ConfigurationError, match="one Model"):
        ff.optimizer_step(RT, {"net": model}, opt, grads)
    frozen = net().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no trainable"):
        ff.setup_optimizer(RT, ff.setup_model(RT, frozen), torch.optim.AdamW)


def test_loaded_state_must_fit():
    model = ff.setup_model(RT, net())
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW)
    deeper = ff.setup_model(RT, net(depth=3))
    with pytest.raises(ConfigurationError, match="names differ"):
        optimizer_from_tree(ff.setup_optimizer(RT, deeper, torch.optim.AdamW), optimizer_to_tree(opt))
    two = ff.setup_optimizer(RT, model, torch.optim.AdamW, groups={"*bias": {}})
    with pytest.raises(ConfigurationError, match="groups"):
        optimizer_from_tree(two, optimizer_to_tree(opt))
    tree = optimizer_to_tree(opt)
    del tree["state"]["0.bias"]["exp_avg"]
    with pytest.raises(ConfigurationError, match=r"no exp_avg for \['0.bias'\]"):
        optimizer_from_tree(opt, tree)


def test_the_optimizer_keeps_no_model_alive():
    model = ff.setup_model(RT, net())
    kept = [ff.setup_optimizer(RT, model, cls, params="0.weight") for cls in (torch.optim.AdamW, torch.optim.RMSprop)]
    independent = optree.tree_map(torch.clone, model)
    watched = weakref.ref(independent.params["0.weight"])
    opts = [ff.setup_optimizer(RT, independent, cls) for cls in (torch.optim.AdamW, torch.optim.RMSprop)]
    del independent
    assert watched() is None
    assert len(kept) == len(opts)


def test_a_plain_step_imports_neither_dynamo_nor_dtensor():  # which take a second each
    code = (
        "import sys, torch, fabricfn as ff\n"
        "rt = ff.init_runtime(accelerator='cpu', devices=1)\n"
        "model = ff.setup_model(rt, torch.nn.Linear(2, 2))\n"
        "grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).sum())\n"
        "for cls in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):\n"
        "    opt = ff.setup_optimizer(rt, model, cls, lr=0.1)\n"
        "    _, grads = grad_fn(model, torch.ones(2, 2))\n"
        "    model, opt = ff.optimizer_step(rt, model, opt, grads)\n"
        "assert not {'torch._dynamo', 'torch.distributed.tensor', 'sympy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_training_gets_somewhere():
    torch.manual_seed(0)
    rt = ff.Runtime(world=ff.World(), precision=ff.Precision.parse("32-true"), strategy=single())
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)))
    x = torch.randn(64, 2)
    y = (x[:, :1] * x[:, 1:]).sign()
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.05)
    grad_fn = ff.value_and_grad(rt, lambda net, x, y: F.mse_loss(net(x), y))
    first, _ = grad_fn(model, x, y)
    for _ in range(100):
        loss, grads = grad_fn(model, x, y)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
    assert loss < 0.3 * first
