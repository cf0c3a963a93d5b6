"""Which checkpoints stay: laws of the pure function, and a removal that leaves nothing half and takes nothing else."""

import math
import os
import shutil
import warnings

import pytest
from hypothesis import given, settings, strategies as st

import fabricfn as ff
from fabricfn.checkpoint.storage import removing
from fabricfn.errors import CheckpointError, ConfigurationError, MismatchError
from tests.support.runtimes import RT
from tests.support.worlds import world_of

ranks = world_of("threads", 3)


def saved(folder, *steps, **values):
    for step in steps:
        ff.save(RT, folder / f"step-{step}", {"step": step, **{name: of[step] for name, of in values.items()}})
    return folder


def names(folder):
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------- the choice

STEPS = st.lists(st.integers(0, 60), unique=True, max_size=12).map(sorted)
COUNTS = st.tuples(
    st.integers(1, 5), st.none() | st.integers(1, 20), st.integers(1, 4), st.sampled_from(["min", "max"])
)
VALUES = st.sampled_from([0.0, -0.0, 1.0, -2.0, math.inf, -math.inf, math.nan])


@st.composite
def questions(draw):
    steps = draw(STEPS)
    metric = {step: draw(VALUES) for step in steps if draw(st.booleans())}
    return steps, metric, draw(COUNTS)


def chosen(steps, metric, counts):
    last, every, best, mode = counts
    return ff.retained(steps, last=last, every=every, best=best, metric=metric, mode=mode)


@given(questions())
def test_the_newest_the_best_and_every_nth_stay_and_nothing_else(question):
    steps, metric, counts = question
    last, every, best, mode = counts
    kept = chosen(steps, metric, counts)
    assert kept == sorted(kept)
    sign = 1 if mode == "min" else -1
    for step in steps:
        place = steps.index(step)
        value = sign * metric.get(step, math.nan)
        ahead = sum(
            sign * other < value or (sign * other == value and newer > step)
            for newer, other in metric.items()
            if newer != step and not math.isnan(other)
        )
        is_best = not math.isnan(value) and ahead < best
        expected = place >= len(steps) - last or (every is not None and step % every == 0) or is_best
        assert (step in kept) == expected


@given(questions())
def test_kept_is_kept_again_and_asking_for_more_drops_nothing(question):
    steps, metric, counts = question
    last, every, best, mode = counts
    kept = chosen(steps, metric, counts)
    assert kept[-1:] == steps[-1:]
    assert chosen(kept, metric, counts) == kept
    for more in [(last + 1, every, best, mode), (last, every, best + 1, mode), (last, every or 7, best, mode)]:
        assert set(kept) <= set(chosen(steps, metric, more))
    assert ff.retained(steps, last=len(steps) + 1) == steps


@given(questions())
def test_a_later_checkpoint_saves_none_that_was_given_up(question):
    """So pruning after each save keeps what pruning once would: the last and every n-th, not only with luck."""
    steps, metric, counts = question
    alive = []
    for step in steps:
        alive = chosen([*alive, step], metric, counts)
    assert alive == chosen(steps, metric, counts)


def test_paths_and_names_are_asked_for_their_last_number(tmp_path):
    paths = [tmp_path / f"epoch=2-step={step}" for step in (999, 1000, 1001)]
    assert ff.retained(paths, last=1, every=500) == paths[1:]
    assert ff.retained(["a", "step-5", "step-7"], last=1, every=5) == ["step-5", "step-7"]
    assert ff.retained([], last=1, best=1, metric={}) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"last": 0}, "the newest checkpoint is always kept"),
        ({"last": 1, "every": 0}, "counts are positive"),
        ({"last": 1, "best": -1, "metric": {}}, "counts are positive"),
        ({"last": 1, "best": 1}, "best needs a metric"),
        ({"last": 1, "metric": {}}, "a metric needs best"),
        ({"last": 1, "mode": "least"}, "'min'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_deleted(tmp_path, ranks, options, text):
    saved(tmp_path, 1, 2)
    for call in (
        lambda: ff.retained([1, 2], **options),
        lambda: ff.prune_checkpoints(RT, tmp_path, **options),
        lambda: ranks.run(lambda rt: ff.prune_checkpoints(rt, tmp_path, **options)),
    ):
        with pytest.raises(ConfigurationError, match=text):
            call()
    assert names(tmp_path) == ["step-1", "step-2"]


# ---------------------------------------------------------------- the removal


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=5), st.integers(1, 3)
)
@settings(max_examples=15)
def test_pruning_is_the_choice_and_twice_is_once(tmp_path_factory, series, last):
    folder = tmp_path_factory.mktemp("series")
    loss = {}
    for step, value in series:  # steps come in any order, and some again
        saved(folder, step, loss={step: value})
        loss[step] = value
    before = {path.name: ff.load(RT, path) for path in ff.list_checkpoints(folder)}
    kept = {*ff.retained(sorted(loss), last=last, best=1, metric=loss), series[-1][0]}
    removed = ff.prune_checkpoints(RT, folder, last=last, best=1, metric="loss")
    assert [path.name for path in removed] == [f"step-{step}" for step in sorted(loss) if step not in kept]
    assert names(folder) == [f"step-{step}" for step in sorted(kept)]
    assert {path.name: ff.load(RT, path) for path in ff.list_checkpoints(folder)} == {
        name: tree for name, tree in before.items() if (folder / name) not in removed
    }
    assert ff.prune_checkpoints(RT, folder, last=last, best=1, metric={f"step-{s}": v for s, v in loss.items()}) == []
    shutil.rmtree(folder)


def test_the_one_just_written_stays_also_when_older_numbers_are_higher(tmp_path):
    saved(tmp_path, 100, 200, 300, 10)
    assert [path.name for path in ff.prune_checkpoints(RT, tmp_path, last=1)] == ["step-100", "step-200"]


def test_only_whole_checkpoints_with_a_number_are_counted_or_deleted(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5)
    ff.save(RT, tmp_path / "last", {"n": 1})
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-9/notes.txt").write_text("mine")
    (tmp_path / "step-0.txt").write_text("mine")
    (tmp_path / ".tmp-step-3-mine").mkdir()
    (tmp_path / "step-4/manifest.json").write_text("damaged")
    (tmp_path / "best-2").symlink_to(tmp_path / "step-2")
    shutil.copytree(tmp_path / "last", tmp_path / "elsewhere/far-1")
    (tmp_path / "far-1").symlink_to(tmp_path / "elsewhere/far-1")
    before = names(tmp_path)
    removed = ff.prune_checkpoints(RT, tmp_path, last=2)
    assert removed == [tmp_path / "step-1"], "5 and 3 are the last two that are whole, best-2 leads to 2"
    assert names(tmp_path) == sorted(set(before) - {"step-1"})
    assert ff.load(RT, tmp_path / "best-2")["step"] == 2
    assert ff.load(RT, tmp_path / "far-1")["n"] == 1


def test_a_checkpoint_with_files_of_others_is_left_and_named(tmp_path):
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "step-1/notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match=r"leaves .*step-1 alone.*notes\.txt"):
        assert ff.prune_checkpoints(RT, tmp_path, last=1) == [tmp_path / "step-2"]
    assert ff.load(RT, tmp_path / "step-1")["step"] == 1


def test_an_unknown_metric_names_the_numbers_that_there_are(tmp_path):
    saved(tmp_path, 1, 2, loss={1: 0.5, 2: 0.7})
    with pytest.raises(CheckpointError, match=r"has a number 'val'.*loss, step.*float\(loss\)"):
        ff.prune_checkpoints(RT, tmp_path, last=1, best=1, metric="val")
    assert names(tmp_path) == ["step-1", "step-2"]
    assert ff.prune_checkpoints(RT, tmp_path / "none", last=1, best=1, metric="val") == []


def test_rank_zero_deletes_every_rank_is_told_and_differing_ranks_are_refused(tmp_path, ranks):
    saved(tmp_path, 1, 2, 3)

    def differing(rt):
        with pytest.raises(MismatchError, match=r"rank 1: .*last=2"):
            ff.prune_checkpoints(rt, tmp_path, last=1 + rt.rank)

    ranks.run(differing)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    found = ranks.run(lambda rt: ff.prune_checkpoints(rt, tmp_path, last=2))
    assert found == [[tmp_path / "step-1"]] * 3
    assert names(tmp_path) == ["step-2", "step-3"]


def test_a_removal_that_fails_is_an_error_on_every_rank(tmp_path, ranks, monkeypatch):
    saved(tmp_path, 1, 2)
    os.mkdir(tmp_path / ".old-step-1-x")

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(removing.shutil, "rmtree", refused)

    def pruned(rt):
        with pytest.raises(CheckpointError, match=r"failed on 1 of 3 ranks.*rank 0: PermissionError.*step-1"):
            ff.prune_checkpoints(rt, tmp_path, last=1)

    ranks.run(pruned)
    assert ff.list_checkpoints(tmp_path) == [tmp_path / "step-2"]
    monkeypatch.undo()
    ff.prune_checkpoints(RT, tmp_path, last=1)
    assert names(tmp_path) == [".old-step-1-x", "step-2"], "what the failed removal left is swept"


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


def test_a_removal_that_is_killed_before_any_call_leaves_each_whole_or_gone(tmp_path, monkeypatch):
    """Each call to the file system is a point of time: stop before the first, the second, ... until none is left."""
    calls = ("rename", "unlink", "rmdir")

    def stops(number):
        folder = saved(tmp_path / str(number), 1, 2, 3)
        left = [number]

        def stopping(call):
            def instead(*args, **options):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return call(*args, **options)

            return instead

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, stopping(getattr(os, name)))
            try:
                ff.prune_checkpoints(RT, folder, last=1)
                ended = True
            except Killed:
                ended = False
        whole = [path.name for path in ff.list_checkpoints(folder)]
        assert whole in (["step-1", "step-2", "step-3"], ["step-2", "step-3"], ["step-3"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*this is the checkpoint that stood there before")
            for path in ff.list_checkpoints(folder):
                ff.verify_checkpoint(path)
        assert ff.latest(folder) == folder / "step-3"
        ff.prune_checkpoints(RT, folder, last=1)
        assert names(folder) == ["step-3"], "the next one ends it"
        return ended

    ends = [stops(number) for number in range(12)]
    assert ends.index(True) >= 6
    assert all(ends[ends.index(True) :])


def test_a_checkpoint_that_takes_the_place_meanwhile_is_not_deleted(tmp_path, monkeypatch):
    saved(tmp_path, 1, 2)
    rename = os.rename

    def overtaken(source, target):
        monkeypatch.undo()
        ff.save(RT, tmp_path / "step-1", {"step": "new"})
        rename(source, target)

    monkeypatch.setattr(removing.os, "rename", overtaken)
    assert ff.prune_checkpoints(RT, tmp_path, last=1) == []
    assert ff.load(RT, tmp_path / "step-1") == {"step": "new"}
    assert names(tmp_path) == ["step-1", "step-2"]


def test_what_a_killed_save_had_put_aside_does_not_come_back_for_a_deleted_one(tmp_path):
    saved(tmp_path, 1)
    aside = tmp_path / f".old-step-1-{ff.inspect_checkpoint(tmp_path / 'step-1').save_id}"
    shutil.copytree(tmp_path / "step-1", aside)  # as a save leaves it that is killed right after its second rename
    saved(tmp_path, 2)
    assert ff.prune_checkpoints(RT, tmp_path, last=1) == [tmp_path / "step-1"]
    assert ff.list_checkpoints(tmp_path) == [tmp_path / "step-2"]
    assert names(tmp_path) == ["step-2"]
