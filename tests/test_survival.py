"""Checkpoints survive: kills, power failures, full disks, damage. `python -m tests.reliability` counts more."""

import errno
import os
import shutil
import time

import pytest

import fabricfn as ff
from tests.reliability import audit, corruption, crashes, faults, hostility, kills
from tests.reliability.scene import ALONE


def summed(rows):
    return {key: sum(counts.get(key, 0) for counts in rows.values()) for counts in rows.values() for key in counts}


def test_a_kill_at_any_instant_leaves_the_old_or_the_new():
    found = summed(kills.rows(48, seed=int(time.time())))
    assert found["kills"] == 48 == found["the old"] + found["the new"], found
    assert found["survivors unclear"] == found["left"] == 0, found


@pytest.mark.parametrize("name", crashes.OPERATIONS)
def test_a_power_failure_after_any_call_leaves_the_old_or_the_new(name):
    found = crashes.power_failures(name)
    assert found["points"] > 10 and found["the new"] > 0, found
    assert found["lost"] == found["acknowledged, lost"] == found["left"] == 0, found


def test_the_model_of_power_failures_finds_what_is_not_flushed():
    found = crashes.power_failures("replace by exchange", without="fsync")
    assert found["lost"] > 0 and found["acknowledged, lost"] > 0, found


@pytest.mark.parametrize("name", [name for name in crashes.OPERATIONS if "2 ranks" not in name])
def test_a_power_failure_while_the_next_save_cleans_up_after_a_killed_one(name):
    found = crashes.kill_then_power_failure(name, ways=("all", "none", "random"))
    assert found["whole"] == found["states"] > 500, found


@pytest.mark.parametrize("name", crashes.OPERATIONS)
@pytest.mark.parametrize("error", [lambda: OSError(errno.EIO, "Input/output error"), KeyboardInterrupt])
def test_any_call_that_fails_is_an_error_on_every_rank_and_leaves_nothing(name, error):
    found = crashes.failing_calls(name, error)
    assert found["calls"] > 10 and found["the old"] > 5, found
    assert found["lost"] == found["left"] == found["said nothing"] == 0, found
    allowed = {"CheckpointError", "KeyboardInterrupt", "no error"}  # no error: a removal at the end failed
    assert sum(found.get(key, 0) for key in allowed) == found["calls"], found


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ("a file may not grow", "CheckpointError", os.strerror(errno.EFBIG)),
        ("no permission", "CheckpointError", os.strerror(errno.EACCES)),
        ("the work folder vanishes", "CheckpointError", os.strerror(errno.ENOENT)),
        ("the whole folder vanishes", "CheckpointError", os.strerror(errno.ENOENT)),
        ("Ctrl-C", "KeyboardInterrupt", ""),
    ],
)
def test_what_a_system_refuses_leaves_the_previous_checkpoint(fault, kind, text):
    found, said, number, left = faults.in_child(fault)
    assert found == kind and text in said
    assert number == 0 and left == ["last"]


@pytest.mark.skipif(
    not faults.can_mount(), reason="this user may not mount; file sizes and permissions are tested above"
)
@pytest.mark.parametrize(("how", "code"), [("full", errno.ENOSPC), ("read-only", errno.EROFS)])
def test_a_full_and_a_read_only_disk_leave_the_previous_checkpoint(how, code):
    said, after, finally_ = faults.on_a_mount(how)
    assert os.strerror(code) in said and "ff.save to" in said
    assert after == "0 ['last']" and finally_ == "2 ['last']"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_on_one_rank_only_is_an_error_within_the_timeout_that_says_so(rank):
    kind, text, number = faults.one_rank_alone(rank)
    assert kind == "CheckpointError" and "not every rank made this call" in text and f"this is rank {rank}" in text
    assert number == 0


def test_leftovers_of_another_step_are_swept_after_a_day(tmp_path):
    ff.save(ALONE, tmp_path / "step-1", {"n": 1})
    for name, age in (("old", 2 * 86_400), ("young", 3600)):
        place = tmp_path / f".tmp-step-{len(name)}-{'0' * 32}"
        shutil.copytree(tmp_path / "step-1", place)
        os.utime(place, (time.time() - age,) * 2)
    ff.save(ALONE, tmp_path / "step-2", {"n": 2})
    assert sorted(os.listdir(tmp_path)) == [f".tmp-step-5-{'0' * 32}", "step-1", "step-2"]


def test_every_damage_is_an_error_that_names_the_file():
    rows = corruption.corruptions(200, seed=int(time.time()))
    found = summed(rows)
    assert found["corruptions"] >= 200
    assert found["named"] == found["corruptions"], rows


def test_hostile_manifests_are_an_error_or_the_right_load():
    seen = []
    found = hostility.handmade(20, lambda *bad: seen.append(bad))
    assert found["inputs"] > 60 and found["other"] == found["slow"] == 0, seen
    found = hostility.fuzz(500, seed=int(time.time()), report=lambda *bad: seen.append(bad))
    assert found["inputs"] >= 500 and found["right load"] > 10 and found["other"] == found["slow"] == 0, seen


def test_a_load_imports_unpickles_and_runs_nothing_and_opens_its_own_files_only():
    found = audit.audit(2)
    assert found.pop("opened inside") > 10
    assert not any(found.values()), found
