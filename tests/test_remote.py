"""Checkpoints at URLs: memory, a store that fails on purpose, and a server that speaks S3 over HTTP."""

import contextlib
import datetime
import errno
import gc
import http.client
import http.server
import json
import sys
import threading
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import HealthCheck, given, settings, strategies as st
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import fabricfn as ff
from fabricfn.checkpoint.storage import retrying
from fabricfn.errors import CheckpointError, ConfigurationError
from fabricfn.testing import processes, threads
from tests.checkpoints import bits

RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
MIB = 1 << 20


def same(a, b):
    return bits(a) == bits(b)


def tree_of(seed=0, size=1000):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(size, generator=generator)
    return {"w": weights, "tied": weights, "n": np.arange(seed + 3), "epoch": seed, "s": ["text", None, 0.1]}


# ---------------------------------------------------------------- a store that fails on purpose


class Killed(BaseException):
    """The process ended here."""


class Upload(AbstractBufferedFile):
    """Parts that nobody sees before the upload is completed, as in S3."""

    def _initiate_upload(self):
        self.parts = []

    def _upload_chunk(self, final=False):
        with self.fs.step("part", self.path):
            self.parts.append(self.buffer.getvalue())
        if final:
            with self.fs.step("complete", self.path):
                self.fs.store[self.path] = MemoryFile(self.fs, self.path, b"".join(self.parts))
        return True


class Faulty(MemoryFileSystem):
    """Objects in memory; `fault(kind, path)` may raise before an operation is done, or say what is raised after it."""

    protocol = ("faulty", "memory")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    log: ClassVar = []
    fault = None

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("faulty://").strip("/")

    @contextlib.contextmanager
    def step(self, kind, path, *more):
        after = None
        if Faulty.fault is not None:
            after = Faulty.fault(kind, path)
        Faulty.log.append((kind, path, *more))
        yield
        if after is not None:
            raise after

    def cat_file(self, path, start=None, end=None, **kwargs):
        with self.step("read" if start else "get", path, start, end):  # from the beginning: manifests and headers
            return super().cat_file(path, start, end, **kwargs)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        with self.step("put", path):
            self.store[path] = MemoryFile(self, path, value)

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        assert mode == "wb"
        with self.step("open", path):
            return Upload(self, path, mode, block_size)

    def info(self, path, **kwargs):
        with self.step("info", path):
            return super().info(path, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        with self.step("ls", path):
            return super().ls(path, detail, **kwargs)

    def modified(self, path):
        with self.step("modified", path):
            return super().modified(path)

    def rm_file(self, path):
        with self.step("delete", path):
            self._rm(path)


class Plain(LocalFileSystem):
    """A file system that is no object store, as sftp:// is none."""

    protocol = ("plain",)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("plain://"))


fsspec.register_implementation("faulty", Faulty, clobber=True)
fsspec.register_implementation("plain", Plain, clobber=True)


@pytest.fixture
def store(monkeypatch):
    """The names and objects of the faulty store, which is empty, sound, and retried without pauses."""
    monkeypatch.setattr(retrying, "PAUSE", 0.0)
    Faulty.store.clear()
    Faulty.log.clear()
    Faulty.fault = None
    yield Faulty.store
    Faulty.fault = None
    Faulty.store.clear()


def contents():
    return {name: file.getvalue() for name, file in Faulty.store.items()}


def restore(objects):
    Faulty.store.clear()
    for name, data in objects.items():
        Faulty.store[name] = MemoryFile(Faulty(), name, data)


def data_names(url="/run/c"):
    return sorted(name for name in Faulty.store if name.startswith(f"{url}/data/"))


def nth(wanted, act):
    """A fault that acts at the operation of this number; counting begins with 0."""
    lock, count = threading.Lock(), [0]

    def fault(kind, path):
        with lock:
            number, count[0] = count[0], count[0] + 1
        return act(number - wanted, kind)

    return fault


# ---------------------------------------------------------------- load(save(x)) is x

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4), st.binary(max_size=4),
    st.builds(
        lambda dtype, shape, seed: torch.randint(0, 256, (*shape, 8), dtype=torch.uint8,
                                                 generator=torch.Generator().manual_seed(seed)).view(dtype),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]),
        st.lists(st.integers(0, 3), max_size=2), st.integers(0, 99),
    ).filter(lambda value: value.dtype is not torch.bfloat16),
    st.builds(np.arange, st.integers(0, 5)),
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(-3, 3)), inner, max_size=3),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=8,
)


def check_round_trip(url, tree, **options):
    ff.save(RT, url, tree, **options)
    assert same(ff.load(RT, url, tree, **options), tree)
    plain = ff.load(RT, url, **options)
    ff.save(RT, url, plain, **options)  # in place of the first
    assert same(ff.load(RT, url, **options), plain)
    ff.verify_checkpoint(url, **options)


@given(TREES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_load_of_save_is_the_tree_in_memory(store, tree):
    check_round_trip("faulty://run/c", tree)
    assert len(Faulty.store) <= 2  # of the one that was replaced, nothing is left


@given(TREES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_load_of_save_is_the_tree_over_s3(s3, tree):
    check_round_trip(f"{s3.bucket}/law", tree, storage_options=s3.options)


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


def test_a_kill_at_any_operation_of_a_removal_leaves_each_whole_or_gone(store):
    for step in (1, 2, 3):
        ff.save(RT, f"faulty://run/step-{step}", tree_of(step))
    before = contents()
    Faulty.log.clear()
    ff.prune_checkpoints(RT, "faulty://run", last=1)
    operations = [kind for kind, *_ in Faulty.log]
    assert operations.count("delete") == 4  # of two checkpoints the manifest and the data

    def kill(since, kind):
        if since >= 0:
            raise Killed

    counts = []
    for number in range(len(operations) + 1):
        restore(before)
        Faulty.fault = nth(number, kill)
        with contextlib.suppress(Killed):
            ff.prune_checkpoints(RT, "faulty://run", last=1)
        Faulty.fault = None
        whole = ff.list_checkpoints("faulty://run")
        for url in whole:
            ff.verify_checkpoint(url)
        assert sum(name.endswith("manifest.json") for name in Faulty.store) == len(whole)
        counts.append(len(whole))
    assert counts[0] == 3 and counts[-1] == 1 and counts == sorted(counts, reverse=True)


def test_a_removal_spares_what_was_saved_in_its_place_meanwhile(store):
    for step in (1, 2):
        ff.save(RT, f"faulty://run/step-{step}", tree_of(step))

    def save_again(kind, path):
        chosen = any(entry[:2] == ("get", "/run/step-2/manifest.json") for entry in Faulty.log)
        if chosen and kind == "ls" and path.startswith("/run/step-1"):
            Faulty.fault = None
            ff.save(RT, "faulty://run/step-1", tree_of(7))

    Faulty.log.clear()
    Faulty.fault = save_again
    assert ff.prune_checkpoints(RT, "faulty://run", last=1) == []
    assert same(ff.load(RT, "faulty://run/step-1"), tree_of(7))


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


# ---------------------------------------------------------------- crashes and faults of a store


def test_a_kill_at_any_operation_leaves_the_old_or_the_new_one_whole(store):
    """Every operation of a save over an existing checkpoint: from there on nothing is done any more."""
    old, new, url = tree_of(1), tree_of(2), "faulty://run/c"
    ff.save(RT, url, old)
    before = contents()
    Faulty.log.clear()
    ff.save(RT, url, new)
    operations = [kind for kind, *_ in Faulty.log]
    assert {"ls", "open", "part", "complete", "info", "get", "put", "delete"} <= set(operations)

    def kill(since, kind):
        if since >= 0:
            raise Killed

    outcomes = []
    for number in range(len(operations) + 1):
        restore(before)
        Faulty.fault = nth(number, kill)
        with contextlib.suppress(Killed):
            ff.save(RT, url, new)
        Faulty.fault = None
        ff.verify_checkpoint(url)
        found = ff.load(RT, url)
        outcomes.append(same(found, new))
        assert outcomes[-1] or same(found, old)
        ff.save(RT, url, tree_of(3))
        assert same(ff.load(RT, url), tree_of(3))
    commit = operations.index("put") + 1
    assert outcomes == [number >= commit for number in range(len(operations) + 1)]


def test_an_answer_that_is_lost_at_any_operation_does_no_harm(store):
    """The store did it, and the client learns of a time-out: it is done again, or found done."""
    url = "faulty://run/c"
    ff.save(RT, url, tree_of(1))
    before = contents()
    Faulty.log.clear()
    ff.save(RT, url, tree_of(2))
    for number in range(len(Faulty.log)):
        restore(before)
        Faulty.fault = nth(number, lambda since, kind: TimeoutError("no answer") if since == 0 else None)
        ff.save(RT, url, tree_of(2))
        Faulty.fault = None
        assert same(ff.load(RT, url), tree_of(2))
        assert len(data_names()) == 1


FAULTS = {
    "503": lambda: OSError(errno.EBUSY, "Please reduce your request rate."),
    "500": lambda: OSError(errno.EREMOTEIO, "We encountered an internal error."),
    "timeout": lambda: TimeoutError("timed out"),
    "reset": lambda: ConnectionResetError("reset by peer"),
    "fsspec": fsspec.exceptions.FSTimeoutError,
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("kind", ["ls", "open", "part", "complete", "info", "put", "get", "read", "delete"])
def test_what_passes_is_tried_again(store, name, kind):
    url, failures = "faulty://run/c", [0]
    ff.save(RT, url, tree_of(1))

    def fault(operation, path):
        if operation == kind and failures[0] < 3:
            failures[0] += 1
            raise FAULTS[name]()

    Faulty.fault = fault
    ff.save(RT, url, tree_of(2))
    assert same(ff.load(RT, url), tree_of(2))
    assert failures[0] == 3
    assert len(data_names()) == 1


def test_an_upload_that_is_given_up_is_never_completed(store):
    """fsspec completes a file when it is closed, and closes it when it is collected."""
    tree, parts = {"w": torch.arange(6 * MIB, dtype=torch.float32)}, []

    def fault(operation, path):
        parts.extend([path] * (operation == "part"))
        if operation == "part" and len(parts) == 1:
            raise TimeoutError

    Faulty.fault = fault
    ff.save(RT, "faulty://run/c", tree)
    gc.collect()
    assert [kind for kind, *_ in Faulty.log].count("complete") == 1
    assert same(ff.load(RT, "faulty://run/c"), tree)


@pytest.mark.parametrize("kind", ["open", "part", "complete", "info", "put"])
def test_what_lasts_is_an_error_on_every_rank_and_the_old_one_stays(store, kind):
    url = "faulty://run/c"
    ff.save(RT, url, tree_of(1))
    before, tries = contents(), []

    def fault(operation, path):
        if operation == kind:
            tries.append(path)
            raise OSError(errno.EBUSY, "Please reduce your request rate.")

    def save(rt):
        with pytest.raises(CheckpointError) as caught:
            ff.save(rt, url, tree_of(2))
        return str(caught.value)

    Faulty.fault = fault
    with threads(2) as ranks:
        said = ranks.run(save)
    Faulty.fault = None
    for text in said:
        assert "faulty://run/c/" in text and "reduce your request rate" in text and "6 times in" in text
    assert same(ff.load(RT, url), tree_of(1))
    if kind == "put":  # perhaps the store did take the manifest: the new data stay until they are surely dead
        assert contents().items() >= before.items()
    else:
        assert contents() == before


@pytest.mark.parametrize("error", [PermissionError("403"), ValueError("no such option")])
def test_what_will_not_pass_is_not_tried_again(store, error):
    tries = []

    def fault(operation, path):
        if operation == "open":
            tries.append(path)
            raise error

    Faulty.fault = fault
    with pytest.raises(CheckpointError, match=r"writing faulty://run/c/data/.*failed: (PermissionError|ValueError)"):
        ff.save(RT, "faulty://run/c", tree_of())
    assert len(tries) == 1


def test_patience_is_bounded_in_time(monkeypatch):
    tries = []

    def work():
        tries.append(1)
        raise TimeoutError

    monkeypatch.setattr(retrying, "PATIENCE", -1.0)
    with pytest.raises(CheckpointError, match="reading x failed: TimeoutError"):
        retrying.patient("reading x", work)
    assert len(tries) == 1


def test_dead_data_are_swept_by_the_clock_of_the_store(store):
    url = "faulty://run/c"
    ff.save(RT, url, tree_of(1))
    stray = "/run/c/data/" + "a" * 32 + "-r00000-000.safetensors"
    young = "/run/c/data/" + "b" * 32 + "-r00000-000.safetensors"
    for name, age in ((stray, 25), (young, 23)):
        Faulty.store[name] = MemoryFile(Faulty(), name, b"left by a killed save, or of a living one")
        Faulty.store[name].modified -= datetime.timedelta(hours=age)
    ff.save(RT, url, tree_of(2))
    assert stray not in Faulty.store and young in Faulty.store
    assert len(data_names()) == 2

    def fault(operation, path):  # a store that tells no times: then nothing is surely dead
        if operation == "modified":
            raise NotImplementedError

    Faulty.store[young].modified -= datetime.timedelta(days=100)
    Faulty.fault = fault
    ff.save(RT, url, tree_of(2))
    assert young in Faulty.store


# ---------------------------------------------------------------- reading: what is needed, checked


def test_a_part_reads_only_its_blocks_and_neighbours_at_once(store):
    rows, width = 24, MIB // 4  # rows of 1 MiB, so 4 to a block
    tree = {"a": torch.arange(rows * width, dtype=torch.float32).reshape(rows, width), "b": torch.ones(3 * MIB)}
    ff.save(RT, "faulty://run/c", tree)

    def load(rt):
        mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
        like = {"a": distribute_tensor(torch.zeros(rows, width), mesh, [Shard(0)], src_data_rank=None)}
        part = ff.load(rt, "faulty://run/c", like)["a"].to_local()
        return torch.equal(part, tree["a"].chunk(4)[rt.rank])

    Faulty.log.clear()
    with threads(4) as ranks:  # 6 rows each: 0-6, 6-12, ...
        assert ranks.run(load) == [True] * 4
    blocks = [(start, end - start) for kind, path, *span in Faulty.log if kind in ("get", "read") and "data" in path
              for start, end in [span] if end - start > MIB]  # fmt: skip
    assert sorted(size // MIB for _, size in blocks) == [8, 8, 8, 8]  # each rank two blocks, in one request
    Faulty.log.clear()
    loaded = ff.load(RT, "faulty://run/c", {"a": torch.zeros(rows, width)})
    assert torch.equal(loaded["a"], tree["a"])
    sizes = [span[1] - span[0] for kind, path, *span in Faulty.log if kind in ("get", "read") and "data" in path]
    assert sum(size for size in sizes if size > MIB) == 24 * MIB and len(sizes) == 1 + 3


def test_columns_are_read_in_one_go(store):
    value = torch.arange(3 * MIB, dtype=torch.float32).reshape(-1, 96)  # 12 MiB in 3 blocks
    ff.save(RT, "faulty://run/c", {"a": value})

    def load(rt):
        mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
        like = distribute_tensor(torch.zeros_like(value), mesh, [Shard(1)], src_data_rank=None)
        return torch.equal(ff.load(rt, "faulty://run/c", {"a": like})["a"].to_local(), value.chunk(2, 1)[rt.rank])

    Faulty.log.clear()
    with threads(2) as ranks:
        assert ranks.run(load) == [True] * 2
    sizes = [span[1] - span[0] for kind, path, *span in Faulty.log if kind in ("get", "read") and "data" in path]
    assert sorted(size // MIB for size in sizes if size >= MIB) == [4, 4, 8, 8]  # each block once a rank


def test_damage_is_named(store):
    url = "faulty://run/c"
    ff.save(RT, url, {"a": torch.ones(100), "b": torch.zeros(100)})
    whole, (name,) = contents(), data_names()
    url_of_data = "faulty://" + name[1:]

    def put(data):
        restore(whole)
        Faulty().pipe_file(name, data)

    put(whole[name][:-1] + b"x")
    for read in (lambda: ff.load(RT, url), lambda: ff.verify_checkpoint(url)):
        with pytest.raises(CheckpointError, match=rf"{url_of_data} is damaged: .*block 0 of 'b'"):
            read()
    assert same(ff.load(RT, url, only="a"), {"a": torch.ones(100)})
    put(whole[name][:-1])
    with pytest.raises(CheckpointError, match=rf"{url_of_data} has .* bytes, the manifest says"):
        ff.load(RT, url)
    put(b" " + whole[name][1:])
    with pytest.raises(CheckpointError, match=rf"{url_of_data} begins otherwise"):
        ff.load(RT, url)
    restore(whole)
    del Faulty.store[name]
    with pytest.raises(CheckpointError, match=r"is not a whole checkpoint: data/.* with a, b is missing"):
        ff.load(RT, url)
    restore(whole)
    manifest = json.loads(whole["/run/c/manifest.json"])
    manifest["strategy"] = "other"
    Faulty().pipe_file("/run/c/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(CheckpointError, match=r"faulty://run/c/manifest.json is no whole manifest"):
        ff.load(RT, url)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["get", "read"])
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_opened_again(store, world_size, kind):
    url, turns = "faulty://run/c", []
    ff.save(RT, url, tree_of(0, 100_000))

    def fault(operation, path):
        if operation == kind and "data" in path and len(turns) < 5:
            turns.append(path)
            saved, Faulty.fault = Faulty.fault, None
            ff.save(RT, url, tree_of(len(turns), 100_000))
            Faulty.fault = saved

    with threads(world_size) as ranks:
        Faulty.fault = fault
        loaded = ranks.run(lambda rt: ff.load(rt, url))
    assert len(turns) == 5
    assert all(same(found, tree_of(5, 100_000)) for found in loaded)


def test_a_checkpoint_that_is_replaced_while_it_overwrites_the_template_is_an_error(store):
    url = "faulty://run/c"
    ff.save(RT, url, {"a": torch.ones(9)})

    def fault(operation, path):
        if operation == "read":
            Faulty.fault = None
            ff.save(RT, url, {"a": torch.zeros(9)})

    Faulty.fault = fault
    with pytest.raises(CheckpointError, match=r"was replaced by another checkpoint while it was read"):
        ff.load(RT, url, {"a": torch.ones(9)}, donate=True)


# ---------------------------------------------------------------- a real server


class Proxy(http.server.BaseHTTPRequestHandler):
    """In front of the server: every so often it answers 503, hangs up, or cuts an answer off."""

    protocol_version = "HTTP/1.1"
    turns, faults = 0, True
    lock = threading.Lock()

    def forward(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        with Proxy.lock:
            Proxy.turns += 1
            turn = Proxy.turns if Proxy.faults else 1
        if turn % 4 == 0:
            self.answer(503, {}, b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>")
            return
        if turn % 7 == 0:
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(*self.server.upstream)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        cut = turn % 5 == 0 and len(data) > 100
        headers = {key: value for key, value in answer.getheaders() if key.lower() not in ("connection", "date")}
        self.answer(answer.status, headers, data[:-50] if cut else data, keep=not cut)

    def answer(self, status, headers, data, keep=True):
        self.send_response(status)
        for key, value in ({"content-length": str(len(data))} | {k.lower(): v for k, v in headers.items()}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.close_connection = not keep

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def log_message(self, *args):
        pass


class S3:
    """A server that speaks S3."""

    def __init__(self, address):
        self.bucket = "s3://checkpoints"
        self.address = address
        self.options = self.options_at(*address)

    def options_at(self, host, port):
        # without the retries of botocore, which sleep for seconds: those of fabricfn are the matter here
        return {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"},
                "config_kwargs": {"retries": {"max_attempts": 0}}}  # fmt: skip


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    found = S3(server.get_host_and_port())
    fsspec.filesystem("s3", **found.options).mkdir("checkpoints")
    yield found
    server.stop()


def sharded(rt, seed=0):
    mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
    whole = torch.arange(12.0).reshape(6, 2) + seed
    return {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), "epoch": seed}


def save_sharded(rt, url, options, seed):
    return ff.save(rt, url, sharded(rt, seed), storage_options=options)


def load_sharded(rt, url, options):
    loaded = ff.load(rt, url, sharded(rt, 9), storage_options=options)
    return loaded["w"].to_local(), loaded["epoch"]


def save_apart(rt):
    with pytest.raises(CheckpointError) as caught:
        ff.save(rt, "memory://run/c", sharded(rt))
    return str(caught.value)


def test_ranks_in_processes_of_their_own_write_one_checkpoint(s3):
    url = f"{s3.bucket}/run/step-1"
    with processes(2) as ranks:
        first, second = (ranks.run(save_sharded, url, s3.options, seed) for seed in (1, 2))
        parts = ranks.run(load_sharded, url, s3.options)
        apart = ranks.run(save_apart)
    assert first[0] == first[1] and second[0] == second[1]
    expected = torch.arange(12.0).reshape(6, 2) + 2
    assert same([part for part, _ in parts], list(expected.chunk(2)))
    assert [epoch for _, epoch in parts] == [2, 2]
    loaded = ff.load(RT, url, storage_options=s3.options)
    assert same(loaded, {"w": expected, "epoch": 2})
    fs = fsspec.filesystem("s3", **s3.options)
    fs.invalidate_cache()
    ids = [name.rpartition("/")[2].split("-")[0] for name in fs.ls("checkpoints/run/step-1/data")]
    assert ids == [second[0].save_id] * 2
    assert ff.latest(f"{s3.bucket}/run", storage_options=s3.options) == url
    assert all("is not there" in text and "memory:// is another one in each process" in text for text in apart)


def test_large_arrays_go_up_in_parts(s3, monkeypatch):
    tree = {"w": torch.arange(11 * MIB, dtype=torch.int32), "v": torch.ones(5)}  # 44 MiB: parts of 16 MiB
    url = f"{s3.bucket}/large"
    receipt = ff.save(RT, url, tree, storage_options=s3.options)
    fs = fsspec.filesystem("s3", **s3.options)
    etag = fs.info(f"checkpoints/large/data/{receipt.save_id}-r00000-000.safetensors")["ETag"]
    assert etag.strip('"').endswith("-3")  # S3's mark of an object that came in three parts
    assert same(ff.load(RT, url, tree, storage_options=s3.options), tree)


def test_faults_on_the_wire_are_survived(s3, monkeypatch):
    monkeypatch.setattr(retrying, "PAUSE", 0.001)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.upstream = s3.address
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        options = s3.options_at(*server.server_address)
        for seed in range(3):
            ff.save(RT, f"{s3.bucket}/wire", tree_of(seed), storage_options=options)
            assert same(ff.load(RT, f"{s3.bucket}/wire", storage_options=options), tree_of(seed))
        assert Proxy.turns > 20
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert same(ff.load(RT, f"{s3.bucket}/wire", storage_options=s3.options), tree_of(2))


def test_refusals_of_a_server_are_told_at_once(s3):
    with pytest.raises(CheckpointError, match=r"writing s3://nowhere/c/data/.* failed: there is no such place"):
        ff.save(RT, "s3://nowhere/c", tree_of(), storage_options=s3.options)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at s3://nowhere/c"):
        ff.load(RT, "s3://nowhere/c", storage_options=s3.options)
