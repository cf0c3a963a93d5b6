"""Keys decide every random number of a step; global generators are captured, put back, and otherwise left alone."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fabricfn as ff
from fabricfn.random import device_generator, seeded
from tests.worlds import world_of

CPU = torch.device("cpu")
STRATEGIES = {"single": ff.strategies.single, "ddp": ff.strategies.ddp, "functional": ff.strategies.functional}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


ranks = world_of("processes", 4)


@pytest.fixture(autouse=True)
def put_back():
    """Every test leaves the global generators of this process as they were."""
    before = ff.random_state()
    yield
    ff.set_random_state(before)


def draws(num=5):
    """The next numbers of every global generator, of each kind that keeps some in hand."""
    return (
        torch.rand(num).tolist(),
        torch.randn(3).tolist(),
        np.random.random(num).tolist(),
        np.random.standard_normal(3).tolist(),
        [random.random() for _ in range(num)],
        random.gauss(0, 1),
    )


# Keys


def test_keys_are_the_same_in_every_version():
    assert ff.key(0).bits == 8493733112532773764
    assert ff.fold_in(ff.key(0), 3).bits == 780065235122123955
    assert ff.fold_in(ff.key(-5), 1 << 70) == ff.fold_in(ff.key(-5), 1 << 70)


@given(st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_a_key_is_a_seed_that_torch_takes_and_negative_seeds_of_old_mean_the_same(bits):
    key = ff.Key(bits)
    signed = torch.Generator().manual_seed(bits - (1 << 63))
    assert torch.equal(key.generator().get_state(), signed.get_state())


@given(st.integers(), st.lists(st.integers(0, 1000), min_size=2, max_size=6, unique=True))
@settings(deadline=None)
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
@settings(deadline=None, max_examples=30)
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


def each_rank_goes_on(rt, folder):
    ff.seed_everything(10 + rt.rank)
    draws()
    ff.save(rt, folder, {"random": ff.all_gather(rt, ff.random_state())})
    expected = draws()
    like = ff.all_gather(rt, ff.random_state())
    rows = ff.load(rt, folder, like={"random": like})["random"]
    ff.set_random_state(ff.tree_map(lambda states: states[rt.rank], rows))
    return draws() == expected, expected


def test_the_states_of_all_ranks_are_saved_by_gathering_them(ranks, tmp_path):
    found = ranks.run(each_rank_goes_on, tmp_path / "ranks", world_size=2, strategy="ddp")
    assert [same for same, _ in found] == [True, True]
    assert found[0][1] != found[1][1], "the ranks had numbers of their own"


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


# Dropout


def dropout_net(checkpointed=None):
    """A net whose two masks a loss can see; the middle is recomputed when `checkpointed` is "reentrant" or "not"."""
    torch.manual_seed(3)
    return Dropped(checkpointed).double()


class Dropped(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 1)
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, x):
        x = nn.functional.dropout(self.first(x), 0.5, self.training)
        if self.checkpointed is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.checkpointed == "reentrant")
        return self.last(x)


def data(rows=8, seed=0):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_square(net, x):
    return net(x).square().mean()


def squares(net, x):
    return net(x).square().sum(), len(x)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# functional refuses reentrant checkpoints by a CapabilityError, whatever the key: tests/test_hard_losses.py.
CHECKPOINTS = [
    *(("single", "reentrant"), ("single", "not"), ("ddp", "reentrant"), ("ddp", "not")),
    ("functional", "not"),
]


@pytest.mark.parametrize(("strategy", "checkpointed"), CHECKPOINTS)
def test_recomputed_activations_are_dropped_alike(one_rank, strategy, checkpointed):
    rt = one_rank(strategy)
    (plain_loss, plain), (loss, grads) = (
        ff.value_and_grad(rt, mean_square)(ff.setup_model(rt, dropout_net(kind)), data(), rng=ff.key(5))
        for kind in (None, checkpointed)
    )
    assert torch.equal(loss, plain_loss) and same(grads.params, plain.params)
    other, _ = ff.value_and_grad(rt, mean_square)(ff.setup_model(rt, dropout_net()), data(), rng=ff.key(6))
    assert other != loss


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(ran=st.lists(st.sampled_from(["step", "seed", "draw", "apply", "value", "failure"]), max_size=4))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_are_a_function_of_the_key_whatever_ran_before(one_rank, strategy, ran):
    rt = one_rank(strategy)
    model = ff.setup_model(rt, dropout_net())
    grad_fn = ff.value_and_grad(rt, mean_square)
    expected, grads = grad_fn(model, data(), rng=ff.fold_in(ff.key(0), 7))
    for what in ran:
        if what == "step":
            grad_fn(model, data(3), rng=ff.fold_in(ff.key(0), 6))
        elif what == "seed":
            ff.seed_everything(1)
        elif what == "draw":
            torch.randn(3)
        elif what == "apply":
            ff.apply(rt, model, data(), rng=ff.key(1))
        elif what == "value":
            ff.value(rt, mean_square)(model, data(2))
        else:
            with pytest.raises(RuntimeError):
                grad_fn(model, torch.ones(1, 3), rng=ff.key(2))
    again, grads_again = grad_fn(model, data(), rng=ff.fold_in(ff.key(0), 7))
    assert torch.equal(again, expected) and same(grads_again.params, grads.params)


def masked_step(rt, micro_per_rank, whole, checkpointed=None):
    """The gradient and the masks of a global batch of four micro-batches, cut contiguously over ranks."""
    model = ff.setup_model(rt, dropout_net(checkpointed))
    mine = whole.chunk(4)[rt.rank * micro_per_rank : (rt.rank + 1) * micro_per_rank]

    def loss_fn(net, x):
        with seeded_like_the_loss():
            mask = torch.rand(6)
        total, weight = squares(net, x)
        return (total, weight), mask

    key = ff.fold_in(ff.key(1), 2)
    (loss, masks), grads = ff.accumulate(rt, loss_fn, has_aux=True, weighted=True)(model, [(x,) for x in mine], rng=key)
    result = {"loss": loss, "grads": dict(grads.params), "masks": masks}
    if micro_per_rank == 1:
        (_, mask), one = ff.value_and_grad(rt, loss_fn, has_aux=True, weighted=True)(model, mine[0], rng=key)
        result["alone"] = {"mask": mask, "grads": dict(one.params)}
        result["value"] = ff.value(rt, squares, weighted=True)(model, mine[0], rng=key)
    return result


class seeded_like_the_loss:
    """What is drawn here is undone, so that the masks of the net stay those it has without looking."""

    def __enter__(self):
        self.state = torch.get_rng_state()

    def __exit__(self, *_):
        torch.set_rng_state(self.state)


@pytest.mark.parametrize(("strategy", "checkpointed"), [("ddp", None), ("functional", None), *CHECKPOINTS[2:]])
def test_masks_depend_on_the_micro_batch_and_not_on_how_the_ranks_share_them(ranks, strategy, checkpointed):
    whole = data(12)
    one = ff.Runtime(world=ff.World(), precision=ff.Precision.parse(64), strategy=ff.strategies.single())
    oracle = masked_step(one, 4, whole)
    assert len({tuple(mask.tolist()) for mask in oracle["masks"]}) == 4, "each micro-batch has masks of its own"
    for world_size in (1, 2, 4):
        options = {"strategy": strategy, "precision": 64, "world_size": world_size}
        found = ranks.run(masked_step, 4 // world_size, whole, checkpointed, **options)
        masks = [mask for one in found for mask in one["masks"]]
        assert torch.equal(torch.stack(masks), torch.stack(oracle["masks"]))
        for result in found:
            torch.testing.assert_close(result["grads"], oracle["grads"], rtol=0, atol=1e-14)
            torch.testing.assert_close(result["loss"], oracle["loss"], rtol=1e-15, atol=0)
        if world_size == 4:
            for result, mask in zip(found, oracle["masks"], strict=True):
                assert torch.equal(result["alone"]["mask"], mask)
                assert same(result["alone"]["grads"], result["grads"])
                assert torch.equal(result["value"], result["loss"])


def test_apply_under_a_key_inside_a_loss_leaves_the_masks_around_it_alone(one_rank):
    rt = one_rank()
    model, teacher = ff.setup_model(rt, dropout_net()), ff.setup_model(rt, dropout_net())

    def loss_fn(net, x, inside):
        first = net(x)
        target = ff.apply(rt, teacher, x, rng=ff.key(9)) if inside else 0.0
        second = net(x)
        return (first * second).mean(), (first.detach(), second.detach(), target)

    grad_fn = ff.value_and_grad(rt, loss_fn, has_aux=True)
    (_, without), _ = grad_fn(model, data(), False, rng=ff.key(1))
    (_, within), _ = grad_fn(model, data(), True, rng=ff.key(1))
    assert torch.equal(without[0], within[0]) and torch.equal(without[1], within[1])
    assert not torch.equal(within[0], within[1])
    assert torch.equal(within[2], ff.apply(rt, teacher, data(), rng=ff.key(9)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_teacher_with_dropout_draws_from_the_same_key(one_rank, strategy):
    rt = one_rank(strategy)
    model = ff.setup_model(rt, dropout_net())
    teacher = ff.map_params(torch.clone, model)

    def distance(net, target, x):
        return (net(x) - target(x)).square().mean()

    grad_fn = ff.value_and_grad(rt, distance)
    loss, grads = grad_fn(model, teacher, data(), rng=ff.key(1))
    assert loss > 0, "the two have equal values and masks of their own"
    again, grads_again = grad_fn(model, teacher, data(), rng=ff.key(1))
    assert torch.equal(loss, again) and same(grads.params, grads_again.params)
    calm, _ = grad_fn(ff.eval_mode(model), ff.eval_mode(teacher), data(), rng=ff.key(1))
    assert calm == 0


def test_a_key_of_another_runtime_record_is_just_a_key(one_rank):
    rt = one_rank()
    model = ff.setup_model(rt, dropout_net())
    other = dataclasses.replace(rt, seed=99)
    assert torch.equal(
        ff.apply(rt, model, data(), rng=ff.key(4)), ff.apply(other, model, data(), method="forward", rng=ff.key(4))
    )
