"""DeepSpeed's checkpoints, written by the real package (tests/golden/make_deepspeed.py), into any strategy."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn, optim

import fabricfn as ff
from fabricfn import testing
from fabricfn.checkpoint.foreign.stretches import joined
from fabricfn.checkpoint.foreign.values import read
from fabricfn.errors import CheckpointError
from fabricfn.sharding import whole
from tests.support.runtimes import RT
from tests.support.worlds import world_of

FOLDER = Path(__file__).parent / "golden" / "deepspeed"

spec = importlib.util.spec_from_file_location("make_deepspeed", FOLDER.parent / "make_deepspeed.py")
formulas = importlib.util.module_from_spec(spec)
sys.modules["make_deepspeed"] = formulas
spec.loader.exec_module(formulas)

WRITTEN = ("stage0", "stage1", "stage2_bf16", "stage3", "stage1_universal", "stage3_universal")
PLACES = {
    "single": ("single", 1),
    "ddp": ("ddp", 2),
    "ddp, sharded optimizer": (ff.strategies.ddp(shard_optimizer=True), 3),
    "fsdp": ("fsdp", 3),
}


ranks = world_of("threads", 3)


def blank():
    """The module with other values everywhere."""
    net = formulas.Net()
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            value.fill_(9)
    return net


def template(rt, bf16):
    model = ff.setup_model(rt, blank())
    kind = optim.SGD if bf16 else optim.AdamW
    options = {"momentum": 0.9} if bf16 else {}
    groups = {"two.*": {"weight_decay": 0.25}}
    opt = ff.setup_optimizer(rt, model, kind, lr=1.0, groups=groups, weight_decay=0.125, **options)
    return {"module": model, "optimizer": opt, "epoch": 0, "global_steps": 0, "best": None}


def expected(bf16):
    """(parameters, state, hyperparameters) by the formulas."""
    net = formulas.Net()
    params, state = {}, {}
    for name, value in net.named_parameters():
        old, grad = value.detach(), formulas.ramp(value.shape)
        params[name] = old
        if not value.requires_grad:
            continue
        if bf16:
            moved = grad + (0.0 if "two" in name else 0.5) * old
            params[name] = old - formulas.STEP * moved
            state[name] = {"momentum_buffer": moved}
        else:
            slots = {"exp_avg": grad / 2, "exp_avg_sq": grad * grad * 0.75}
            state[name] = {"step": torch.tensor(1.0), **slots}
    rates = {"lr": formulas.STEP, "momentum": 0.5} if bf16 else {"lr": 0.0, "betas": (0.5, 0.25)}
    return params, state, [{**rates, "weight_decay": decay} for decay in (0.0, 0.5)]


def loading(rt, name):
    bf16 = "bf16" in name  # in which what no optimizer has was written
    found = ff.load_raw(rt, FOLDER / name, template(rt, bf16), cast=bf16)
    model, opt = found["module"], found["optimizer"]
    rest = {key: found[key] for key in ("epoch", "global_steps", "best")}
    return (
        ff.gather_params(rt, model),
        dict(model.buffers),
        ff.tree_map(whole, opt.state),
        opt.hyperparams,
        rest,
        opt.step,
    )


@pytest.mark.parametrize(("strategy", "size"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("name", WRITTEN)
def test_what_deepspeed_wrote_is_read_bit_for_bit(ranks, name, strategy, size):
    params, state, groups = expected("bf16" in name)
    for found in ranks.run(loading, name, strategy=strategy, world_size=size):
        assert testing.difference(found[0], params) is None
        assert {key: value.tolist() for key, value in found[1].items()} == {"seen": [3, 5], "mean": [0.5, 0.25]}
        assert testing.difference(found[2], state) is None
        for group, wanted in zip(found[3], groups, strict=True):
            assert {key: group[key] for key in wanted} == wanted
        assert found[4] == {"epoch": 7, "global_steps": 1, "best": [0.5, "x"]}
        assert found[5] == ("bf16" not in name)  # SGD keeps no count


def test_the_folder_above_leads_to_its_latest(tmp_path):
    shutil.copytree(FOLDER / "stage1", tmp_path / "step-1")
    (tmp_path / "latest").write_text("step-1")
    model = ff.load_raw(RT, tmp_path, ff.setup_model(RT, blank()))
    assert testing.difference(dict(model.params), expected(False)[0]) is None
    for tag in ("../step-1", "step-2", "step-1/../../x"):
        (tmp_path / "latest").write_text(tag)
        with pytest.raises(CheckpointError, match="which is no folder beside it"):
            ff.load_raw(RT, tmp_path, ff.setup_model(RT, blank()))


MODEL = "mp_rank_00_model_states.pt"
ODD = [{"params": [-1]}]


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("stage1", lambda f: next(f.glob("*rank_1*optim*")).unlink(), "one of .* partitions, and there are 1 files"),
        ("stage1", lambda f: next(f.glob("*rank_0*optim*")).unlink(), "one of .* partitions, and there are 1 files"),
        ("stage3", lambda f: next(f.glob("*rank_1*optim*")).unlink(), "one of .* partitions, and there are 1 files"),
        ("stage1", lambda f: next(f.glob("*rank_1*optim*")).write_bytes(b"PK\x03\x04x"), "cannot be read as a PyTorch"),
        ("stage1", lambda f: (f / "mp_rank_01_model_states.pt").write_bytes(b""), "tensor, pipeline or expert"),
        ("stage1", lambda f: (f / "layer_00-model_00-model_states.pt").write_bytes(b""), "tensor, pipeline or expert"),
        ("stage1", lambda f: torch.save({"module": Evil()}, f / MODEL), r"unpickle \w+\.system"),
        ("stage1", lambda f: torch.save([1], f / MODEL), "holds no module"),
        ("stage1", lambda f: torch.save({"module": {}, "param_shapes": 3}, f / MODEL), "no whole"),
        ("stage1_universal", lambda f: shutil.rmtree(f / "zero" / "one.values.0"), "one.values.0 is missing"),
        ("stage1_universal", lambda f: torch.save(torch.ones(2), f / "zero/one.values.0/fp32.pt"), "2 numbers"),
        (
            "stage1_universal",
            lambda f: torch.save({"param_groups": ODD}, f / "zero/optimizer_state.pt"),
            "no place",
        ),
    ],
)
def test_what_is_missing_damaged_or_hostile_is_named(tmp_path, name, damage, match):
    folder = tmp_path / name
    shutil.copytree(FOLDER / name, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=match):
        ff.load_raw(RT, folder, template(RT, False))


def test_a_parameter_name_leads_nowhere_else(tmp_path):
    folder = tmp_path / "universal"
    shutil.copytree(FOLDER / "stage1_universal", folder)
    state = {"module": {}, "param_shapes": [{"../../secret": torch.Size([1])}]}
    torch.save(state, folder / MODEL)
    with pytest.raises(CheckpointError, match="not a plain folder"):
        ff.load_raw(RT, folder)


def test_no_name_is_left_in_torchs_table():
    before = {*torch.serialization.get_safe_globals()}
    ff.load_raw(RT, FOLDER / "stage1", ff.setup_model(RT, blank()))
    assert {*torch.serialization.get_safe_globals()} == before
    with pytest.raises(CheckpointError, match="unpickle deepspeed"):
        ff.load_raw(RT, next((FOLDER / "stage1").glob("*optim*")))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (4, 1, 3)])
def test_stretches_are_joined_in_their_order(shape):
    array = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    size = array.numel()
    for cuts in ([size], [size - size // 2, size // 2], [*[size // 3] * 3, size % 3]):
        stored = joined(array.view(-1).split(cuts), shape, Path("x"), "x")
        assert torch.equal(read(stored, None, "x", torch.device("cpu")), array)


def test_modules_of_other_names_say_what_is_missing():
    with pytest.raises(CheckpointError, match="0.weight.*is in the template"):
        ff.load_raw(RT, FOLDER / "stage3", ff.setup_model(RT, nn.Sequential(nn.Linear(2, 2))))
