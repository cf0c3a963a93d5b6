"""What other tools wrote, as a model or as plain containers: names, what fits, and the values bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fabricfn as ff
from fabricfn.errors import CheckpointError, DonatedError
from tests.support.runtimes import RT
from tests.support.torch_files import Net, assert_same, setup, state_of

GOLDEN = Path(__file__).parent / "golden"


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


def test_shards_of_pytorch_files_are_read(tmp_path):
    state = Net().state_dict()
    names = list(state)
    placed = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(placed.values()):
        torch.save({name: state[name] for name in names if placed[name] == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert_same(ff.load_raw(RT, tmp_path, setup(RT)), Net())
    assert_same(ff.load_raw(RT, tmp_path / "pytorch_model.bin.index.json", setup(RT)), Net())


def test_values_of_a_file_are_those_that_its_own_package_reads(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2, 2).to(torch.float8_e4m3fn), "c": torch.tensor(3),
               "d": torch.empty(0, 2), "e": torch.tensor([True, False]), "f": torch.randn(4, 2).bfloat16()}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    theirs, ours = load_file(tmp_path / "a.safetensors"), ff.load_raw(RT, tmp_path / "a.safetensors")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
        assert torch.equal(ours[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
