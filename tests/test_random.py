"""Keys, and global generators: captured, put back, and otherwise left alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader, Dataset

import fabricfn as ff
from fabricfn.random import device_generator, seeded
from tests.support.generators import draws, generators_put_back

put_back = generators_put_back()
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# Keys


def test_keys_are_the_same_in_every_version():
    assert ff.key(0).bits == 8493733112532773764
    assert ff.fold_in(ff.key(0), 3).bits == 780065235122123955
    assert ff.fold_in(ff.key(-5), 1 << 70) == ff.fold_in(ff.key(-5), 1 << 70)


@given(st.integers(0, 2**64 - 1))
def test_a_key_is_a_seed_that_torch_takes_and_negative_seeds_of_old_mean_the_same(bits):
    key = ff.Key(bits)
    signed = torch.Generator().manual_seed(bits - (1 << 63))
    assert torch.equal(key.generator().get_state(), signed.get_state())


@given(st.integers(), st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True))
def test_other_numbers_give_other_keys(seed, numbers):
    assert len({ff.fold_in(ff.key(seed), number) for number in numbers}) == len(numbers)
    assert ff.split(ff.key(seed), 3) == tuple(ff.fold_in(ff.key(seed), i) for i in range(3))


def test_a_block_under_a_key_is_undone_nested_or_failed():
    before = ff.random_state()
    with seeded(ff.key(1), CPU):
        first = torch.rand(2)
        with seeded(ff.key(2), CPU):
            inner = torch.rand(2)
        second = torch.rand(2)
    with seeded(ff.key(1), CPU):
        assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(2), torch.rand(2)]))
    with pytest.raises(RuntimeError, match="0 elements"), seeded(ff.key(2), CPU):
        torch.rand(0).item()
    with seeded(ff.key(2), CPU):
        assert torch.equal(torch.rand(2), inner)
    with seeded(ff.key(2), CPU, 5), seeded(ff.fold_in(ff.key(2), 5), torch.device("cpu", 0)):
        inner = torch.rand(2)
    with seeded(ff.key(2), CPU, 5):
        assert torch.equal(torch.rand(2), inner)
    assert all(torch.equal(before[name], value) for name, value in ff.random_state().items())


def test_a_device_whose_generator_cannot_be_had_is_refused():
    with pytest.raises(ff.CapabilityError, match="default_generators"):
        device_generator(torch.device("xla", 0))


@needs_cuda
def test_keys_and_states_reach_the_cuda_generator():
    torch.cuda.init()
    state = ff.random_state()
    first = torch.rand(3, device="cuda")
    with seeded(ff.key(1), torch.device("cuda")):
        under_key = torch.rand(3, device="cuda")
    second = torch.rand(3, device="cuda")
    ff.set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    with seeded(ff.key(1), torch.device("cuda", 0)):
        assert torch.equal(torch.rand(3, device="cuda"), under_key)
    assert torch.equal(torch.rand(3, device="cuda"), second)


# Global generators


@given(st.integers(0, 2**32 - 1), st.integers(0, 700), st.booleans(), st.booleans())
@settings(max_examples=30)
def test_what_was_drawn_is_drawn_again(seed, skipped, numpy_normal, python_normal):
    ff.seed_everything(seed)
    torch.rand(skipped), np.random.random(skipped), [random.random() for _ in range(skipped)]
    if numpy_normal:
        np.random.standard_normal()  # the twin of this number is kept in hand
    if python_normal:
        random.gauss(0, 1)
    state = ff.random_state()
    kept = {name: value.clone() for name, value in state.items()}
    expected = draws()
    ff.set_random_state(state)
    assert draws() == expected
    assert all(torch.equal(state[name], kept[name]) for name in kept), "a state is a value of its own"


def test_the_state_of_numpy_and_python_is_theirs_to_the_bit():
    np.random.standard_normal(), random.gauss(0, 1)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    state = ff.random_state()
    draws()
    ff.set_random_state(state)
    found = np.random.get_state()
    assert numpy_state[1].tolist() == found[1].tolist()
    assert numpy_state[2:] == found[2:]
    assert random.getstate() == python_state


def test_a_state_is_saved_and_loaded_to_the_bit(tmp_path):
    rt = ff.init_runtime(devices=1, accelerator="cpu")
    np.random.standard_normal(), random.gauss(0, 1)
    state = ff.random_state()
    ff.save(rt, tmp_path / "state", {"random": state, "epoch": 3})
    expected = draws()
    loaded = ff.load(rt, tmp_path / "state", like={"random": ff.random_state(), "epoch": 0})
    assert {name: (value.dtype, value.shape) for name, value in loaded["random"].items()} == {
        name: (torch.uint8, value.shape) for name, value in state.items()
    }
    assert all(torch.equal(loaded["random"][name], value) for name, value in state.items())
    ff.set_random_state(loaded["random"])
    assert draws() == expected
    assert not list((tmp_path / "state").rglob("*.pkl"))


WRONG = {
    "no tensor": (lambda state: {"python": 3}, "a int, not a tensor"),
    "two rows": (lambda state: {"torch": torch.stack([state["torch"]] * 2)}, r"\[2, 5056\], not torch.uint8 \[5056\]"),
    "floats": (lambda state: {"numpy": state["numpy"].float()}, "torch.float32"),
    "a stranger": (lambda state: {**state, "cuda:9": state["torch"]}, "no such generator, it has torch"),
    "no state of torch": (lambda state: {"python": state["python"], "torch": state["torch"] * 0}, "'torch': "),
    "no state of numpy": (lambda state: {"torch": state["torch"], "numpy": state["numpy"] * 0 + 255}, "twister"),
    "no dict": (lambda state: state["torch"], "it is a Tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_state_that_does_not_fit_changes_nothing(case):
    make, message = WRONG[case]
    old = ff.random_state()
    draws()
    before = ff.random_state()
    with pytest.raises(ff.ConfigurationError, match=message):
        ff.set_random_state(make(old))
    assert all(torch.equal(before[name], value) for name, value in ff.random_state().items())


def test_a_replaced_generator_of_numpy_is_refused():
    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        with pytest.raises(ff.ConfigurationError, match="PCG64"):
            ff.random_state()
    finally:
        np.random.set_bit_generator(original)


def test_a_seed_decides_all_three_as_seeding_each_of_them_does():
    assert ff.seed_everything(7) == 7
    found = draws()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    assert draws() == found
    assert ff.seed_everything(np.int64(7)) == 7 and draws() == found
    assert ff.seed_everything() == ff.seed_everything(None) == 0 and draws() != found
    assert ff.seed_everything(2**32 - 1, workers=True) == 2**32 - 1


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        (-1, {}, "out of range"),
        (2**32, {}, "seed % 2"),
        ("7", {}, r"int\(seed\)"),
        (1.5, {}, "an integer"),
        (1, {"workers": False}, "rt.seed, epoch, rank, worker"),
    ],
)
def test_what_is_no_seed_is_a_value_error_and_changes_nothing(seed, options, message):
    before = ff.random_state()
    with pytest.raises(ValueError, match=message):
        ff.seed_everything(seed, **options)
    assert all(torch.equal(before[name], value) for name, value in ff.random_state().items())


class Drawn(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(()).item(), np.random.random(), random.random()


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .* is multi-threaded")
def test_workers_draw_by_runtime_seed_epoch_and_rank_whatever_was_seeded():
    def augmentations(global_seed, seed, rank, epoch):
        ff.seed_everything(global_seed)
        world = ff.World(rank=rank, world_size=2)
        rt = ff.Runtime(world=world, precision=ff.Precision(), strategy=ff.strategies.single(), seed=seed)
        loader = ff.setup_dataloader(rt, DataLoader(Drawn(), num_workers=2, collate_fn=list))
        return [tuple(one) for rows in ff.batches(rt, loader, epoch) for one in rows]

    found = {place: augmentations(1, *place) for place in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))}
    numbers = [number for rows in found.values() for one in rows for number in one]
    assert len(set(numbers)) == len(numbers) == 4 * 4 * 3, "all seeds, ranks, epochs and workers draw other numbers"
    assert augmentations(2, 0, 1, 0) == found[0, 1, 0]
