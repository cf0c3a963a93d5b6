"""Checkpoints of one rank: load(save(x)) is x bit for bit, for any tree and for the records of training."""

import collections
import dataclasses
import os
import shutil
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from torch import nn

import fabricfn as ff
from fabricfn.checkpoint.format import manifest
from fabricfn.errors import DonatedError
from tests.support.checkpoints import bits, loss_fn, trained
from tests.support.runtimes import RT


def ones(tree):
    """The same structure, every tensor full of ones."""
    return ff.tree_map(lambda leaf: torch.ones_like(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Own:
    weights: torch.Tensor
    note: str = ""
    size: int = dataclasses.field(init=False, default=3)


# ---------------------------------------------------------------- law 5: load(save(x)) is x

DTYPES = [getattr(torch, name) for name in (*manifest.DTYPES, *manifest.RAW_DTYPES)]


def filled(dtype, shape, seed):
    """Any bits: NaN payloads, denormals and all."""
    empty = torch.empty(shape, dtype=dtype)
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (empty.nbytes,), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return data.view(dtype).reshape(shape) if empty.numel() else empty


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit_and_other_readers_can_open_the_file(tmp_path, dtype):
    tree = {"a": filled(dtype, (3, 5), 0), "scalar": filled(dtype, (), 1), "empty": filled(dtype, (0, 3), 2)}
    tree["more"] = {name: torch.empty(0, dtype=getattr(torch, name)) for name in ("bool", "float64", "bfloat16")}
    receipt = ff.save(RT, tmp_path / "c", tree)
    assert bits(ff.load(RT, tmp_path / "c")) == bits(tree)
    assert bits(ff.load(RT, tmp_path / "c", tree)) == bits(tree)
    with safe_open(receipt.path / "data/r00000-000.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{number}.0" for number in range(6)}
        read = file.get_tensor("0.0")
    assert bits(read.view(dtype).reshape(3, 5)) == bits(tree["a"])


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    value = filled(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])), shape,
                   draw(st.integers(0, 99)))  # fmt: skip
    match draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "param", "numpy", "number"])):
        case "transposed":
            return value.transpose(0, -1) if value.ndim else value
        case "strided":
            return value[::2] if value.ndim else value
        case "expanded":
            return value.expand(2, *value.shape)
        case "param" if value.is_floating_point():
            return nn.Parameter(value)
        case "numpy" if value.dtype is not torch.bfloat16:
            return value.numpy()
        case "number" if value.dtype is not torch.bfloat16 and value.numel():
            return value.numpy().reshape(-1)[0]
    return value


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=5),
    st.complex_numbers(allow_nan=False), st.just("\udc80"), st.just(-(1 << 9000)),
)  # fmt: skip
KEYS = st.one_of(st.text(max_size=3), st.integers(-5, 5))
TREES = st.recursive(
    st.one_of(tensors(), PLAIN, st.builds(ff.Cursor, epoch=st.integers(0)), st.builds(ff.Key, st.integers(0, 99))),
    lambda inner: st.one_of(
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict),
        st.dictionaries(KEYS, inner, max_size=3).map(types.MappingProxyType),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.builds(Pair, inner, inner),
        inner.map(lambda value: [value, {"tied": value}]),
        st.builds(Own, tensors().filter(torch.is_tensor), st.text(max_size=3)),
    ),
    max_leaves=8,
)


@given(TREES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_load_of_save_is_the_tree(tmp_path, tree):
    ff.save(RT, tmp_path / "c", tree)
    assert bits(ff.load(RT, tmp_path / "c", tree)) == bits(tree)
    plain = ff.load(RT, tmp_path / "c")
    ff.save(RT, tmp_path / "plain", plain)
    assert bits(ff.load(RT, tmp_path / "plain")) == bits(plain)
    ff.verify_checkpoint(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")


def test_loaded_tensors_own_their_memory_and_the_template_is_left_alone(tmp_path):
    weights = torch.arange(6.0)
    tree = {"w": weights, "tied": weights, "view": weights[2:], "alone": weights.clone()}
    ff.save(RT, tmp_path / "c", tree)
    like = ones(tree)
    loaded = ff.load(RT, tmp_path / "c", like)
    assert bits(like) == bits(ones(tree))
    assert loaded["w"] is not loaded["tied"]  # the template has two
    plain = ff.load(RT, tmp_path / "c")
    assert plain["w"] is plain["tied"]
    assert ff.load(RT, tmp_path / "c", tree)["w"].data_ptr() != weights.data_ptr()
    size = (tmp_path / "c/data/r00000-000.safetensors").stat().st_size
    os.truncate(tmp_path / "c/data/r00000-000.safetensors", 0)  # a mapped tensor would kill the process here
    assert plain["w"].sum() == 15
    assert size < 4 * (6 + 4 + 6) + 600  # the tied tensor is stored once


def test_a_template_on_the_meta_device_costs_no_memory(tmp_path):
    module = nn.Linear(3, 2)
    ff.save(RT, tmp_path / "c", module.state_dict())
    with torch.device("meta"):
        like = nn.Linear(3, 2).state_dict()
    assert bits(ff.load(RT, tmp_path / "c", like)) == bits(module.state_dict())


def test_tensors_that_stay_in_host_memory_come_back_there(tmp_path):
    elsewhere = dataclasses.replace(RT, world=ff.World(device=torch.device("meta")))
    ff.save(elsewhere, tmp_path / "c", {"step": torch.tensor(3)})
    assert ff.load(elsewhere, tmp_path / "c")["step"].item() == 3
    ff.save(RT, tmp_path / "c", {"w": torch.tensor(3)})
    assert ff.load(elsewhere, tmp_path / "c")["w"].is_meta


# ---------------------------------------------------------------- records of training

OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "NAdam": (torch.optim.NAdam, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("donate", [False, True])
def test_resume_is_bit_for_bit(tmp_path, name, donate):
    optimizer, hyperparams = OPTIMIZERS[name]
    straight = trained(RT, optimizer, steps=5, **hyperparams)
    model, opt = trained(RT, optimizer, steps=2, **hyperparams)
    ff.save(RT, tmp_path / "c", {"model": model, "opt": opt})
    fresh = trained(RT, optimizer, steps=0, **hyperparams)
    before = bits(list(fresh))
    loaded = ff.load(RT, tmp_path / "c", {"model": fresh[0], "opt": fresh[1]}, donate=donate)
    assert bits(loaded) == bits({"model": model, "opt": opt})
    resumed = trained(RT, steps=3, state=(loaded["model"], loaded["opt"]), donate=True)
    assert bits(list(resumed)) == bits(list(straight))
    if donate:
        assert loaded["model"].params["0.weight"] is fresh[0].params["0.weight"]
        with pytest.raises(DonatedError, match=r"test_checkpoint\.py"):
            trained(RT, steps=1, state=fresh)
    else:
        assert bits(list(fresh)) == before
        trained(RT, steps=1, state=fresh)


def test_an_eval_model_and_gradients_come_back_as_they_were(tmp_path):
    model, opt = trained(RT)
    data = torch.ones(6, 3, dtype=RT.precision.param_dtype)
    _, grads = ff.value_and_grad(RT, loss_fn)(model, data, data[:, :2])
    tree = {"ema": ff.eval_mode(model), "grads": grads}
    ff.save(RT, tmp_path / "c", tree)
    loaded = ff.load(RT, tmp_path / "c", {"ema": model, "grads": grads})
    assert loaded["ema"].training == frozenset()
    assert bits(loaded["grads"].params) == bits(grads.params)
    assert bits(loaded["grads"].new_buffers) == bits(grads.new_buffers)
    assert bits(ff.optimizer_step(RT, model, opt, loaded["grads"])[0]) == bits(
        ff.optimizer_step(RT, model, opt, grads)[0]
    )
    plain = ff.load(RT, tmp_path / "c")
    assert plain["ema"]["training"] == []
    assert bits(plain["ema"]["params"]) == bits(dict(model.params))


def test_what_was_given_away_is_not_saved(tmp_path):
    state = trained(RT, steps=1)
    trained(RT, steps=1, state=state, donate=True)
    for record in state:
        with pytest.raises(DonatedError):
            ff.save(RT, tmp_path / "c", {"record": record})
    assert os.listdir(tmp_path) == []
