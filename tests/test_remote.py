"""Checkpoints at URLs: what is saved is loaded, listed, pruned and copied as on a disk, or refused."""

import datetime
import sys

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

import fabricfn as ff
from fabricfn.errors import CheckpointError, ConfigurationError
from tests.support.runtimes import RT
from tests.support.stores import MIB, TREES, Faulty, check_round_trip, contents, data_names, faulty_store, same, tree_of

store = faulty_store()


class Plain(LocalFileSystem):
    """A file system that is no object store, as sftp:// is none."""

    protocol = ("plain",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("plain://"))


fsspec.register_implementation("plain", Plain, clobber=True)


@given(TREES)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_load_of_save_is_the_tree_in_memory(store, tree):
    check_round_trip("faulty://run/c", tree)
    assert len(Faulty.store) <= 2  # of the one that was replaced, nothing is left


def test_records_of_training_resume_from_a_url(store):
    module = torch.nn.Linear(3, 2)
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
    grad_fn = ff.value_and_grad(RT, lambda net, x: net(x).square().mean())

    def step(model, opt):
        _, grads = grad_fn(model, torch.ones(4, 3))
        return ff.optimizer_step(RT, model, opt, grads)

    model, opt = step(model, opt)
    receipt = ff.save(RT, "faulty://run/c/", {"model": model, "opt": opt})
    assert receipt.path == "faulty://run/c"
    assert receipt.bytes == sum(map(len, contents().values()))
    loaded = ff.load(RT, receipt.path, {"model": model, "opt": opt})
    ahead, again = step(model, opt)[0], step(loaded["model"], loaded["opt"])[0]
    assert same(dict(ahead.params), dict(again.params))


def test_a_save_beside_the_training_goes_to_a_url_and_tells_how_far_it_is(store):
    tree, seen, failures = {"w": torch.arange(6 * MIB, dtype=torch.float32)}, [], [0]

    def fault(operation, path):
        if operation == "part" and failures[0] == 0:
            failures[0] += 1
            raise TimeoutError

    Faulty.fault = fault
    saving = ff.save(RT, "faulty://run/c", tree, blocking=False, progress=lambda *done: seen.append(done))
    tree["w"].zero_()
    assert saving.wait().path == saving.path == "faulty://run/c"
    assert same(ff.load(RT, "faulty://run/c")["w"], torch.arange(6 * MIB, dtype=torch.float32))
    assert failures == [1] and seen[-1] == (24 * MIB, 24 * MIB)


def test_file_urls_are_folders(tmp_path):
    receipt = ff.save(RT, f"file://{tmp_path}/run/c", tree_of())
    assert receipt.path == tmp_path / "run/c"
    assert ff.latest(f"file://{tmp_path}/run") == tmp_path / "run/c"
    assert same(ff.load(RT, f"file://{tmp_path}/run/c"), tree_of())


def test_copies_between_disks_and_stores_load_and_are_replaced(store, tmp_path):
    ff.save(RT, tmp_path / "c", tree_of(1))
    for file in (tmp_path / "c").rglob("*.*"):
        Faulty().pipe_file(f"/run/c/{file.relative_to(tmp_path / 'c')}", file.read_bytes())
    assert same(ff.load(RT, "faulty://run/c"), tree_of(1))
    ff.save(RT, "faulty://run/c", tree_of(2))
    assert len(data_names()) == 1
    for name, data in contents().items():
        place = tmp_path / "down" / name.removeprefix("/run/c/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    assert same(ff.load(RT, tmp_path / "down"), tree_of(2))
    ff.save(RT, tmp_path / "down", tree_of(3))
    assert same(ff.load(RT, tmp_path / "down"), tree_of(3))


def test_an_export_is_made_on_a_disk_and_never_outlives_its_checkpoint(store, tmp_path):
    model = ff.setup_model(RT, torch.nn.Linear(2, 1))
    with pytest.raises(ConfigurationError, match=r"ff.consolidate\(url, folder\)"):
        ff.save(RT, "faulty://run/c", {"model": model}, export="hf")
    assert contents() == {}
    ff.save(RT, "faulty://run/c", {"model": model})
    (file,) = ff.consolidate("faulty://run/c", tmp_path / "hub")
    assert same(load_file(file), dict(model.params))
    with pytest.raises(CheckpointError, match="is a URL; this function takes a path on a disk"):
        ff.consolidate("faulty://run/c", "faulty://hub")
    Faulty().pipe_file("/run/c/model.safetensors", file.read_bytes())  # as a folder with an export is copied up
    ff.save(RT, "faulty://run/c", {"model": model})
    assert "/run/c/model.safetensors" not in Faulty.store


def test_a_file_system_without_one_step_puts_is_written_but_not_replaced(tmp_path):
    url = f"plain://{tmp_path}/run/c"
    ff.save(RT, url, tree_of(1))
    assert same(ff.load(RT, url), tree_of(1))
    with pytest.raises(CheckpointError, match=r"plain:// cannot replace a file in one step"):
        ff.save(RT, url, tree_of(2))
    assert ff.verify_checkpoint(url).entries
    run = f"plain://{tmp_path}/run"
    assert ff.list_checkpoints(run) == [url]
    for step in (1, 2):
        ff.save(RT, f"{run}/step-{step}", tree_of(step))
    assert ff.prune_checkpoints(RT, run, last=1) == [f"{run}/step-1"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["c", "step-2"]


def test_what_is_there_is_listed_by_number(store, tmp_path):
    assert ff.latest("faulty://run") is None
    for step in (2, 10, 9):
        ff.save(RT, f"faulty://run/step-{step}", tree_of(step))
    assert ff.list_checkpoints("faulty://run/") == [f"faulty://run/step-{step}" for step in (2, 9, 10)]
    assert ff.latest("faulty://run") == "faulty://run/step-10"
    summary = ff.inspect_checkpoint("faulty://run/step-9")
    assert (summary.path, summary.entries[3].value) == ("faulty://run/step-9", 9)
    del Faulty.store["/run/step-10/manifest.json"]
    with pytest.warns(UserWarning, match=r"falls back to faulty://run/step-9.*step-10 is not a whole checkpoint"):
        assert ff.latest("faulty://run") == "faulty://run/step-9"
    with pytest.raises(CheckpointError, match="is a checkpoint itself"):
        ff.latest("faulty://run/step-2")
    with pytest.raises(
        CheckpointError, match=r"is a folder of checkpoints \(step-2, step-9\).*ff.latest\('faulty://run'\)"
    ):
        ff.load(RT, "faulty://run")
    for name in ("a", "b"):  # no numbers: by time
        ff.save(RT, f"faulty://other/{name}", tree_of())
    Faulty.store["/other/a/manifest.json"].modified += datetime.timedelta(hours=1)
    assert ff.latest("faulty://other") == "faulty://other/a"


def test_a_store_keeps_the_last_the_best_and_every_nth(store):
    for step, loss in ((10, 0.5), (20, 0.1), (25, 0.4), (30, 0.3), (35, 0.2)):
        ff.save(RT, f"faulty://run/step-{step}", {"w": torch.ones(2), "loss": loss})
    Faulty().pipe_file("/run/step-25/notes.txt", b"mine")
    before = contents()
    with pytest.warns(UserWarning, match=r"leaves faulty://run/step-25 alone.*notes.txt"):
        gone = ff.prune_checkpoints(RT, "faulty://run", last=1, every=20, best=2, metric="loss")
    assert gone == ["faulty://run/step-10", "faulty://run/step-30"]
    assert contents() == {
        name: data for name, data in before.items() if not name.startswith(("/run/step-10/", "/run/step-30/"))
    }


def test_what_is_no_checkpoint_is_refused(store):
    Faulty().pipe_file("/run/thesis.txt", b"mine")
    Faulty().pipe_file("/other/data/mine.txt", b"mine")
    before = contents()
    for url, text in [
        ("faulty://run", "thesis.txt"), ("faulty://other", "data/mine.txt"),
        ("faulty://run/thesis.txt", "is an object"), ("faulty://", "a prefix of its own"),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match=text):
            ff.save(RT, url, tree_of())
    assert contents() == before


def test_missing_packages_and_spoilt_urls_are_named(monkeypatch):
    with pytest.raises(CheckpointError, match=r"pathlib.*Write it as a string: 's3://bucket/c'"):
        ff.save(RT, "s3:/bucket/c", tree_of())
    with pytest.raises(CheckpointError, match="Protocol not known: nosuch"):
        ff.load(RT, "nosuch://bucket/c")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CheckpointError, match=r"needs a package of its own.*gcsfs"):
        ff.save(RT, "gs://bucket/c", tree_of())
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(CheckpointError, match=r"pip install 'fabricfn\[remote\]'"):
        ff.save(RT, "s3://bucket/c", tree_of())
