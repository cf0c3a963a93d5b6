"""Optimizers as values: groups, overrides, several models, copies, and what is refused."""

import copy
import pickle

import optree
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn.errors import ConfigurationError, GradientError, ModelError
from fabricfn.states import optimizer_from_tree, optimizer_to_tree
from fabricfn.strategies import single
from tests.support.optimizers import assert_intact, by_hand, functionally, grads_of, inputs, net, same, snapshot
from tests.support.runtimes import RT64


def test_groups_by_pattern_and_predicate():
    module = net()
    model = ff.setup_model(RT64, module)
    named = dict(module.named_parameters())
    groups = {"*.bias": {"weight_decay": 0.0}, lambda name: name.startswith("0"): {"lr": 0.5}}
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1, weight_decay=0.2, groups=groups)
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
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, cls, lr=0.1, groups={"*.bias": {}})
    named = dict(module.named_parameters())
    fused = {"fused": True} if cls is torch.optim.AdamW else {}
    pairs = [[named["0.bias"], named["1.bias"]], [named["0.weight"], named["1.weight"]]]
    reference = cls([{"params": pair} for pair in pairs], lr=0.1, **fused)
    for step, lr in enumerate([0.5, [0.01, 0.02], 0.1]):
        options = {} if step == 2 else {"lr": lr}
        model, opt = ff.optimizer_step(RT64, model, opt, grads_of(model, step), **options)
        for i, group in enumerate(reference.param_groups):
            group["lr"] = lr[i] if isinstance(lr, list) else lr
        by_hand(reference, module, steps=1, first=step)
    same(model, [param.detach() for param in module.parameters()])
    assert [group["lr"] for group in opt.hyperparams] == [0.1, 0.1]


def test_several_models_in_one_optimizer():
    modules = {"gen": net(1), "disc": net(2)}
    models = {name: ff.setup_model(RT64, module) for name, module in modules.items()}
    opt = ff.setup_optimizer(RT64, models, torch.optim.AdamW, lr=0.1, groups={"disc/*": {"lr": 0.2}})
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
        _, grads = ff.value_and_grad(RT64, joint)(models, inputs(step))
        models, opt = ff.optimizer_step(RT64, models, opt, grads, donate=step % 2 == 0)
        reference.zero_grad()
        joint(modules, inputs(step)).backward()
        reference.step()
    for name, module in modules.items():
        same(models[name], [param.detach() for param in module.parameters()])
    assert set(opt.state) == {"gen", "disc"}
    assert set(opt.state["gen"]["0.bias"]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(ConfigurationError, match="structure"):
        ff.optimizer_step(RT64, models["gen"], opt, grads["gen"])
    rebuilt = optimizer_from_tree(opt, optimizer_to_tree(opt))
    assert_intact(snapshot(opt), rebuilt)


@pytest.mark.parametrize(
    ("cls", "options"), [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.RMSprop, {})]
)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "tree_map", "flatten", "containers"])
def test_copies_go_on_to_the_same_bits(cls, options, way):
    model = ff.setup_model(RT64, net())
    model, opt = functionally(model, ff.setup_optimizer(RT64, model, cls, lr=0.1, **options), steps=2)
    other = {
        "pickle": lambda: pickle.loads(pickle.dumps(opt)),
        "deepcopy": lambda: copy.deepcopy(opt),
        "tree_map": lambda: optree.tree_map(torch.clone, opt),
        "flatten": lambda: optree.tree_unflatten(*reversed(optree.tree_flatten(opt)[:2])),
        "containers": lambda: optimizer_from_tree(
            ff.setup_optimizer(RT64, model, cls, lr=9.0, **options), copy.deepcopy(optimizer_to_tree(opt))
        ),
    }[way]()
    assert (other.step, other.hyperparams[0]["lr"]) == (2, 0.1)
    expected, opt = functionally(model, opt, steps=2, first=2)
    found, other = functionally(model, other, steps=2, first=2)
    same(found, list(expected.params.values()))
    assert_intact(snapshot(opt), other)


def test_optimizers_of_two_engines_combine():
    one, two = ff.setup_model(RT64, net(1)), ff.setup_model(RT64, net(2))
    opts = [ff.setup_optimizer(RT64, model, torch.optim.AdamW) for model in (one, two)]
    total = optree.tree_map(torch.add, *opts)
    assert total.step == 0
    assert repr(total) == "Optimizer(AdamW, 4 params, lr 0.001, step 0)"
    with pytest.raises(ValueError, match="Mismatch"):
        optree.tree_map(torch.add, opts[0], ff.setup_optimizer(RT64, one, torch.optim.Adam))


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
    model = ff.setup_model(RT64, net())
    with pytest.raises(ConfigurationError, match=message):
        ff.setup_optimizer(RT64, model, *arguments, **options)


def test_the_class_checks_its_own_arguments():
    model = ff.setup_model(RT64, net())
    with pytest.raises(ValueError, match="Invalid learning rate"):
        ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=-1.0)
    with pytest.raises(ValueError, match="Nesterov"):
        ff.setup_optimizer(RT64, model, torch.optim.SGD, nesterov=True)


def test_wrong_steps_are_refused():
    model, other = ff.setup_model(RT64, net()), ff.setup_model(RT64, net(depth=3))
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW)
    grads = grads_of(model)
    with pytest.raises(GradientError, match="another model"):
        ff.optimizer_step(RT64, model, opt, grads_of(other))
    with pytest.raises(ModelError, match="does not fit the optimizer"):
        ff.optimizer_step(RT64, other, opt, grads_of(other))
    with pytest.raises(ConfigurationError, match="neither"):
        ff.optimizer_step(RT64, model, opt)
    with pytest.raises(ConfigurationError, match="both"):
        ff.optimizer_step(RT64, model, opt, grads, closure=lambda m: (0, grads))
    with pytest.raises(ConfigurationError, match="no hyperparameter learning_rate; there are: lr"):
        ff.optimizer_step(RT64, model, opt, grads, learning_rate=1)
    with pytest.raises(ConfigurationError, match="1 groups"):
        ff.optimizer_step(RT64, model, opt, grads, lr=[1, 2])
    with pytest.raises(ConfigurationError, match="amsgrad .* must be given to setup_optimizer"):
        ff.optimizer_step(RT64, model, opt, grads, amsgrad=True, donate=True)
    ff.optimizer_step(RT64, model, opt, grads, amsgrad=False)
    with pytest.raises(ConfigurationError, match="must return"):
        ff.optimizer_step(RT64, model, opt, closure=lambda m: grads)
    with pytest.raises(ConfigurationError, match="one Model"):
        ff.optimizer_step(RT64, {"net": model}, opt, grads)
    frozen = net().requires_grad_(False)
    with pytest.raises(ConfigurationError, match="no trainable"):
        ff.setup_optimizer(RT64, ff.setup_model(RT64, frozen), torch.optim.AdamW)


def test_loaded_state_must_fit():
    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW)
    deeper = ff.setup_model(RT64, net(depth=3))
    with pytest.raises(ConfigurationError, match="names differ"):
        optimizer_from_tree(ff.setup_optimizer(RT64, deeper, torch.optim.AdamW), optimizer_to_tree(opt))
    two = ff.setup_optimizer(RT64, model, torch.optim.AdamW, groups={"*bias": {}})
    with pytest.raises(ConfigurationError, match="groups"):
        optimizer_from_tree(two, optimizer_to_tree(opt))
    tree = optimizer_to_tree(opt)
    del tree["state"]["0.bias"]["exp_avg"]
    with pytest.raises(ConfigurationError, match=r"no exp_avg for \['0.bias'\]"):
        optimizer_from_tree(opt, tree)


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
