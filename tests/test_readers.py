"""Who reads a checkpoint, and who computes its checksums."""

import importlib
import sys
import threading
import zlib

import pytest

from fabricfn.checkpoint import readers
from fabricfn.checkpoint.format import checksums
from fabricfn.world import World, threads_each

ALONE = World()
MUCH = readers.FEW_BYTES


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(readers, "threads_each", lambda count: max(1, 4 // count))


def readers_of(world: World, nbytes: int, remote: bool = False) -> set[str]:
    """The names of the threads that read; each waits for the others of a pair, so that one thread cannot do it all."""
    pair = threading.Barrier(2)

    def work(item: int) -> tuple[int, str]:
        if threading.current_thread() is not threading.main_thread():
            pair.wait(timeout=20)
        return item * item, threading.current_thread().name

    found = readers.by_readers(world, work, range(8), nbytes, remote)
    assert [value for value, _ in found] == [item * item for item in range(8)]
    return {name for _, name in found}


def test_a_rank_reads_with_the_cores_that_it_has(four_cores):
    assert len(readers_of(ALONE, MUCH)) >= 2
    assert len(readers_of(World(local_world_size=2, world_size=2), MUCH)) == 2
    assert readers_of(World(local_world_size=4, world_size=4), MUCH) == {threading.current_thread().name}
    assert readers_of(ALONE, MUCH - 1) == {threading.current_thread().name}
    assert len(readers_of(World(local_world_size=4, world_size=4), 1, remote=True)) >= 2


def test_cores_are_shared_out_and_nobody_has_none():
    assert threads_each(1) >= 1
    assert threads_each(1_000_000) == 1


@pytest.mark.parametrize("missing", [False, True])
def test_checksums_are_those_of_zlib(missing, monkeypatch):
    if missing:
        monkeypatch.setitem(sys.modules, "isal", None)
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    try:
        crc32 = importlib.reload(checksums).crc32
        assert (crc32 is zlib.crc32) == missing
        data = bytes(range(256)) * 300
        for size in (0, 1, 63, 64, 65, 4095, 70_000):
            block = memoryview(data)[:size]
            assert crc32(block, 0) == zlib.crc32(block)
            assert crc32(block, 12345) == zlib.crc32(block, 12345)
    finally:
        monkeypatch.undo()
        importlib.reload(checksums)
