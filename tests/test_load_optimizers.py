"""Optimizers that torch wrote go on as ours, or are refused by what does not fit."""

import copy

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.errors import CheckpointError
from tests.support.runtimes import RT
from tests.support.torch_files import Net, dcp_save, setup, state_of, trained


def assert_goes_on(rt, model, opt, net, optimizer, data=None):
    """One more step of ours gives the bits of one more step of torch's."""
    x = torch.ones(2, 4) * 2
    optimizer.zero_grad()
    net(x).backward()
    optimizer.step()
    grads = ff.value_and_grad(rt, lambda net, x: net(x))(model, x)[1]
    model, opt = ff.optimizer_step(rt, model, opt, grads)
    for name, value in state_of(model).items():
        torch.testing.assert_close(value, net.state_dict()[name], rtol=1e-6, atol=1e-7)
    return model, opt


OPTIMIZERS = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True, "fused": False}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
    (torch.optim.RMSprop, {"centered": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
]


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
def test_an_optimizer_of_torch_goes_on_as_ours(tmp_path, make, options):
    net = Net()
    optimizer = trained(net, make, **options)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    model = setup(RT)
    like = {"model": model, "optimizer": ff.setup_optimizer(RT, model, make, lr=7.0, **options)}
    loaded = ff.load_raw(RT, tmp_path / "a.pt", like)
    opt = loaded["optimizer"]
    assert opt.hyperparams[0]["lr"] == 0.1
    assert opt.step == (1 if "step" in next(iter(optimizer.state.values()), {}) else 0)
    assert_goes_on(RT, loaded["model"], opt, net, optimizer)
    assert like["optimizer"].step == 0
    assert like["optimizer"].hyperparams[0]["lr"] == 7.0


def test_a_distributed_checkpoint_of_an_optimizer_without_state_is_one(tmp_path):
    net = Net()
    dcp_save({"o": trained(net, torch.optim.SGD).state_dict()}, tmp_path / "dcp")
    opt = ff.load_raw(RT, tmp_path / "dcp", ff.setup_optimizer(RT, setup(RT), torch.optim.SGD, lr=7.0))
    assert opt.hyperparams[0]["lr"] == 0.1


def test_groups_go_by_their_order_and_a_step_count_may_be_a_number(tmp_path):
    net = Net()
    named = dict(net.named_parameters())
    biases = [value for name, value in named.items() if name.endswith("bias")]
    weights = [value for name, value in named.items() if not name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights}], lr=0.1)
    net(torch.ones(2, 4)).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for row in state["state"].values():
        row["step"] = int(row["step"])
    state["param_groups"][0]["initial_lr"] = 0.1
    torch.save({"m": net.state_dict(), "o": state}, tmp_path / "a.pt")
    model = ff.load_raw(RT, tmp_path / "a.pt", setup(RT))
    like = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=1.0, groups={"*bias": {"weight_decay": 0.0}})
    opt = ff.load_raw(RT, tmp_path / "a.pt", like)
    assert opt.step == 1
    assert_goes_on(RT, model, opt, net, optimizer)


def test_frozen_parameters_that_torch_counts_are_left_out(tmp_path):
    net, other = Net(), Net(9)
    for each in (net, other):
        each.mid.weight.requires_grad_(False)
    optimizer = trained(net)
    torch.save({"m": net.state_dict(), "o": optimizer.state_dict()}, tmp_path / "a.pt")
    model = ff.load_raw(RT, tmp_path / "a.pt", ff.setup_model(RT, other))
    opt = ff.load_raw(RT, tmp_path / "a.pt", ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=1.0))
    assert "mid.weight" not in opt.state
    assert_goes_on(RT, model, opt, net, optimizer)


def test_several_models_under_one_optimizer_are_counted_through(tmp_path):
    nets = [nn.Linear(2, 2), nn.Linear(2, 3)]
    optimizer = torch.optim.AdamW([value for net in nets for value in net.parameters()], lr=0.1)
    sum(net(torch.ones(1, 2)).sum() for net in nets).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    models = {"a": ff.setup_model(RT, nn.Linear(2, 2)), "b": ff.setup_model(RT, nn.Linear(2, 3))}
    opt = ff.load_raw(RT, tmp_path / "a.pt", ff.setup_optimizer(RT, models, torch.optim.AdamW, lr=1.0))
    assert torch.equal(opt.state["b"]["weight"]["exp_avg"], optimizer.state[nets[1].weight]["exp_avg"])


def test_an_optimizer_that_does_not_fit_is_named(tmp_path):
    net = Net()
    torch.save(trained(net, torch.optim.SGD, momentum=0.9).state_dict(), tmp_path / "sgd.pt")
    torch.save(torch.optim.AdamW(nn.Linear(4, 2).parameters()).state_dict(), tmp_path / "other.pt")
    model = setup(RT)
    adam = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=1.0)
    with pytest.raises(CheckpointError, match=r"momentum: AdamW has no such hyperparameter"):
        ff.load_raw(RT, tmp_path / "sgd.pt", adam)
    with pytest.raises(CheckpointError, match=r"the template has 5 parameters in it, the file 2"):
        ff.load_raw(RT, tmp_path / "other.pt", adam)
    grouped = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=1.0, groups={"*bias": {"lr": 2.0}})
    with pytest.raises(CheckpointError, match=r"the template has 2 groups, the file 1"):
        ff.load_raw(RT, tmp_path / "other.pt", grouped)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"no state dict of an optimizer.*inp\.weight"):
        ff.load_raw(RT, tmp_path / "model.pt", adam)
    swapped = torch.optim.AdamW(list(net.parameters())[::-1], lr=0.1)
    net(torch.ones(2, 4)).backward()
    swapped.step()
    torch.save(swapped.state_dict(), tmp_path / "swapped.pt")
    for how in ({}, {"fused": False}):  # without a first step torch's own loop has no state that shows shapes
        like = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=1.0, **how)
        with pytest.raises(CheckpointError, match="in the same order"):
            ff.load_raw(RT, tmp_path / "swapped.pt", like)


def test_lbfgs_keeps_its_history(tmp_path):
    net = nn.Linear(3, 2)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.save({"m": net.state_dict(), "o": optimizer.state_dict()}, tmp_path / "a.pt")
    model = ff.load_raw(RT, tmp_path / "a.pt", ff.setup_model(RT, nn.Linear(3, 2)), key="m")
    opt = ff.load_raw(RT, tmp_path / "a.pt", ff.setup_optimizer(RT, model, torch.optim.LBFGS, max_iter=3), key="o")
    optimizer.step(closure)
    grad_fn = ff.value_and_grad(RT, lambda net, x: net(x).square().mean())
    model, opt = ff.optimizer_step(RT, model, opt, closure=lambda model: grad_fn(model, x))
    torch.testing.assert_close(model.params["weight"], net.weight.detach())
