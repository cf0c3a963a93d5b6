"""How a checkpoint appears in a folder, in the place of another one or beside it, and how it is found there."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import safe_open

import fabricfn as ff
from fabricfn.checkpoint.storage import commit
from fabricfn.errors import CheckpointError
from tests.support.checkpoints import damage, folder_of
from tests.support.runtimes import RT

# ---------------------------------------------------------------- the commit


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("mine")
    ff.save(RT, tmp_path / "mixed", {"a": 1})
    (tmp_path / "mixed/data/mine.txt").write_text("mine")
    before = folder_of(tmp_path)
    for name, text in [("file", "is a file"), ("folder", "thesis.txt"), ("mixed", "data/mine.txt")]:
        with pytest.raises(CheckpointError, match=text):
            ff.save(RT, tmp_path / name, {"a": 2})
    with pytest.raises(CheckpointError, match="file is a file|Not a directory"):
        ff.save(RT, tmp_path / "file/c", {"a": 2})
    assert folder_of(tmp_path) == before


def test_saving_goes_through_links_makes_parents_and_keeps_the_umask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ff.save(RT, "deep/down/last.ckpt", {"n": 1})
    os.symlink("deep/down/last.ckpt", "link")
    (tmp_path / "empty").mkdir()
    ff.save(RT, tmp_path / "empty", {"n": 3})
    umask = os.umask(0o027)
    try:
        ff.save(RT, "link", {"n": 2})
    finally:
        os.umask(umask)
    assert os.path.islink("link")
    assert ff.load(RT, "deep/down/last.ckpt") == ff.load(RT, "link") == {"n": 2}
    assert (tmp_path / "deep/down/last.ckpt/manifest.json").stat().st_mode & 0o777 == 0o640
    assert os.listdir("deep/down") == ["last.ckpt"]


def test_where_folders_cannot_be_exchanged_the_old_one_is_put_aside(tmp_path):
    def prepared(name, number):
        ff.save(RT, tmp_path / name, {"n": number, "w": torch.full((9,), float(number))})
        return tmp_path / name

    target = prepared("c", 1)
    new = prepared("new", 2)
    work = tmp_path / f".tmp-c-{'0' * 32}"
    os.rename(new, work)
    commit.put_in_place(work, target, exchange=lambda a, b: False)
    assert ff.load(RT, target)["n"] == 2
    aside = tmp_path / f".old-c-{'0' * 32}"
    assert sorted(os.listdir(tmp_path)) == [aside.name, "c"]

    shutil.rmtree(target)  # as after a kill between the two renames
    with pytest.warns(UserWarning, match="was being replaced or removed when that was killed"):
        assert ff.load(RT, target)["n"] == 1
    assert ff.list_checkpoints(tmp_path) == [target]
    assert ff.latest(tmp_path) == target
    prepared("c", 3)
    assert os.listdir(tmp_path) == ["c"]
    assert ff.load(RT, target)["n"] == 3


def test_what_killed_saves_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    dead, other = tmp_path / f".tmp-c-{'1' * 32}", tmp_path / f".tmp-cc-{'1' * 32}"
    dead.mkdir()
    other.mkdir()
    work, lock = commit.work_folder(tmp_path / "c", "2" * 32)
    assert not dead.exists()
    ff.save(RT, tmp_path / "c", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, work.name, "c"])
    os.close(lock)
    ff.save(RT, tmp_path / "c", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == sorted([other.name, "c"])


def test_a_reader_never_sees_a_mixture_while_the_checkpoint_is_replaced(tmp_path):
    def tree(number):
        return {"n": number, "w": [torch.full((1000,), float(number)) for _ in range(3)]}

    ff.save(RT, tmp_path / "c", tree(0))
    stop = threading.Event()
    seen = []

    def read():
        while not stop.is_set():
            found = ff.load(RT, tmp_path / "c")
            seen.append((found["n"], {value.item() for w in found["w"] for value in w}))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 40):
        ff.save(RT, tmp_path / "c", tree(number))
    stop.set()
    reader.join()
    assert len(seen) > 1
    assert all(values == {number} for number, values in seen)
    assert [number for number, _ in seen] == sorted(number for number, _ in seen)


# ---------------------------------------------------------------- what is there


def test_latest_is_by_number_then_by_time_and_says_when_it_falls_back(tmp_path):
    assert ff.latest(tmp_path / "nowhere") is None
    assert ff.latest(tmp_path) is None
    for name in ("last", "step-9", "step-10", "step-000000020", "epoch_2.ckpt"):
        ff.save(RT, tmp_path / name, {"name": name})
    (tmp_path / f".tmp-step-99-{'0' * 32}").mkdir()
    (tmp_path / "step-100-notes").mkdir()
    (tmp_path / "step-200.txt").write_text("")
    names = [path.name for path in ff.list_checkpoints(tmp_path)]
    assert names == ["last", "epoch_2.ckpt", "step-9", "step-10", "step-000000020"]
    assert ff.load(RT, ff.latest(tmp_path))["name"] == "step-000000020"
    damage(tmp_path / "step-000000020/manifest.json", 10)
    with pytest.warns(UserWarning, match=r"falls back to .*step-10.*step-000000020/manifest.json"):
        assert ff.latest(tmp_path).name == "step-10"
    assert len(ff.list_checkpoints(tmp_path)) == 4
    for name in ("a", "b"):
        ff.save(RT, tmp_path / "unnumbered" / name, {"name": name})
    os.utime(tmp_path / "unnumbered/a/manifest.json", (2e9, 2e9))
    assert ff.latest(tmp_path / "unnumbered").name == "a"
    for path in (tmp_path / "unnumbered").iterdir():
        (path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="no whole checkpoint"):
        assert ff.latest(tmp_path / "unnumbered") is None


def test_a_missing_checkpoint_is_an_error_that_says_what_there_is(tmp_path):
    ff.save(RT, tmp_path / "run/step-1", {"a": 1})
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*step-2; .*run holds step-1"):
        ff.load(RT, tmp_path / "run/step-2")
    with pytest.raises(CheckpointError, match="there is no .*nowhere"):
        ff.load(RT, tmp_path / "nowhere/step-2")
    with pytest.raises(CheckpointError, match=r"folder of checkpoints \(step-1\).*ff.latest"):
        ff.load(RT, tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        ff.load(RT, tmp_path / "file")


def test_looking_at_a_checkpoint_imports_no_torch(tmp_path):
    ff.save(RT, tmp_path / "step-3", {"w": torch.ones(2, 3), "lr": 0.5, "tied": [None]})
    code = """
import sys, fabricfn as ff
path = ff.latest(sys.argv[1])
assert ff.list_checkpoints(sys.argv[1]) == [path]
print(ff.inspect_checkpoint(path))
ff.verify_checkpoint(path)
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert "step-3" in head
    assert "by 1 rank (single)" in head
    assert lines == ["  w: float32[2, 3]", "  lr = 0.5", "  tied/0 = None"]


def test_a_checkpoint_needs_no_fabricfn_to_be_read(tmp_path):
    ff.save(RT, tmp_path / "c", {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "epoch": 4})
    text = json.loads((tmp_path / "c/manifest.json").read_text())
    leaf = next(leaf for leaf in text["leaves"] if leaf["path"] == "model/w")
    number, piece = text["leaves"].index(leaf), leaf["pieces"][0]
    with safe_open(tmp_path / "c" / text["files"][piece["file"]]["name"], "pt") as file:
        assert file.get_tensor(f"{number}.0").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.metadata()["save_id"] == text["save_id"]
