"""What other tools wrote, into any strategy: the values of the real packages' files, bit for bit; hostile files run
nothing."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fabricfn as ff
from fabricfn.errors import CheckpointError, DonatedError
from tests.worlds import world_of

RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
GOLDEN = Path(__file__).parent / "golden"


pair = world_of("processes", 2)


def dcp_save(tree, folder):
    """By one process; torch warns that it is one."""
    with warnings.catch_warnings(action="ignore"):
        dcp.save(tree, checkpoint_id=folder, no_dist=True)


class Net(nn.Module):
    """Uneven shards, a tied weight, a buffer that is kept and one that is not."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inp, self.mid, self.out = nn.Linear(4, 7), nn.Linear(7, 3), nn.Linear(4, 7)
        self.out.weight = self.inp.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        with torch.no_grad():
            for value in self.state_dict().values():
                value.copy_(torch.randn(value.shape, generator=generator))

    def forward(self, x):
        return (self.mid(self.inp(x)) + self.seen).sum() + self.out(x).sum()


def state_of(model):
    """The whole tensors by name; every rank calls it."""
    values = {**model.params, **model.buffers}
    return {name: getattr(value, "full_tensor", lambda: value)().clone() for name, value in values.items()}


def assert_same(model, net):
    """A Model has the values of a module, bit for bit."""
    expected, found = net.state_dict(), state_of(model)
    assert set(found) == set(expected) - {"out.weight"}
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


def setup(rt, seed=9):
    return ff.setup_model(rt, Net(seed))


def trained(net, make=torch.optim.AdamW, **options):
    """A torch optimizer after one step, and the module."""
    optimizer = make(net.parameters(), lr=0.1, **options)
    net(torch.ones(2, 4)).backward()
    optimizer.step()
    return optimizer


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


# ---------------------------------------------------------------- PyTorch files and names


def test_a_state_dict_of_torch_save_becomes_a_model_and_the_template_is_left_alone(tmp_path):
    net, model = Net(), setup(RT)
    before = state_of(model)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = ff.load_raw(RT, tmp_path / "net.pt", model)
    assert_same(loaded, net)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())
    assert loaded.training == model.training
    assert ff.apply(RT, loaded, torch.ones(1, 4)).item() == net(torch.ones(1, 4)).item()


def test_files_from_before_torch_1_6_and_without_a_suffix_are_read(tmp_path):
    net = Net()
    torch.save(net.state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
    assert_same(ff.load_raw(RT, tmp_path / "old", setup(RT)), net)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_forward_module.module.{name}",
        lambda name: name.replace("mid.", "mid._orig_mod.").replace("inp.", "_fsdp_wrapped_module.inp."),
    ],
)
def test_what_wrappers_put_into_names_is_taken_away(tmp_path, wrap):
    net = Net()
    torch.save({"epoch": 3, "state_dict": {wrap(n): v for n, v in net.state_dict().items()}}, tmp_path / "a.pt")
    assert_same(ff.load_raw(RT, tmp_path / "a.pt", setup(RT)), net)


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.weight = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))

    net = Outer()
    for wrap in ("", "module."):
        torch.save({wrap + name: value for name, value in net.state_dict().items()}, tmp_path / "a.pt")
        model = ff.setup_model(RT, Outer())
        if not wrap:
            loaded = ff.load_raw(RT, tmp_path / "a.pt", model)
            assert torch.equal(loaded.params["module.weight"], net.module.weight)
        else:  # module.weight is the name of both
            with pytest.raises(CheckpointError, match=r"both become module\.weight.*prefix"):
                ff.load_raw(RT, tmp_path / "a.pt", model)
            loaded = ff.load_raw(RT, tmp_path / "a.pt", model, prefix="module.")
            assert torch.equal(loaded.params["module.weight"], net.module.weight)
            assert torch.equal(loaded.params["weight"], net.weight)


def test_key_prefix_and_rename_say_what_is_meant(tmp_path):
    net, ema = Net(1), Net(2)
    torch.save({"model": net.state_dict(), "ema": ema.state_dict()}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"several.*model, ema.*key="):
        ff.load_raw(RT, tmp_path / "two.pt", setup(RT))
    assert_same(ff.load_raw(RT, tmp_path / "two.pt", setup(RT), key="ema"), ema)
    with pytest.raises(CheckpointError, match=r"two\.pt.*key='emma' names nothing.*model, ema"):
        ff.load_raw(RT, tmp_path / "two.pt", setup(RT), key="emma")
    whole = {f"net.{n}": v for n, v in net.state_dict().items()} | {"head.weight": torch.ones(2)}
    torch.save(whole, tmp_path / "whole.pt")
    assert_same(ff.load_raw(RT, tmp_path / "whole.pt", setup(RT), prefix="net."), net)
    torch.save({n.replace("inp", "first"): v for n, v in net.state_dict().items()}, tmp_path / "renamed.pt")
    assert_same(ff.load_raw(RT, tmp_path / "renamed.pt", setup(RT), rename={"first.*": "inp.*"}), net)
    with pytest.raises(CheckpointError, match=r"same number of \*"):
        ff.load_raw(RT, tmp_path / "renamed.pt", setup(RT), rename={"first.*": "inp"})
    more = {**net.state_dict(), "junk": torch.ones(1)}
    torch.save(more, tmp_path / "more.pt")
    dropped = ff.load_raw(RT, tmp_path / "more.pt", setup(RT), rename=lambda name: None if name == "junk" else name)
    assert_same(dropped, net)


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    state = Net().state_dict()
    del state["mid.bias"]
    state |= {"extra": torch.ones(2), "inp.bias": torch.ones(6), "seen": torch.zeros(3, dtype=torch.float64)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as error:
        ff.load_raw(RT, tmp_path / "a.pt", setup(RT))
    text = str(error.value)
    assert "a.pt does not fit the template in 4 places" in text
    assert "mid.bias: is in the template, not in the file" in text
    assert "extra: is in the file, not in the template" in text
    assert "inp.bias: the template has float32[7], the file float32[6]" in text
    assert "seen: the template has float32[3], the file float64[3]. Write cast=True" in text


def test_not_strict_takes_what_fits_and_says_what_did_not(tmp_path):
    net, model = Net(), setup(RT)
    state = net.state_dict()
    del state["mid.bias"]
    torch.save({**state, "extra": torch.arange(2)}, tmp_path / "a.pt")
    loaded = ff.load_raw(RT, tmp_path / "a.pt", model, strict=False)
    assert loaded.missing == ("mid.bias",)
    assert loaded.rest["extra"].tolist() == [0, 1]
    assert torch.equal(loaded.tree.params["mid.bias"], model.params["mid.bias"])
    assert torch.equal(loaded.tree.params["inp.weight"], net.inp.weight)


def test_cast_converts_floating_tensors_only_when_asked(tmp_path):
    net = Net()
    torch.save({name: value.bfloat16() for name, value in net.state_dict().items()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="cast=True"):
        ff.load_raw(RT, tmp_path / "a.pt", setup(RT))
    assert_same(ff.load_raw(RT, tmp_path / "a.pt", setup(RT), cast=True), net.bfloat16().float())


def test_tied_names_may_be_there_once_or_twice_but_not_with_two_values(tmp_path):
    net = Net()
    for without in ("out.weight", "inp.weight"):
        state = net.state_dict()
        del state[without]
        save_file(state, tmp_path / "once.safetensors")
        assert_same(ff.load_raw(RT, tmp_path / "once.safetensors", setup(RT)), net)
    twice = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(twice, tmp_path / "twice.safetensors")
    assert_same(ff.load_raw(RT, tmp_path / "twice.safetensors", setup(RT)), net)
    twice["out.weight"][0, 0] += 1
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match=r"out\.weight and inp\.weight are tied.*different values"):
        ff.load_raw(RT, tmp_path / "twice.safetensors", setup(RT))


def test_plain_containers_come_back_where_there_is_no_template(tmp_path):
    shared = torch.randn(3, 5).t()
    tree = {
        "a": shared, "b": shared, "n": [1, 2.5, "x", None, (True, b"y")], 3: torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4), "z": torch.tensor(1 + 2j).conj(),
    }  # fmt: skip
    torch.save(tree, tmp_path / "a.pt")
    found = ff.load_raw(RT, tmp_path / "a.pt")
    assert list(found) == list(tree)
    assert found["n"] == tree["n"]
    assert found["a"] is found["b"]
    for key in ("a", 3, "empty", "z"):
        assert found[key].dtype == tree[key].dtype
        assert torch.equal(found[key], tree[key])
    found["a"].zero_()  # it owns its memory
    assert torch.equal(torch.load(tmp_path / "a.pt")["a"], shared)
    part = ff.load_raw(RT, tmp_path / "a.pt", {"n": None, "a": torch.zeros(5, 3)})
    assert list(part) == ["n", "a"]
    assert ff.load_raw(RT, tmp_path / "a.pt", key="n/4/0") is True


def test_a_spent_template_is_refused(tmp_path):
    model = setup(RT)
    opt = ff.setup_optimizer(RT, model, torch.optim.SGD, lr=0.1)
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    grads = ff.value_and_grad(RT, lambda net, x: net(x))(model, torch.ones(1, 4))[1]
    ff.optimizer_step(RT, model, opt, grads, donate=True)
    with pytest.raises(DonatedError):
        ff.load_raw(RT, tmp_path / "a.pt", model)


# ---------------------------------------------------------------- optimizers

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


# ---------------------------------------------------------------- every format into every strategy


def written(folder, net, optimizer):
    """One net in the formats of real packages, written by one process."""
    folder.mkdir()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "torch.pt")
    once = {name: value.clone() for name, value in net.state_dict().items()}
    save_file(once, folder / "net.safetensors")
    dcp_save(state, folder / "dcp")


def load_each(rt, folder, mesh=None):
    """Every file into a model under this strategy; the whole tensors, and the optimizer's state."""
    found = {}
    for name in ("torch.pt", "net.safetensors", "dcp", "dcp2"):
        model = setup(rt)
        loaded = ff.load_raw(rt, folder / name, model, key="model" if name != "net.safetensors" else None)
        assert [type(v) for v in loaded.params.values()] == [type(v) for v in model.params.values()]
        found[name] = state_of(loaded)
        if name != "net.safetensors":
            like = ff.setup_optimizer(rt, loaded, torch.optim.AdamW, lr=1.0)
            opt = ff.load_raw(rt, folder / name, like)
            moments = {param: row["exp_avg"] for param, row in opt.state.items()}
            found[name + "/opt"] = opt.step, {n: getattr(v, "full_tensor", lambda: v)() for n, v in moments.items()}
    return found


def save_sharded(rt, folder):
    """FSDP2's own save by real ranks: DTensors of uneven parts, the optimizer by name."""
    net = Net(5)
    mesh = init_device_mesh("cpu", (rt.world_size,))
    for part in (net.mid, net):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(2, 4)).backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer), "epoch": 3}
    dcp.save(state, checkpoint_id=folder / "dcp2")
    whole = {name: getattr(value, "full_tensor", lambda: value)() for name, value in net.state_dict().items()}
    rows = {name: optimizer.state[value]["exp_avg"].full_tensor() for name, value in net.named_parameters()}
    return whole, rows


def test_every_format_loads_into_every_strategy(tmp_path, pair):
    folder = tmp_path / "files"
    net = Net(5)
    optimizer = trained(net)
    written(folder, net, optimizer)
    whole, rows = pair.run(save_sharded, folder)[0]
    expected = {name: value for name, value in net.state_dict().items() if name != "out.weight"}
    ours = {name: optimizer.state[value]["exp_avg"] for name, value in net.named_parameters()}
    worlds = [("single", lambda: [load_each(RT, folder)])]
    worlds += [(name, lambda name=name: pair.run(load_each, folder, strategy=name)) for name in ("ddp", "fsdp")]
    for strategy, run in worlds:
        for found in run():
            for name in ("torch.pt", "net.safetensors", "dcp", "dcp2"):
                target = expected if name != "dcp2" else {n: v for n, v in whole.items() if n != "out.weight"}
                assert set(found[name]) == set(target)
                assert all(torch.equal(value, target[n]) for n, value in found[name].items()), (strategy, name)
            for name in ("torch.pt/opt", "dcp/opt", "dcp2/opt"):
                step, moments = found[name]
                target = ours if name != "dcp2/opt" else rows
                assert step == 1
                assert all(torch.equal(value, target[n]) for n, value in moments.items()), (strategy, name)


def load_placed(rt, folder):
    """A tensor of any placement takes its own part: rows, columns, both, a copy."""
    mesh = DeviceMesh.from_group(rt.world.group, "cpu")
    for name, at in (("torch.pt", "model/inp.weight"), ("net.safetensors", "inp.weight"), ("dcp", "model/inp.weight")):
        value = ff.load_raw(rt, folder / name, key=at)
        for placement in (Shard(0), Shard(1), Replicate()):
            like = distribute_tensor(torch.zeros_like(value), mesh, [placement], src_data_rank=None)
            found = ff.load_raw(rt, folder / name, like, key=at)
            assert found._spec == like._spec
            expected = distribute_tensor(value, mesh, [placement], src_data_rank=None)
            assert torch.equal(found.to_local(), expected.to_local())


def test_a_part_of_a_rank_is_taken_from_every_format(tmp_path, pair):
    net = Net(5)
    written(tmp_path / "files", net, trained(net))
    pair.run(load_placed, tmp_path / "files")


def only_on_rank_one(rt, path):
    if rt.rank == 1:
        path = path.with_name("other.pt")
    ff.load_raw(rt, path)


def test_all_ranks_fail_when_one_does_and_when_their_files_differ(tmp_path, pair):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"(?s)failed on 1 of 2 ranks.*no file or folder.*other\.pt"):
        pair.run(only_on_rank_one, tmp_path / "a.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(ff.MismatchError, match="different files"):
        pair.run(only_on_rank_one, tmp_path / "a.pt")


# ---------------------------------------------------------------- Fabric


class FabricNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(2))


@pytest.mark.parametrize("name", ["full.ckpt", "sharded"])
def test_what_fabric_saved_is_read(name):
    """Files of the real package; tests/golden/make_fabric.py has the formulas."""
    model = ff.setup_model(RT, FabricNet())
    like = {"model": model, "optimizer": ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=1.0), "epoch": 0}
    loaded = ff.load_raw(RT, GOLDEN / "fabric" / name, like)
    assert loaded["epoch"] == 7
    assert torch.equal(loaded["model"].params["lin.weight"], torch.arange(12.0).reshape(3, 4) / 8)
    assert loaded["model"].params["lin.bias"].tolist() == [-1, 0, 1]
    assert loaded["model"].buffers["seen"].tolist() == [5, 6]
    opt = loaded["optimizer"]
    gradient = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(3, 4)
    assert torch.equal(opt.state["lin.weight"]["exp_avg"], gradient / 2)
    assert torch.equal(opt.state["lin.weight"]["exp_avg_sq"], gradient.square() / 2)
    assert (opt.step, opt.hyperparams[0]["betas"], opt.hyperparams[0]["lr"]) == (1, (0.5, 0.5), 0.0)
    everything = ff.load_raw(RT, GOLDEN / "fabric" / name)
    assert everything["note"] == {"rates": [0.5, 0.25]}
    assert ff.load_raw(RT, GOLDEN / "fabric" / name, key="note/rates") == [0.5, 0.25]


# ---------------------------------------------------------------- files that mean harm


class Evil:
    """What runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_code_is_refused_by_name_and_nothing_runs(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Evil(ran)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(ran), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match=rf"(?s){name}.*(posix|nt)\.system.*torch\.save"):
            ff.load_raw(RT, tmp_path / name)
    torch.save({"w": torch.ones(2), "x": nn.Linear(1, 1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt wants to unpickle torch\.nn\.modules\.linear\.Linear"):
        ff.load_raw(RT, tmp_path / "c.pt")
    assert not ran.exists()


@pytest.fixture
def distributed(tmp_path):
    """A folder of torch.distributed.checkpoint."""
    dcp_save({"w": torch.arange(6.0).reshape(2, 3), "n": 3}, tmp_path / "dcp")
    return tmp_path / "dcp"


def test_metadata_that_names_other_classes_is_refused_and_nothing_runs(distributed, tmp_path):
    ran, path = tmp_path / "ran", distributed / ".metadata"
    whole = path.read_bytes()
    metadata = pickle.loads(whole)
    metadata.planner_data["w"] = Evil(ran)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"(?s)\.metadata wants to unpickle (posix|nt)\.system.*StorageMetadata"):
        ff.load_raw(RT, distributed)
    for global_name in ("builtins\neval", "torch\nload", "torch.hub\nload", "fabricfn\nload"):
        path.write_bytes(b"c" + global_name.encode() + b"\n(S'1'\ntR.")
        with pytest.raises(CheckpointError, match="wants to unpickle " + global_name.replace("\n", r"\.")):
            ff.load_raw(RT, distributed)
    # the stand-ins of one file are not those of the next: what a file does to them stays there
    path.write_bytes(b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}U\x05stateK\x01s\x86b.")
    with pytest.raises(CheckpointError, match="no whole metadata"):
        ff.load_raw(RT, distributed)
    path.write_bytes(whole)
    assert ff.load_raw(RT, distributed)["n"] == 3
    assert not ran.exists()


def test_metadata_that_contradicts_itself_or_the_files_is_refused(distributed):
    path = distributed / ".metadata"
    whole = path.read_bytes()

    def refused(change, match):
        metadata = pickle.loads(whole)
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=match):
            ff.load_raw(RT, distributed)

    def place(metadata, **changes):
        for index, info in metadata.storage_data.items():
            if index.fqn == "w":
                for key, value in changes.items():
                    setattr(info, key, value)

    refused(lambda m: place(m, relative_path="../other.distcp"), r"file name '\.\./other\.distcp'")
    refused(lambda m: place(m, relative_path="/etc/passwd"), r"file name '/etc/passwd'")
    refused(lambda m: place(m, relative_path="__9_9.distcp"), r"__9_9\.distcp is missing")
    refused(lambda m: place(m, offset=1 << 40), "cut off or of another save")
    refused(lambda m: place(m, length=4), "fewer than its elements")
    refused(lambda m: place(m, transform_descriptors=["ZStandard"]), "cannot be undone")
    refused(lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([4, 3])), "leave a gap")
    refused(lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([1, 3])), "lies outside")
    refused(lambda m: m.state_dict_metadata["w"].chunks.append(m.state_dict_metadata["w"].chunks[0]), "overlap")
    refused(lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.float16), "something else for 'w'")
    refused(lambda m: m.planner_data.update(n=("w", "n")), "inside of another|two entries")
    for size in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"\.metadata is no whole metadata"):
            ff.load_raw(RT, distributed)


def test_a_piece_of_a_distributed_checkpoint_runs_nothing_and_a_link_is_refused(distributed, tmp_path):
    ran = tmp_path / "ran"
    file = distributed / "__0_0.distcp"
    whole = file.read_bytes()
    dcp_save({"w": torch.ones(2), "x": Evil(ran)}, tmp_path / "evil")
    with pytest.raises(CheckpointError, match=r"(?s)distcp, the entry 'x', wants to unpickle (posix|nt)\.system"):
        ff.load_raw(RT, tmp_path / "evil")
    assert ff.load_raw(RT, tmp_path / "evil", {"w": None})["w"].tolist() == [1, 1]  # what is not wanted is not read
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has .* bytes, \.metadata wants"):
        ff.load_raw(RT, distributed)
    file.write_bytes(whole[:40] + b"\0" * (len(whole) - 40))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp, the entry"):
        ff.load_raw(RT, distributed)
    (tmp_path / "elsewhere").write_bytes(whole)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp cannot be opened"):
        ff.load_raw(RT, distributed)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", "a.txt", "", 3,
                                  "C:\\a.safetensors", ".hidden.safetensors"])  # fmt: skip
def test_an_index_leads_nowhere_but_beside_itself(tmp_path, name):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json names the file"):
        ff.load_raw(RT, folder)


def test_shards_of_pytorch_files_are_read(tmp_path):
    state = Net().state_dict()
    names = list(state)
    placed = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(placed.values()):
        torch.save({name: state[name] for name in names if placed[name] == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert_same(ff.load_raw(RT, tmp_path, setup(RT)), Net())
    assert_same(ff.load_raw(RT, tmp_path / "pytorch_model.bin.index.json", setup(RT)), Net())


def test_shards_that_are_links_missing_or_of_another_save_are_refused(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a\.safetensors is missing"):
        ff.load_raw(RT, folder)
    (folder / "a.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is a link that leads out of the folder"):
        ff.load_raw(RT, folder)
    (folder / "a.safetensors").unlink()
    save_file({"v": torch.ones(1)}, folder / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"not in their files: w in a\.safetensors"):
        ff.load_raw(RT, folder)
    for text in ("", "{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json is no whole index"):
            ff.load_raw(RT, folder)


def test_damaged_safetensors_files_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(6.0), "v": torch.ones(2, dtype=torch.int8)}, path)
    whole = path.read_bytes()

    def refused(data):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.safetensors is no whole safetensors file"):
            ff.load_raw(RT, path)

    for size in range(0, len(whole), 7):
        refused(whole[:size])
    refused(whole + b"x")
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}

    def packed(header, size=8):
        text = json.dumps(header).encode() if not isinstance(header, bytes) else header
        return len(text).to_bytes(8, "little") + text + bytes(size)

    path.write_bytes(packed(header))
    assert ff.load_raw(RT, path)["w"].tolist() == [0, 0]
    refused((1 << 63).to_bytes(8, "little") + whole[8:])
    entry = header["w"]
    for change in ({"shape": [3]}, {"shape": [-2]}, {"shape": "2"}, {"shape": [1 << 62, 1 << 62]},
                   {"data_offsets": [8, 0]}, {"data_offsets": [0]}, {"shape": [2.0]},
                   {"shape": [1] * 70 + [2]}):  # fmt: skip
        refused(packed({"w": {**entry, **change}}))
    refused(packed({"w": entry, "v": entry}))
    refused(
        packed(
            b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "w": ' + json.dumps(entry).encode() + b"}"
        )
    )
    refused(packed({"w": entry}, 16))
    path.write_bytes(packed({"w": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}))
    with pytest.raises(CheckpointError, match="dtype F4, which is not known"):
        ff.load_raw(RT, path)


def test_damaged_torch_files_and_other_files_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(600.0)}, path)
    whole = path.read_bytes()
    for size in (0, 1, 3, 4, 30, 200, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"a\.pt cannot be read as a PyTorch file"):
            ff.load_raw(RT, path)
    path.write_text("hello, this is no checkpoint")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        ff.load_raw(RT, path)
    torch.save({"w": torch.ones(1).expand(1 << 40)}, path)
    with pytest.raises(CheckpointError, match=r"w: .* are a view of 4"):
        ff.load_raw(RT, path)


def test_folders_that_are_nothing_known_say_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match="no file or folder"):
        ff.load_raw(RT, tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint that is known.*notes\.txt"):
        ff.load_raw(RT, tmp_path)
    receipt = ff.save(RT, tmp_path / "ours", {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"ff\.load\(rt"):
        ff.load_raw(RT, receipt.path)
    with pytest.raises(CheckpointError, match="URL"):
        ff.load_raw(RT, "s3://bucket/a.pt")


def test_nothing_is_unpickled_by_pickle_itself_and_nothing_is_run(distributed):
    """An audit hook sees every class that Python's pickle looks up, in a process of its own."""
    code = """
import sys, torch, fabricfn as ff
rt = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
load, watched, seen = ff.load_raw, ("pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen"), []
sys.addaudithook(lambda event, args: event in watched and seen.append((event, args)))
print(load(rt, sys.argv[1])["n"], [entry for entry in seen if entry[0] not in ("exec", "compile")])
print(sorted(name for name in sys.modules if name.startswith("torch.distributed.checkpoint")))
"""
    done = subprocess.run([sys.executable, "-c", code, str(distributed)], check=True, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.stdout.splitlines() == ["3 []", "[]"]


def test_values_of_a_file_are_those_that_its_own_package_reads(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2, 2).to(torch.float8_e4m3fn), "c": torch.tensor(3),
               "d": torch.empty(0, 2), "e": torch.tensor([True, False]), "f": torch.randn(4, 2).bfloat16()}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    theirs, ours = load_file(tmp_path / "a.safetensors"), ff.load_raw(RT, tmp_path / "a.safetensors")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
        assert torch.equal(ours[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
