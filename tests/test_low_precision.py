"""Training in 8 bits and fewer: torchao and bitsandbytes as they run on a CPU, a fake of Transformer Engine."""

import contextlib
import importlib.util
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import testing
from fabricfn.cli import main
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.precision import ALIASES, NAMES, PACKAGED, check_name
from fabricfn.precision.bitsandbytes import MODES, Quantized
from fabricfn.precision.float8 import RECIPES, Float8
from fabricfn.precision.transformer_engine import TransformerEngine
from fabricfn.testing import cases
from tests.support.runtimes import RT


def needs(package):
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is an extra: nox -s lowbits")


# Names


@pytest.mark.parametrize("name", PACKAGED)
def test_a_name_whose_package_is_missing_says_what_to_install(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    package = "torchao" if "fp8" in name else "transformer_engine" if "engine" in name else "bitsandbytes"
    hardware = "an NVIDIA GPU of compute capability 8.9.*" if "engine" in name else ""
    with pytest.raises(CapabilityError, match=f"the package {package}.*{hardware}pip install .*or write precision="):
        ff.Precision.parse(name)
    with pytest.raises(CapabilityError, match=f"needs the package {package}"):
        ff.init_runtime(devices=1, accelerator="cpu", precision=name)


def test_the_command_line_says_so_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(SystemExit):
        main(["run", "--precision", "nf4", "--devices", "1", "--dry-run", "train.py"])
    assert "error: this precision needs the package bitsandbytes" in capsys.readouterr().err


def test_a_package_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: True)
    with pytest.raises(CapabilityError, match="is installed but cannot be imported"):
        Float8()(nn.Linear(16, 16))


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", "mps", "tpu"])
@pytest.mark.parametrize("name", PACKAGED)
def test_a_name_is_refused_where_its_package_does_not_run(monkeypatch, name, accelerator):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: True)
    runs = accelerator == "cuda" or (accelerator == "cpu" and "engine" not in name)
    expected = pytest.raises(ConfigurationError, match=f"runs on .*cuda, and this is {accelerator}")
    with contextlib.nullcontext() if runs else expected:
        check_name(name, accelerator)
    check_name(PACKAGED[name], accelerator)  # a record is taken at its word


def test_names_are_found_by_whoever_knows_fabric():
    assert {"transformer-engine", "transformer-engine-float16", *MODES} <= {*PACKAGED}
    assert ALIASES["fp8"] == "fp8-mixed" and not {*PACKAGED} & {*NAMES}
    with pytest.raises(ConfigurationError, match=r"fp9.*fp8-mixed, transformer-engine.*nf4.*int8-training"):
        ff.Precision.parse("fp9")
    for wrong in (lambda: Float8(recipe="blockwise"), lambda: Quantized(mode="int4")):
        with pytest.raises(ConfigurationError, match="there are"):
            wrong()


# torchao and bitsandbytes, in a process of their own, which may warn as these packages do


def built():
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 3))
    return cases.initialised(net, 7).float()


X, Y = cases.filled((16, 32), torch.float32, 1), cases.filled((16, 3), torch.float32, 2)


def squares(net, x, y):
    return (net(x).float() - y).square().mean()


def trained(rt, steps=12):
    """(loss at first, loss at last, which parameters moved)."""
    model = ff.setup_model(rt, built())
    first = ff.gather_params(rt, model)
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-2)
    losses = []
    for _ in range(steps):
        x, y = X.tensor_split(rt.world_size)[rt.rank], Y.tensor_split(rt.world_size)[rt.rank]
        loss, grads = ff.value_and_grad(rt, squares)(model, x, y)
        model, opt = ff.optimizer_step(rt, model, opt, grads)
        losses.append(ff.all_reduce(rt, loss).item())
    moved = {name for name, value in ff.gather_params(rt, model).items() if not torch.equal(value, first[name])}
    return losses[0], losses[-1], moved, {str(value.dtype) for value in model.params.values()}


def expected():
    return trained(RT)


def laws(precision, tolerance):
    """Purity, donation and resume bit for bit; what goes from one strategy to another as near as 8 bits are."""
    train = testing.training_loop(built(), squares, (X, Y), torch.optim.SGD, lr=0.05, momentum=0.9)
    settings = {"precision": precision, "strategies": ("ddp", "functional", "fsdp"), "world_sizes": (2,)}
    with testing.threads(2) as ranks:
        testing.check(train, ("purity", "donation"), ranks=ranks, **settings)
        testing.check_resume(train, tolerance=tolerance, ranks=ranks, **settings)
        testing.check_equivalence(train, accumulation=(1,), tolerance=tolerance, ranks=ranks, **settings)


def in_a_process(code):
    """torchao and bitsandbytes log and warn as they are imported, and change torch for the whole process."""
    done = subprocess.run(
        [sys.executable, "-c", f"import tests.test_low_precision as t, fabricfn as ff, torch\n{code}"],
        *(), capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@needs("torchao")
def test_float8_trains_as_float32_and_obeys_the_laws():
    in_a_process("t.float8()")


def float8():
    first, last, *_ = expected()
    for recipe in RECIPES:
        for emulate in (False, True) if recipe == "tensorwise" else (True,):
            convert = Float8(recipe=recipe, emulate=emulate, skip=("2",))
            rt = ff.Runtime(world=ff.World(), precision=ff.Precision(convert=convert), strategy=RT.strategy)
            net = ff.to_module(rt, ff.setup_model(rt, built()))
            assert [type(part).__name__ for part in net] == ["Float8Linear", "Tanh", "Linear", "LayerNorm", "Linear"]
            found = trained(rt)
            assert 0 < abs(found[0] - first) < 0.05 * first and abs(found[1] - last) < 0.15 * first, (recipe, found)
            assert found[3] == {"torch.float32"}
    laws(ff.Precision.parse("fp8-mixed"), 0.1)
    for wrong, match in ((nn.Linear(3, 3), "multiples of 16"), (nn.Tanh(), "multiples of 16")):
        with pytest.raises(CapabilityError, match=match):
            Float8()(wrong)
    with pytest.raises(CapabilityError, match="no layer named head"):
        Float8(skip=("head",))(built())


@needs("bitsandbytes")
def test_packed_weights_are_frozen_and_the_rest_learns():
    in_a_process("t.quantized()")


def quantized():
    first, last, *_ = expected()
    sizes = {"int8": 1, "int8-training": 0, **dict.fromkeys(("nf4", "nf4-dq", "fp4", "fp4-dq"), 0.5)}
    for mode in MODES:
        precision = ff.Precision.parse(mode)
        rt = ff.Runtime(world=ff.World(), precision=precision, strategy=RT.strategy)
        found = trained(rt)
        assert abs(found[0] - first) < 0.1 * first, (mode, found)
        weights = {"0.weight", "2.weight", "4.weight"} if mode == "int8-training" else set()
        assert found[2] == {"0.bias", "2.bias", "3.weight", "3.bias", "4.bias", *weights}, (mode, found[2])
        assert found[1] < found[0] and (mode != "int8-training" or abs(found[1] - last) < 0.15 * first), (mode, found)
        model = ff.setup_model(rt, built())
        packed = {name.partition(".")[2]: value.nbytes for name, value in model.params.items() if name[0] == "0"}
        assert packed.get("weight_4bit", packed.get("weight_int8", 0)) == 32 * 64 * sizes[mode], (mode, packed)
        batch = torch.stack([X, X])  # of three dimensions
        assert ff.apply(rt, model, batch).shape == (2, 16, 3)
    laws(ff.Precision.parse("nf4-dq"), 0.1)
    laws(ff.Precision.parse("int8-training"), 0.1)
    kept = Quantized(mode="int8", skip=("4",))(built())
    assert type(kept[4]) is nn.Linear and type(kept[0]) is not nn.Linear
    with pytest.raises(CapabilityError, match="no layer is named head"):
        Quantized(skip=("head",))(built())


# Transformer Engine


class Engine(types.ModuleType):
    """The part of `transformer_engine.pytorch` that is used, which notes whether layers run inside `fp8_autocast`."""

    def __init__(self):
        super().__init__("transformer_engine.pytorch")
        self.inside, self.seen = [], []
        engine = self

        class Linear(nn.Linear):
            def __init__(self, *sides, bias, params_dtype):
                super().__init__(*sides, bias=bias, dtype=params_dtype)

            def forward(self, x):
                engine.seen.append(("linear", *engine.inside))
                return super().forward(x)

        class LayerNorm(nn.LayerNorm):
            def __init__(self, side, *, eps, params_dtype):
                super().__init__(side, eps=eps, dtype=params_dtype)

            def forward(self, x):
                engine.seen.append(("norm", *engine.inside))
                return super().forward(x)

        self.Linear, self.LayerNorm = Linear, LayerNorm

    @contextlib.contextmanager
    def fp8_autocast(self, *, enabled, fp8_recipe):
        self.inside.append(fp8_recipe)
        yield
        self.inside.pop()


@pytest.fixture
def engine(monkeypatch):
    fake, recipes = Engine(), types.SimpleNamespace(Float8CurrentScaling=lambda: "current")
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", fake)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipes)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: True)
    return fake


def test_transformer_engine_on_a_cpu_names_the_hardware(engine):
    with pytest.raises(CapabilityError, match=r"8\.9.*this module is on cpu.*fp8-mixed"):
        TransformerEngine()(built())


def test_layers_of_transformer_engine_take_the_place_of_torchs(engine, monkeypatch):
    monkeypatch.setattr("fabricfn.precision.transformer_engine.DEVICE", "cpu")
    for convert, recipe in ((TransformerEngine(), "current"), (TransformerEngine(recipe="other"), "other")):
        plain, engine.seen = built(), []
        rt = ff.Runtime(world=ff.World(), precision=ff.Precision(convert=convert), strategy=RT.strategy)
        model = ff.setup_model(rt, plain)
        assert testing.difference(dict(model.params), dict(plain.state_dict())) is None
        assert torch.equal(ff.apply(rt, model, X), plain(X))
        assert engine.seen == [("linear", recipe), ("linear", recipe), ("norm", recipe)]  # 3 is no multiple of 16
        _, grads = ff.value_and_grad(rt, squares)(model, X, Y)
        assert all(grad is not None for grad in grads.params.values()) and engine.inside == []
