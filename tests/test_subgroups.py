"""Collectives of some ranks only: sub-groups, and from one rank to another."""

import functools
import weakref

import torch
import torch.distributed as dist

from fabricfn.collectives import (
    all_gather,
    all_gather_object,
    all_reduce,
    barrier,
    broadcast,
    gather,
    recv,
    send,
)
from fabricfn.errors import CapabilityError, ConfigurationError, MismatchError
from tests.support.forks import ONE, fork, message_of
from tests.support.worlds import world_of

threads = world_of("threads", 3)


# --- sub-groups -------------------------------------------------------------------------------------------------------


def subgroups(rt):
    found = []
    # in another order on every rank: overlapping groups must not wait for each other's creation
    for axis in [(0, 1), (0, 2), (2, 1), (0, 1), (1,), (2, 0, 1)]:
        if rt.rank in axis:
            found.append((sorted(axis), all_reduce(rt, rt.rank + 1, "sum", axis=axis)))
            assert all_gather(rt, rt.rank, axis=axis).tolist() == sorted(axis)
            assert broadcast(rt, f"from {rt.rank}", max(axis), axis=axis) == f"from {max(axis)}"
            got = gather(rt, torch.tensor([rt.rank]), max(axis), axis=axis)
            assert (got is None) == (rt.rank != max(axis))
            assert all_gather_object(rt, rt.rank, axis=axis) == sorted(axis)
            barrier(rt, "inside", axis=axis)
        else:
            assert "does not belong" in message_of(ConfigurationError, all_reduce, rt, 1, axis=axis)
    if rt.rank != 1:
        outside = message_of(ConfigurationError, broadcast, rt, ONE, 1, axis=(0, 2))
        assert "src=1" in outside
        message = message_of(MismatchError, all_reduce, rt, torch.ones(1 + rt.rank), axis=(0, 2))
        assert "rank 0: float32[1] on cpu; rank 2: float32[3] on cpu" in message
    for axis in [(0, 0), (0, 3), ()]:
        message_of(ConfigurationError, all_reduce, rt, 1, axis=axis)
    assert "model_parallel" in message_of(CapabilityError, all_reduce, rt, 1, axis="data")
    barrier(rt)
    return found


def test_subgroups_are_made_by_their_members_alone(threads):
    expected = {(0, 1): 3, (0, 2): 4, (1, 2): 5, (1,): 2, (0, 1, 2): 6}
    for results in (fork(3, subgroups), threads.run(subgroups, world_size=3)):
        for rank, found in enumerate(results):
            assert all(total == expected[tuple(axis)] for axis, total in found)
            assert len(found) == [4, 5, 3][rank]


def test_a_subgroup_is_made_once_and_torch_owns_it():
    def groups(rt):
        before = len(dist.distributed_c10d._world.pg_names)
        for _ in range(3):
            all_reduce(rt, 1, axis=(0, 1)) if rt.rank < 2 else None
        barrier(rt)
        (group,) = [g for g in dist.distributed_c10d._world.pg_names if g.group_desc == "fabricfn"] or [None]
        reference = None if group is None else weakref.ref(group)
        return len(dist.distributed_c10d._world.pg_names) - before, reference is not None

    assert fork(3, groups) == [(1, True), (1, True), (0, False)]


# --- point to point ---------------------------------------------------------------------------------------------------


def pairs(rt):
    shared = torch.arange(3)
    tree = {"x": torch.full((2, 2), float(rt.rank)), "n": rt.rank, "big": torch.full((400_000,), float(rt.rank))}
    tree["y"] = [shared, shared]
    if rt.rank == 0:
        send(rt, tree, 1)
        got = recv(rt, tree, 2)
    elif rt.rank == 1:
        got = recv(rt, tree, 0)
        send(rt, tree, 2)
    else:
        got = recv(rt, tree, 1)
        send(rt, tree, 0)
    assert got["y"][0] is got["y"][1]
    assert got["big"][-1] == got["n"]
    assert tree["n"] == rt.rank
    if rt.rank < 2:
        peer = 1 - rt.rank
        both = message_of(MismatchError, send, rt, ONE, peer)
        assert "send from rank 0 to rank 1" in both
        assert "send from rank 1 to rank 0" in both
        call = functools.partial(send, rt, {"w": ONE}) if rt.rank else functools.partial(recv, rt, {"w": ONE[:2]})
        shapes = message_of(MismatchError, call, peer)
        assert "leaf w: rank 0: float32[2] on cpu; rank 1: float32[3] on cpu" in shapes
        error = ConfigurationError if rt.rank else MismatchError
        call = functools.partial(send, rt, "text") if rt.rank else functools.partial(recv, rt, ONE)
        assert "str" in message_of(error, call, peer)
    for wrong in (rt.rank, 3, -1):
        message_of(ConfigurationError, send, rt, ONE, wrong)
    return got["n"]


def test_send_and_recv(threads):
    assert fork(3, pairs) == [2, 0, 1]
    assert threads.run(pairs) == [2, 0, 1]
