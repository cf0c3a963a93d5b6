"""Collectives on trees: law 8 against a single-process oracle, and particular values."""

import math
import random
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings, strategies as st

from fabricfn import flat
from fabricfn.collectives import (
    all_gather,
    all_gather_object,
    all_reduce,
    barrier,
    broadcast,
    gather,
    recv,
    scatter,
    send,
)
from fabricfn.errors import ConfigurationError, MismatchError
from tests.support.forks import fork, message_of, runtime
from tests.support.oracle import (
    COMPLEX,
    FLOATS,
    INTEGERS,
    LAYOUTS,
    MOVED_ONLY,
    check_moves,
    check_parts,
    check_reduction,
    plans,
)
from tests.support.worlds import world_of

threads = world_of("threads", 3)


# --- any tree ---------------------------------------------------------------------------------------------------------

SETTINGS = settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SETTINGS
@given(st.integers(1, 3), plans([*FLOATS, *COMPLEX, *INTEGERS, torch.bool], (int, float, bool, complex)))
def test_mean_is_the_oracles_for_any_tree(threads, world_size, plan):
    threads.run(check_reduction, plan, "mean", world_size=world_size)


@SETTINGS
@given(
    st.integers(1, 3), st.sampled_from(["sum", "product"]), plans([*FLOATS, *COMPLEX, *INTEGERS], (int, float, bool))
)
def test_sums_and_products_are_the_oracles_for_any_tree(threads, world_size, op, plan):
    threads.run(check_reduction, plan, op, world_size=world_size)


@SETTINGS
@given(st.integers(1, 3), st.sampled_from(["max", "min"]), plans([*FLOATS, *INTEGERS, torch.bool]))
def test_extremes_are_the_oracles_for_any_tree(threads, world_size, op, plan):
    threads.run(check_reduction, plan, op, world_size=world_size)


@SETTINGS
@given(st.integers(1, 3), st.sampled_from(["any", "all"]), plans([torch.bool], (bool,)))
def test_votes_are_the_oracles_for_any_tree(threads, world_size, op, plan):
    threads.run(check_reduction, plan, op, world_size=world_size)


@SETTINGS
@given(st.integers(1, 3), plans([*FLOATS, *COMPLEX, *INTEGERS, torch.bool, *MOVED_ONLY], (int, float, bool, complex)))
def test_moves_are_the_oracles_for_any_tree(threads, world_size, plan):
    threads.run(check_moves, plan, world_size=world_size)


@SETTINGS
@given(st.data(), st.integers(1, 3))
def test_parts_are_the_oracles_for_any_tree(threads, data, world_size):
    plan = data.draw(plans([*FLOATS, *INTEGERS], (), first=world_size))
    threads.run(check_parts, plan, world_size=world_size)


def random_plan(draw, dtypes, numbers, first=None, depth=2):
    """A plan without hypothesis, so that forked ranks draw the same ones."""
    kind = draw.choice(["list", "tuple", "dict"] if depth == 2 else ["tensor", "tensor", "list", "dict", "number"])
    if kind == "number" and numbers:
        return ("number", draw.choice(numbers))
    if kind in ("tensor", "number") or depth == 0:
        shape = [draw.randint(0, 3) for _ in range(draw.randint(0, 3))]
        shape = shape if first is None else [first, *shape[:2]]
        return ("tensor", draw.choice(dtypes), tuple(shape), draw.choice(LAYOUTS), draw.choice([0, 0, 1]))
    parts = [random_plan(draw, dtypes, numbers, first, depth - 1) for _ in range(draw.randint(0, 4))]
    return (kind, [(f"k{i}", part) for i, part in enumerate(parts)] if kind == "dict" else parts)


def all_laws(rt):
    draw = random.Random(5)
    dtypes = [*FLOATS, *COMPLEX, *INTEGERS]
    for _ in range(25):
        for op in ("mean", "sum", "product"):
            check_reduction(rt, random_plan(draw, dtypes, (int, float, bool)), op)
        for op in ("max", "min"):
            check_reduction(rt, random_plan(draw, [*FLOATS, *INTEGERS, torch.bool], (int, float, bool)), op)
        check_reduction(rt, random_plan(draw, [torch.bool], (bool,)), draw.choice(["any", "all"]))
        check_moves(rt, random_plan(draw, [*dtypes, torch.bool, *MOVED_ONLY], (int, float, bool)))
        check_parts(rt, random_plan(draw, [*FLOATS, *INTEGERS], (), first=rt.world_size))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_laws_hold_over_gloo(world_size):
    fork(world_size, all_laws)


# --- particular values ------------------------------------------------------------------------------------------------


def particular_values(rt):
    rank, size = rt.rank, rt.world_size
    total = sum(range(size))
    assert all_reduce(rt, {"f": float(rank), "i": rank, "b": rank == 0}) == {
        "f": total / size,
        "i": total / size,
        "b": 1 / size,
    }
    sums = all_reduce(rt, (rank, float(rank), True), "sum")
    assert (sums, [type(leaf) for leaf in sums]) == ((total, float(total), size), [int, float, int])
    assert all_reduce(rt, torch.tensor([rank, 3 * rank])).tolist() == [total / size, 3 * total / size]
    # a NaN or an infinity anywhere is seen everywhere, whoever holds it
    for holder in range(size):
        value = torch.tensor([float("nan") if rank == holder else 1.0, 2.0])
        for op in ("mean", "sum", "max", "min", "product"):
            assert all_reduce(rt, value, op)[0].isnan()
        half = torch.full((3,), 60000.0, dtype=torch.float16)
        assert all_reduce(rt, half).tolist() == pytest.approx([60000.0] * 3, rel=1e-3)
    # above the size at which tensors travel alone, and above that at which buffers are closed
    large = torch.arange(600_001, dtype=torch.float32) % 1000 + rank
    small = [torch.full((100_000,), float(rank + place)) for place in range(100)]
    for op, value in (("mean", total / size), ("sum", None), ("max", size - 1)):
        result, parts = all_reduce(rt, (large, small), op)
        base = torch.arange(600_001, dtype=torch.float32) % 1000
        assert result.equal(base * size + total if op == "sum" else base + value)
        assert [part[7].item() for part in parts] == [
            place * size + total if op == "sum" else place + value for place in range(100)
        ]
    assert all_gather(rt, {"x": large})["x"].equal(torch.stack([large - rank + other for other in range(size)]))
    assert broadcast(rt, [large, 1], size - 1)[0].equal(large - rank + size - 1)
    # first dimensions that differ, nothing at all among them; large and small
    mine = {"x": torch.full((rank * 2, 3), float(rank)), "y": torch.tensor(rank), "z": torch.ones(rank * 300_000)}
    rows = all_gather(rt, mine, uneven=True)
    assert rows["x"].equal(torch.cat([torch.full((other * 2, 3), float(other)) for other in range(size)]))
    assert rows["y"].tolist() == list(range(size))
    assert rows["z"].shape == (total * 300_000,)
    assert all_gather(rt, rank).tolist() == list(range(size))
    return all_gather_object(rt, {"rank": rank, "text": "x" * 1000 * rank})


def test_particular_values(threads):
    expected = [{"rank": rank, "text": "x" * 1000 * rank} for rank in range(2)]
    assert fork(2, particular_values) == [expected] * 2
    assert threads.run(particular_values, world_size=2) == [expected] * 2
    assert particular_values(runtime()) == expected[:1]


def same_bits(rt):
    generator = torch.Generator().manual_seed(rt.rank)
    tree = [torch.randn(n, generator=generator).to(dtype) for n in (5, 70_000, 600_000) for dtype in FLOATS]
    return [
        [leaf.view(torch.uint8).numpy().tobytes() for leaf in all_reduce(rt, tree, op)]
        for op in ("mean", "sum", "product", "max")
    ]


def test_all_ranks_get_the_same_bits():
    first, second, third = fork(3, same_bits)
    assert first == second == third


# --- any data ---------------------------------------------------------------------------------------------------------

BROKEN_RANKS: set[int] = set()


def read():
    if dist.get_rank() in BROKEN_RANKS:
        raise OSError("no such device here")


class Unreadable:
    """Can be pickled, but not read on `BROKEN_RANKS`."""

    def __reduce__(self):
        return read, ()


def any_data(rt):
    shared = torch.ones(2)
    tree = {"path": "runs/7", "w": [shared, shared], "n": None, "big": 2**80, "set": {1, 2}, "fn": math.sqrt, "e": []}
    placeholder = tree if rt.rank == 1 else [None, {"other": torch.zeros(3)}, "structure"][rt.rank]
    got = broadcast(rt, placeholder, 1)
    assert got["w"][0] is got["w"][1]
    assert got["w"][0] is not shared
    assert got["set"] is not tree["set"]
    got["w"], tree["w"] = got["w"][0].tolist(), [1.0, 1.0]
    assert got == tree
    # aliases that only some ranks have: every leaf gets its own value
    one = torch.full((2,), float(rt.rank))
    pair = (one, one) if rt.rank == 0 else (one, torch.full((2,), 10.0))
    first, second = all_reduce(rt, pair, "sum")
    assert (first.tolist(), second.tolist()) == ([3.0] * 2, [20.0] * 2)
    assert broadcast(rt, pair, 2)[1].tolist() == [10.0] * 2
    # what cannot be pickled or read is an error everywhere, and the next call works
    refused = ConfigurationError if rt.rank == 0 else MismatchError
    assert "pickle" in message_of(refused, broadcast, rt, threading.Lock())
    BROKEN_RANKS.add(2)
    error = ConfigurationError if rt.rank == 2 else MismatchError
    assert "no such device here" in message_of(error, broadcast, rt, Unreadable() if rt.rank == 0 else None)
    refused = ConfigurationError if rt.rank == 1 else MismatchError
    assert "pickle" in message_of(refused, all_gather_object, rt, threading.Lock() if rt.rank == 1 else 0)
    return all_reduce(rt, rt.rank, "sum")


def test_broadcast_takes_any_data():
    assert fork(3, any_data) == [3, 3, 3]


def test_one_process_behaves_as_many_do():
    rt = runtime()
    x = torch.ones(2)
    assert all_reduce(rt, x) is not x
    assert broadcast(rt, x) is not x
    assert all_reduce(rt, [2, True]) == [2.0, 1.0]
    assert all_gather(rt, {"x": x})["x"].shape == (1, 2)
    assert gather(rt, 3).tolist() == [3]
    assert scatter(rt, torch.tensor([[1, 2]])).tolist() == [1, 2]
    assert all_gather_object(rt, "x") == ["x"]
    assert barrier(rt, "here") is None
    message_of(ConfigurationError, broadcast, rt, threading.Lock())
    message_of(ConfigurationError, broadcast, rt, x, 1)
    message_of(ConfigurationError, gather, rt, x, 1)
    message_of(ConfigurationError, all_reduce, rt, "text")
    message_of(ConfigurationError, scatter, rt, torch.ones(2))
    message_of(ConfigurationError, send, rt, x, 0)
    message_of(ConfigurationError, recv, rt, x, 1)


# --- the flat functions themselves ------------------------------------------------------------------------------------


def flat_functions(rt):
    group = rt.world.group
    tensors = [torch.full((2, 3), float(rt.rank)), torch.tensor(rt.rank), torch.empty(0)]
    means = flat.all_reduce_mean(tensors, group)
    assert [mean.dtype for mean in means] == [torch.float32, torch.float64, torch.float32]
    assert [mean.flatten().tolist() for mean in means] == [[0.5] * 6, [0.5], []]
    assert [t.flatten().tolist() for t in flat.broadcast(tensors, 1, group)] == [[1.0] * 6, [1], []]
    assert tensors[0][0, 0] == rt.rank
    wide = torch.full((600, 500), float(rt.rank))
    taken = [*tensors, wide, torch.full_like(wide, rt.rank + 2).t(), torch.full((600, 1000), rt.rank)[:, ::2]]
    flat.spread(taken, 1, group)
    assert [t.unique().tolist() for t in taken] == [[1], [1], [], [1], [3], [1]]
    assert tensors[0][0, 0] == 1 and wide[0, 0] == 1
    assert flat.all_reduce_mean([], group) == []
    # a change in place of one result is none of the others
    first, _, _ = means
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    product = weight * means[1]
    first.add_(1)
    product.sum().backward()
    assert weight.grad.item() == 0.5


def test_flat_functions():
    fork(2, flat_functions)
    assert flat.all_reduce_mean([torch.tensor(3)], None)[0].item() == 3.0
