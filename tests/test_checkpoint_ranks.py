"""Checkpoints of several ranks: any number of them loads what any other wrote, and all fail or none."""

import contextlib
import os
import resource
import shutil

import pytest
import torch
from hypothesis import given, strategies as st

import fabricfn as ff
from fabricfn.checkpoint import sharing
from fabricfn.checkpoint.format import manifest
from fabricfn.checkpoint.format.boxes import whole
from fabricfn.errors import CheckpointError, MismatchError
from fabricfn.testing import threads
from tests.support.checkpoints import bits, common, damage, folder_of, save_common, trained
from tests.support.runtimes import RT
from tests.support.worlds import world_of

ranks = world_of("processes", 3)


def load_plain(rt, path):
    return bits(ff.load(rt, path))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_every_world_size_loads_what_any_other_wrote(tmp_path, ranks, kind):
    with contextlib.ExitStack() as stack:
        world = ranks if kind == "processes" else stack.enter_context(threads(3))
        for writers in (1, 2, 3):
            receipts = world.run(save_common, tmp_path / "c", writers, world_size=writers)
            assert len(set(receipts)) == 1
            written = [name for name in folder_of(tmp_path / "c") if name.startswith("data")]
            assert len(written) == writers
            for readers in (1, 2, 3):
                found = world.run(load_plain, tmp_path / "c", world_size=readers)
                assert found == [bits(common(writers))] * readers
    assert os.listdir(tmp_path) == ["c"]
    assert receipts[0].bytes == sum(map(len, folder_of(tmp_path / "c").values()))


def train_and_save(rt, path):
    model, opt = trained(rt)
    ff.save(rt, path, {"model": model, "opt": opt})
    return bits([model, opt])


def load_and_train(rt, path):
    fresh = trained(rt, steps=0)
    loaded = ff.load(rt, path, {"model": fresh[0], "opt": fresh[1]})
    found = bits([loaded["model"], loaded["opt"]])
    trained(rt, steps=1, state=(loaded["model"], loaded["opt"]), donate=True)
    return found


@pytest.mark.parametrize(("saver", "loader"), [("ddp", "functional"), ("functional", "single"), ("single", "ddp")])
def test_a_strategy_loads_what_another_saved(tmp_path, ranks, saver, loader):
    sizes = {"ddp": 2, "functional": 3, "single": 1}
    saved = ranks.run(train_and_save, tmp_path / "c", world_size=sizes[saver], strategy=saver)
    found = ranks.run(load_and_train, tmp_path / "c", world_size=sizes[loader], strategy=loader)
    assert found == [saved[0]] * sizes[loader]


def save_different(rt, path, where):
    tree = common() | {"epoch": rt.rank // 2 if where == "epoch" else 0}
    if where == "shape":
        tree["ints"] = torch.arange(5 + (rt.rank == 1))
    if where == "keys" and rt.rank == 2:
        tree["more"] = 1
    if where == "path":
        path = f"{path}-{rt.rank}"
    try:
        ff.save(rt, path, tree)
    except MismatchError as error:
        return str(error)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("epoch", "epoch: ranks 0, 1 have 0 (int); ranks 2 have 1 (int)"),
        ("shape", "ints: ranks 0, 2 have a tensor int64[5]; ranks 1 have a tensor int64[6]"),
        ("keys", "more: ranks 0, 1 have nothing; ranks 2 have 1 (int)"),
        ("path", "the path: ranks 0 have"),
    ],
)
def test_ranks_that_differ_are_told_where(tmp_path, ranks, where, text):
    messages = ranks.run(save_different, tmp_path / "c", where)
    assert all(text in message and f"this is rank {rank}" in message for rank, message in enumerate(messages))
    assert os.listdir(tmp_path) == []


def save_with_one_failing(rt, path):
    """Rank 1 may write 1,000 bytes only, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rt.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        ff.save(rt, path, {"w": [torch.full((5000,), 1.0) for _ in range(3)]})
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_rank_that_fails_in_the_middle_leaves_the_previous_checkpoint(tmp_path, ranks):
    ranks.run(save_common, tmp_path / "c", 1)
    before = folder_of(tmp_path / "c")
    for rank, message in enumerate(ranks.run(save_with_one_failing, tmp_path / "c")):
        assert "failed on 1 of 3 ranks" in message
        assert "rank 1: OSError: [Errno 27] File too large" in message
        assert f"this is rank {rank}" in message
    assert folder_of(tmp_path / "c") == before
    assert os.listdir(tmp_path) == ["c"]
    ranks.run(save_common, tmp_path / "c", 2)
    assert ranks.run(load_plain, tmp_path / "c", world_size=1) == [bits(common(2))]


def load_from_own_path(rt, path):
    try:
        ff.load(rt, f"{path}-{rt.rank}")
    except (MismatchError, CheckpointError) as error:
        return type(error), str(error)


def test_a_load_fails_on_all_ranks_or_on_none(tmp_path, ranks):
    for rank in range(3):
        ff.save(RT, tmp_path / f"c-{rank}", {"a": torch.ones(9)})
    for rank, (kind, message) in enumerate(ranks.run(load_from_own_path, tmp_path / "c")):
        assert kind is MismatchError
        assert f"this is rank {rank}" in message
    for rank in (1, 2):
        shutil.copytree(tmp_path / "c-0", tmp_path / f"c-{rank}", dirs_exist_ok=True)
    assert ranks.run(load_from_own_path, tmp_path / "c") == [None] * 3
    damage(tmp_path / "c-2/data/r00000-000.safetensors", -1)
    for kind, message in ranks.run(load_from_own_path, tmp_path / "c"):
        assert kind is CheckpointError
        assert "rank 2: CheckpointError" in message
        assert "is damaged" in message


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 5))
def test_shares_are_even_and_complete(sizes, world_size):
    leaves = [manifest.Leaf(kind="tensor", dtype="float32", shape=(size,)) for size in sizes]
    owners = [((whole(leaf.shape), range(world_size)),) for leaf in leaves]
    found = sharing.shares(leaves, owners, world_size)
    assert sorted(chore.leaf for share in found for chore in share) == list(range(len(sizes)))
    loads = [sum(sizes[chore.leaf] for chore in share) for share in found]
    assert max(loads) - min(loads) <= max(sizes, default=0)
