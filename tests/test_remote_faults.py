"""Checkpoints at URLs: kills and faults of the store, at any operation of a save or a removal."""

import contextlib
import datetime
import errno
import gc
import threading

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile

import fabricfn as ff
from fabricfn.checkpoint.storage import retrying
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.support.runtimes import RT
from tests.support.stores import MIB, Faulty, contents, data_names, faulty_store, restore, same, tree_of

store = faulty_store()


class Killed(BaseException):
    """The process ended here."""


def nth(wanted, act):
    """A fault that acts at the operation of this number; counting begins with 0."""
    lock, count = threading.Lock(), [0]

    def fault(kind, path):
        with lock:
            number, count[0] = count[0], count[0] + 1
        return act(number - wanted, kind)

    return fault


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
