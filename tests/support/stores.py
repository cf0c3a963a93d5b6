"""What the tests of checkpoints at URLs share: a store that fails on purpose, and trees to save."""

import contextlib
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import strategies as st

import fabricfn as ff
from fabricfn.checkpoint.storage import retrying
from tests.support.checkpoints import bits
from tests.support.runtimes import RT

MIB = 1 << 20


def same(a, b):
    return bits(a) == bits(b)


def tree_of(seed=0, size=1000):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(size, generator=generator)
    return {"w": weights, "tied": weights, "n": np.arange(seed + 3), "epoch": seed, "s": ["text", None, 0.1]}


# ---------------------------------------------------------------- a store that fails on purpose


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


fsspec.register_implementation("faulty", Faulty, clobber=True)


def faulty_store():
    """A fixture: the names and objects of the faulty store, which is empty, sound, and retried without pauses."""

    @pytest.fixture
    def store(monkeypatch):
        monkeypatch.setattr(retrying, "PAUSE", 0.0)
        Faulty.store.clear()
        Faulty.log.clear()
        Faulty.fault = None
        yield Faulty.store
        Faulty.fault = None
        Faulty.store.clear()

    return store


def contents():
    return {name: file.getvalue() for name, file in Faulty.store.items()}


def restore(objects):
    Faulty.store.clear()
    for name, data in objects.items():
        Faulty.store[name] = MemoryFile(Faulty(), name, data)


def data_names(url="/run/c"):
    return sorted(name for name in Faulty.store if name.startswith(f"{url}/data/"))


# ---------------------------------------------------------------- trees

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
