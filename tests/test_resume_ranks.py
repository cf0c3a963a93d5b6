"""Stopping and going on with all that a real run carries along, on other numbers of ranks and strategies too."""

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fabricfn as ff
from tests.support.worlds import world_of

# ---------------------------------------------------------------- to another number of ranks

four = world_of("processes", 4)

PIECES = 4
"""Micro-batches of a global batch: what dropout's masks hang on, whichever rank computes them."""


def loss_fn(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
    return F.cross_entropy(net(x), y, reduction="sum"), len(y)


def train(rt: ff.Runtime, folder: str, stop: int):
    """Go on from the newest checkpoint to step `stop`, save, and return this rank's losses and all parameters."""
    inputs = torch.randn(56, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = TensorDataset(inputs, inputs[:, :3].argmax(dim=1))
    loader = DataLoader(data, batch_size=16 // rt.world_size, shuffle=True, drop_last=True)  # 3 steps an epoch
    loader = ff.setup_dataloader(rt, loader)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Dropout(0.4), nn.Linear(7, 3))
    model = ff.setup_model(rt, net)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9)
    state = {"model": model, "opt": opt, "cursor": ff.Cursor(seed=rt.seed)}
    if path := ff.latest(folder):
        state = ff.load(rt, path, like=state)
    model, opt, cursor = state.values()
    grad_fn, found = ff.accumulate(rt, loss_fn, weighted=True), []
    while True:
        for (x, y), cursor in ff.batches(rt, loader, cursor, with_cursor=True):
            pieces = list(zip(x.chunk(PIECES // rt.world_size), y.chunk(PIECES // rt.world_size), strict=True))
            loss, grads = grad_fn(model, pieces, rng=ff.fold_in(ff.key(rt.seed), opt.step))
            grads, _ = ff.clip_gradients(rt, grads, max_norm=1.0)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
            found.append(loss)
            if opt.step == stop:
                ff.save(rt, f"{folder}/step-{stop:03d}", {"model": model, "opt": opt, "cursor": cursor})
                return torch.stack(found), ff.gather_params(rt, model)


def test_a_run_goes_on_with_another_number_of_ranks_and_another_strategy(tmp_path: Path, four):
    options = {"precision": "64-true", "seed": 5}
    ways = [(1, "single"), (2, "ddp"), (2, "fsdp")]
    ((expected, params),) = four.run(train, str(tmp_path / "never"), 11, world_size=1, **options)
    for (num, first), (others, second) in itertools.permutations(ways, 2):
        folder = str(tmp_path / f"{first}-{second}")
        begun = four.run(train, folder, 5, world_size=num, strategy=first, **options)
        ended = four.run(train, folder, 11, world_size=others, strategy=second, **options)
        for losses_before, _ in begun:
            torch.testing.assert_close(losses_before, expected[:5], rtol=1e-11, atol=1e-11)
        for losses_after, found in ended:
            torch.testing.assert_close(losses_after, expected[5:], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(dict(found), dict(params), rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- everything that a real run carries along

LAYERS = (6, 9, 3)
SAMPLES, BATCH = 56, 16
"""Three steps an epoch, the rest is dropped."""
HALF = dataclasses.replace(
    ff.Precision.parse("16-mixed"), loss_scale=ff.DynamicScale(init_scale=2.0**20, growth_interval=2)
)
"""Real float16 on CPU, with a scale that is too large at first and grows again after two good steps."""


def go_on(rt: ff.Runtime, folder: str, stop: int, reduce: str = "mean", save_all: bool = False) -> list[float]:
    """From the newest checkpoint to step `stop`: AdamW, dropout, schedules, an average; the loss scale of each step."""
    inputs = torch.randn(SAMPLES, LAYERS[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = inputs.to(rt.precision.param_dtype)
    loader = DataLoader(
        TensorDataset(inputs, inputs[:, : LAYERS[2]].argmax(dim=1)),
        batch_size=BATCH // rt.world_size, shuffle=True, drop_last=True,
    )  # fmt: skip
    loader = ff.setup_dataloader(rt, loader)
    torch.manual_seed(stop + 1)  # another one in each part of a run: nothing may hang on it
    net = nn.Sequential(nn.Linear(*LAYERS[:2]), nn.LayerNorm(LAYERS[1]), nn.Dropout(0.4), nn.Linear(*LAYERS[1:]))
    with torch.no_grad():
        for number, param in enumerate(net.parameters()):
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(number)) / 3)
    model = ff.setup_model(rt, net)
    schedule = ff.schedule_from_torch(torch.optim.lr_scheduler.OneCycleLR, 0.05, max_lr=0.05, total_steps=40)
    start, update = ff.reduce_on_plateau(patience=0, factor=0.7, threshold=0.05)
    state = {
        "model": model,
        "opt": ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.05),
        "average": ff.map_params(torch.clone, model),
        "plateau": start(1.0),
        "cursor": ff.Cursor(seed=rt.seed),
        "key": ff.key(rt.seed),
    }
    if path := ff.latest(folder):
        state = ff.load(rt, path, like=state)
    model, opt, average, plateau, cursor, key = state.values()
    grad_fn, scales = ff.accumulate(rt, mean_loss, reduce=reduce), []
    while opt.step < stop:
        for (x, y), cursor in ff.batches(rt, loader, cursor, with_cursor=True):
            pieces = zip(x.chunk(PIECES // rt.world_size), y.chunk(PIECES // rt.world_size), strict=True)
            loss, grads = grad_fn(model, list(pieces), rng=ff.fold_in(key, opt.step))
            grads, _ = ff.clip_gradients(rt, grads, max_norm=1.0)
            options = schedule(opt.step)
            model, opt = ff.optimizer_step(rt, model, opt, grads, **{**options, "lr": options["lr"] * plateau.lr})
            average = ff.map_params(lambda mean, new: mean + 0.1 * (new - mean), average, model)
            plateau = update(plateau, ff.all_reduce(rt, loss))
            scales.append(model.loss_scale.scale if model.loss_scale else 1.0)
            if opt.step == stop or save_all:
                values = (model, opt, average, plateau, cursor, key)
                ff.save(rt, f"{folder}/step-{opt.step:03d}", dict(zip(state, values, strict=True)))
            if opt.step == stop:
                break
    return scales


def mean_loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(x).float() if x.dtype == torch.float32 else net(x), y)


def far(ours: Any, theirs: Any, tolerance: float = 0.0, name: str = "") -> list[str]:
    """The entries of two loaded trees that differ: in a bit, or floating-point numbers by more than the tolerance."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return [place for key in ours for place in far(ours[key], theirs[key], tolerance, f"{name}/{key}")]
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [place for key, pair in pairs for place in far(*pair, tolerance, f"{name}/{key}")]
    if not isinstance(ours, torch.Tensor):
        close = tolerance and isinstance(ours, float) and abs(ours - theirs) <= tolerance
        return [] if type(ours) is type(theirs) and (repr(ours) == repr(theirs) or close) else [name]
    if tolerance and ours.is_floating_point():
        return [] if torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance) else [name]
    same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return [] if same and ours.contiguous().numpy().tobytes() == theirs.contiguous().numpy().tobytes() else [name]


def compare(left: Path, right: Path, tolerance: float = 0.0) -> list[str]:
    with ff.runtime(accelerator="cpu", devices=1) as rt:
        ours, theirs = ff.load(rt, left), ff.load(rt, right)
    assert {"model", "opt", "average", "plateau", "cursor", "key"} == set(ours)
    assert all(len(ours[name]["params"]) == 6 for name in ("model", "average"))
    assert all(len(slots) == 3 for slots in ours["opt"]["state"].values())
    return far(ours, theirs, tolerance)


@pytest.mark.parametrize("precision", ["32-true", HALF], ids=["float32", "float16"])
@pytest.mark.parametrize(("num", "strategy"), [(1, "single"), (2, "ddp"), (2, "fsdp")])
def test_stopping_in_mid_epoch_changes_no_bit(tmp_path: Path, four, num: int, strategy: str, precision: Any):
    """Model, loss scale, optimizer, average, plateau, cursor and key; two stops, the second one in the third epoch."""
    options = {"world_size": num, "strategy": strategy, "precision": precision, "seed": 5}
    scales = four.run(go_on, str(tmp_path / "never"), 11, **options)[0]
    found = [scale for stop in (4, 8, 11) for scale in four.run(go_on, str(tmp_path / "again"), stop, **options)[0]]
    assert found == scales
    assert compare(tmp_path / "again/step-011", tmp_path / "never/step-011") == []
    if precision is HALF:
        changes = [after / before for before, after in itertools.pairwise([2.0**20, *scales])]
        assert changes.count(0.5) >= 2, "steps were left out"
        assert changes.count(2.0) >= 1


def test_a_step_more_or_less_is_seen(tmp_path: Path, four):
    """The comparison can fail: another seed differs in everything that hangs on it."""
    for name, seed in (("a", 5), ("b", 6)):
        four.run(go_on, str(tmp_path / name), 2, world_size=1, seed=seed)
    found = compare(tmp_path / "a/step-002", tmp_path / "b/step-002")
    for name in ("/model/params/0.weight", "/average/params/3.bias", "/opt/state/0.weight/exp_avg", "/cursor/seed"):
        assert name in found, found


ROUND = [(1, "single"), (2, "ddp"), (4, "fsdp"), (1, "single")]


def test_from_one_rank_to_two_to_four_and_back_within_rounding(tmp_path: Path, four):
    options = {"precision": "64-true", "seed": 5}
    four.run(go_on, str(tmp_path / "never"), 11, world_size=1, **options)
    for (num, strategy), stop in zip(ROUND, (2, 5, 7, 11), strict=True):
        four.run(go_on, str(tmp_path / "round"), stop, world_size=num, strategy=strategy, **options)
    assert compare(tmp_path / "round/step-011", tmp_path / "never/step-011", tolerance=1e-11) == []


CANONICAL = [(1, "single"), (1, "functional"), (2, "ddp"), (2, "functional"), (4, "ddp"), (4, "functional")]


@pytest.fixture(scope="module")
def canonical(tmp_path_factory, four):
    """A run on one rank that was never stopped, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("canonical")
    four.run(go_on, str(folder), 12, "canonical", True, world_size=1, seed=5)
    return folder


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(CANONICAL), st.sampled_from(CANONICAL))
@example(5, 6, CANONICAL[0], CANONICAL[2])
@example(4, 3, CANONICAL[2], CANONICAL[4])
@example(1, 4, CANONICAL[4], CANONICAL[0])
@settings(max_examples=17, suppress_health_check=[HealthCheck.too_slow])
def test_canonical_sums_go_on_to_the_bit_on_any_number_of_ranks(canonical: Path, four, n, m, first, second):
    """float32 and AdamW: `n` steps on the first world, then `m` on the second, are `n + m` on one rank."""
    with tempfile.TemporaryDirectory() as folder:
        for (num, strategy), stop in ((first, n), (second, n + m)):
            four.run(go_on, folder, stop, "canonical", world_size=num, strategy=strategy, seed=5)
        assert compare(Path(folder) / f"step-{n + m:03d}", canonical / f"step-{n + m:03d}") == []
