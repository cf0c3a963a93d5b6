"""Classes of torch and of the user's own, and their instances: their bits, their state, their hooks, their closures."""

import copy
from types import MappingProxyType

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.errors import ConfigurationError, GradientError
from fabricfn.states import optimizer_from_tree, optimizer_to_tree
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
)
from tests.support.runtimes import RT64

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


@pytest.mark.parametrize(("cls", "options"), STOCK)
@pytest.mark.parametrize("donate", [False, True])
def test_every_class_has_its_own_bits(cls, options, donate):
    module = net()
    model = ff.setup_model(RT64, module)
    model, opt = functionally(model, ff.setup_optimizer(RT64, model, cls, **options), donate=donate)
    same(model, by_hand(cls(module.parameters(), **options), module))
    assert opt.step == 4
    assert all(param.grad is None for param in model.params.values())


def test_muon_on_matrices_beside_adamw_on_the_rest():
    module = net()
    model = ff.setup_model(RT64, module)
    muon = ff.setup_optimizer(RT64, model, torch.optim.Muon, params="*weight", lr=0.01)
    adamw = ff.setup_optimizer(RT64, model, torch.optim.AdamW, params=lambda name: name.endswith("bias"), lr=0.02)
    named = dict(module.named_parameters())
    reference = [
        torch.optim.Muon([named["0.weight"], named["1.weight"]], lr=0.01),
        torch.optim.AdamW([named["0.bias"], named["1.bias"]], lr=0.02, fused=True),
    ]
    for step in range(3):
        grads = grads_of(model, step)
        model, muon = ff.optimizer_step(RT64, model, muon, grads)
        model, adamw = ff.optimizer_step(RT64, model, adamw, grads)
        module.zero_grad()
        loss_fn(module, inputs(step)).backward()
        for optimizer in reference:
            optimizer.step()
    same(model, [param.detach() for param in module.parameters()])
    assert set(adamw.state) == {"0.bias", "1.bias"}


def test_sparse_adam():
    table = nn.Embedding(5, 3, sparse=True).double()
    model = ff.setup_model(RT64, table)
    opt = ff.setup_optimizer(RT64, model, torch.optim.SparseAdam, lr=0.1)
    reference = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    for rows in ([0, 1], [1, 4]):
        table.zero_grad()
        table(torch.tensor(rows)).sum().backward()
        params = MappingProxyType({"weight": table.weight.grad.clone()})
        model, opt = ff.optimizer_step(RT64, model, opt, ff.Grads(params=params, ref=model.ref))
        reference.step()
    same(model, [table.weight.detach()])
    dense = ff.setup_optimizer(RT64, model, torch.optim.AdamW)
    with pytest.raises(GradientError, match="SparseAdam"):
        ff.optimizer_step(RT64, model, dense, ff.Grads(params=params, ref=model.ref))


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
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, instance)
    assert len(opt.hyperparams) == (1 if named else 2)
    model, opt = functionally(model, opt, first=stepped)
    same(model, by_hand(reference, twin, first=stepped), atol=1e-12)
    same(ff.setup_model(RT64, module), [param.detach() for param in module.parameters()])


def test_an_instance_over_named_parameters_of_a_copy_is_matched_by_name():
    module = net()
    instance = torch.optim.AdamW(list(copy.deepcopy(module).named_parameters()), lr=0.1)
    model = ff.setup_model(RT64, module)
    model, _ = functionally(model, ff.setup_optimizer(RT64, model, instance))
    same(model, by_hand(torch.optim.AdamW(module.parameters(), lr=0.1, fused=True), module))


def test_an_instance_over_other_parameters_is_refused():
    model = ff.setup_model(RT64, net())
    with pytest.raises(ConfigurationError, match="none of the module"):
        ff.setup_optimizer(RT64, model, torch.optim.AdamW(net(1).parameters()))
    with pytest.raises(ConfigurationError, match="leave out lr"):
        ff.setup_optimizer(RT64, model, torch.optim.AdamW(net(1).parameters()), lr=0.1)


def test_hooks_of_an_instance_are_called():
    module = net()
    instance = torch.optim.AdamW(module.parameters(), lr=0.1)
    calls = []
    instance.register_step_post_hook(lambda *_: calls.append(1))
    model = ff.setup_model(RT64, module)
    functionally(model, ff.setup_optimizer(RT64, model, instance), steps=2)
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
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, instance)
    grads = grads_of(model)
    before = snapshot(grads)
    arguments = {"closure": lambda _: (0.0, grads)} if how == "closure" else {"grads": grads}
    one, _ = ff.optimizer_step(RT64, model, opt, **arguments)
    two, _ = ff.optimizer_step(RT64, model, opt, **arguments)
    assert_intact(before, grads)
    same(two, list(one.params.values()))
    plain = ff.setup_optimizer(RT64, model, torch.optim.SGD, lr=0.05)
    same(one, list(ff.optimizer_step(RT64, model, plain, grads)[0].params.values()), atol=1e-15)


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
    model = ff.setup_model(RT64, module)
    model, opt = functionally(model, ff.setup_optimizer(RT64, model, Late), donate=donate)
    same(model, by_hand(Late(module.parameters()), module))
    assert opt.shared == {"t": 4}


def test_a_class_of_the_users_own_over_lbfgs():
    class Own(torch.optim.LBFGS):
        """`t` is a slot of LBFGS, too."""

        def step(self, closure):
            self.t = getattr(self, "t", 0) + 1
            return super().step(closure)

    model = ff.setup_model(RT64, net())
    found = []
    for cls in (torch.optim.LBFGS, Own):
        after, opt = model, ff.setup_optimizer(RT64, model, cls, lr=0.5, max_iter=5)
        for _ in range(2):
            after, opt = ff.optimizer_step(
                RT64, after, opt, closure=lambda m: ff.value_and_grad(RT64, loss_fn)(m, inputs(0))
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
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, Counting, lr=0.1, scale=2.0)
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
    model = ff.setup_model(RT64, module)
    grad_fn = ff.value_and_grad(RT64, loss_fn)
    options = {"lr": 0.5, "max_iter": 5, "line_search_fn": search}
    opt = ff.setup_optimizer(RT64, model, torch.optim.LBFGS, **options)
    with pytest.raises(ConfigurationError, match="closure="):
        ff.optimizer_step(RT64, model, opt, grads_of(model))
    reference = torch.optim.LBFGS(module.parameters(), **options)
    before = snapshot(model)
    start = model
    for step in range(4):
        x = inputs(step)
        if step == 2:
            opt = optimizer_from_tree(opt, optimizer_to_tree(opt))
        model, opt = ff.optimizer_step(
            RT64, model, opt, closure=lambda m, x=x: grad_fn(m, x), donate=donate and step > 0
        )

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
    model = ff.setup_model(RT64, module)
    grad_fn = ff.value_and_grad(RT64, loss_fn)
    opt = ff.setup_optimizer(RT64, model, torch.optim.SGD, lr=0.1)
    one, _ = ff.optimizer_step(RT64, model, opt, closure=lambda m: grad_fn(m, inputs(0)))
    two, _ = ff.optimizer_step(RT64, model, opt, grads_of(model))
    assert_intact(snapshot(one), two)
    assert int(one.buffers["1.num_batches_tracked"]) == 1
    assert int(model.buffers["1.num_batches_tracked"]) == 0
    lbfgs = ff.setup_optimizer(RT64, model, torch.optim.LBFGS, max_iter=3)
    after, lbfgs = ff.optimizer_step(RT64, model, lbfgs, closure=lambda m: grad_fn(m, inputs(0)))
    assert int(after.buffers["1.num_batches_tracked"]) == lbfgs.shared["func_evals"] > 1
