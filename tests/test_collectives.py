"""Collectives on trees: law 8 against a single-process oracle, and a named error on every rank for what differs."""

import functools
import math
import os
import pickle
import random
import tempfile
import threading
import traceback
import warnings
import weakref
from datetime import timedelta

import optree
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import functional as F

from fabricfn import flat
from fabricfn.collectives import (
    all_gather,
    all_gather_object,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    gather,
    recv,
    reduce_scatter,
    scatter,
    send,
)
from fabricfn.errors import CapabilityError, ConfigurationError, MismatchError
from fabricfn.precision import Precision
from fabricfn.runtimes import Runtime
from fabricfn.strategies import resolve
from fabricfn.world import World
from tests.worlds import world_of

# --- worlds ---------------------------------------------------------------------------------------------------------


def runtime(rank=0, world_size=1, group=None):
    world = World(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size, group=group)
    return Runtime(world=world, precision=Precision(), strategy=resolve("auto", world_size))


def child(rank, world_size, folder, fn, args):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=20)
    )
    try:
        outcome = (True, fn(runtime(rank, world_size, dist.group.WORLD), *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(outcome, file)
    if outcome[0]:
        dist.barrier()
    dist.destroy_process_group()


def fork(world_size, fn, *args):
    """`fn(rt, *args)` on forked gloo ranks: each rank's result."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=child, args=(rank, world_size, folder, fn, args)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        outcomes = []
        for rank in range(world_size):
            assert os.path.exists(f"{folder}/{rank}"), f"rank {rank} died: {ranks[rank].exitcode}"
            with open(f"{folder}/{rank}", "rb") as file:
                outcomes.append(pickle.load(file))
    failures = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(outcomes) if not fine]
    assert not failures, "\n".join(failures)
    return [result for _, result in outcomes]


threads = world_of("threads", 3)


def message_of(error_type, fn, *args, **kwargs):
    try:
        fn(*args, **kwargs)
    except error_type as error:
        return str(error)
    raise AssertionError(f"no {error_type.__name__}")


# --- trees, as plain data that each rank fills with values of its own -------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
MOVED_ONLY = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn]
LAYOUTS = ["plain", "transposed", "strided", "expanded", "conjugate", "grad"]


def tensor_of(dtype, shape, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, shape, generator=generator).abs_()
    if layout == "transposed":
        tensor = values.mT.contiguous().to(dtype).mT if len(shape) > 1 else values.to(dtype)
    elif layout == "strided":
        tensor = torch.stack([values, values], -1).to(dtype)[..., 0]
    elif layout == "expanded":
        tensor = values[:1].to(dtype).expand(shape) if shape and shape[0] else values.to(dtype)
    elif layout == "conjugate" and dtype in COMPLEX:
        tensor = torch.complex(values.double(), values.double() - 1).to(dtype).conj()
    else:
        tensor = values.to(dtype)
    return (
        tensor.requires_grad_() if layout == "grad" and (tensor.is_floating_point() or tensor.is_complex()) else tensor
    )


def build(plan, seed, made=None):
    """The tree of a plan; equal plans give trees of equal structure, shapes, dtypes and aliases."""
    made = {} if made is None else made
    kind, *rest = plan
    if kind == "tensor":
        dtype, shape, layout, alias = rest
        key = (alias, dtype, shape, layout) if alias else len(made)
        if key not in made:
            made[key] = tensor_of(dtype, shape, layout, 1000 * seed + len(made))
        return made[key]
    if kind == "number":
        made[len(made)] = None
        return rest[0]((seed + len(made)) % 3)
    if kind == "none":
        return None
    if kind == "dict":
        return {key: build(part, seed, made) for key, part in rest[0]}
    return {"list": list, "tuple": tuple}[kind](build(part, seed, made) for part in rest[0])


def plans(dtypes, numbers=(int, float, bool), first=None):
    dims = st.integers(0, 3)
    shapes = (
        st.lists(dims, max_size=3) if first is None else st.lists(dims, max_size=2).map(lambda dims: [first, *dims])
    )
    tensors = st.tuples(
        *(st.just("tensor"), st.sampled_from(dtypes), shapes.map(tuple)),
        *(st.sampled_from(LAYOUTS), st.sampled_from([0, 0, 1, 2])),
    )
    leaves = st.one_of(tensors, tensors, tensors, st.just(("none",)))
    if numbers:
        leaves = st.one_of(leaves, st.tuples(st.just("number"), st.sampled_from(numbers)))
    names = st.sampled_from(["a", "b", "w.0", "0", 7])
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(st.just("list"), st.lists(inner, max_size=4)),
            st.tuples(st.just("tuple"), st.lists(inner, max_size=4)),
            st.tuples(
                st.just("dict"), st.lists(st.tuples(names, inner), max_size=4, unique_by=lambda pair: str(pair[0]))
            ),
        ),
        max_leaves=8,
    )


# --- the oracle: all ranks' trees in one process ----------------------------------------------------------------------

REDUCE = {
    "sum": lambda rows: rows.sum(0, dtype=rows.dtype),
    "product": lambda rows: rows.prod(0, dtype=rows.dtype),
    "max": lambda rows: rows.amax(0),
    "min": lambda rows: rows.amin(0),
    "any": lambda rows: rows.any(0),
    "all": lambda rows: rows.all(0),
}
CAST = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def as_tensor(leaf):
    return leaf.detach() if isinstance(leaf, torch.Tensor) else torch.tensor(leaf, dtype=CAST[type(leaf)])


def reduced(leaves, op):
    rows = torch.stack([as_tensor(leaf) for leaf in leaves])
    if isinstance(leaves[0], bool) and op in ("sum", "product"):
        rows = rows.long()
    if op == "mean":
        exact = rows if rows.is_floating_point() or rows.is_complex() else rows.double()
        result = (exact.double() if exact.is_floating_point() else exact).mean(0).to(exact.dtype)
    else:
        result = REDUCE[op](rows)
    return result if isinstance(leaves[0], torch.Tensor) else result.item()


def raw(tensor):
    """The values as bytes."""
    return tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def same(result, expected):
    assert optree.tree_structure(result) == optree.tree_structure(expected)
    for got, want in zip(optree.tree_leaves(result), optree.tree_leaves(expected), strict=True):
        assert type(got) is type(want)
        if isinstance(want, torch.Tensor):
            assert (got.dtype, got.shape, got.requires_grad) == (want.dtype, want.shape, False)
            assert got.is_contiguous()
            if got.dtype.itemsize < 2 or got.dtype in MOVED_ONLY:
                assert raw(got).equal(raw(want))
            else:
                torch.testing.assert_close(got, want, rtol=1e-2 if got.dtype.itemsize == 2 else 1e-6, atol=0)
        else:
            assert abs(got - want) <= 1e-12 * abs(want)


def aliases(tree):
    leaves = optree.tree_leaves(tree)
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    return [(i, j) for i, first in tensors for j, second in tensors if i < j and first is second]


def memory(tree):
    tensors = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.numel()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def frozen(tree):
    return [
        (leaf.detach().resolve_conj().clone(), leaf._version) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in optree.tree_leaves(tree)
    ]


def untouched(tree, before):
    for leaf, old in zip(optree.tree_leaves(tree), before, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert raw(leaf).equal(raw(old[0]))
            assert leaf._version == old[1]


def check_collective(rt, call, tree, expected):
    """`call(rt, tree)` gives `expected`, with the structure and aliases of the tree and memory of its own."""
    before = frozen(tree)
    result = call(rt, tree)
    untouched(tree, before)
    if expected is None:
        assert result is None
        return
    same(result, expected)
    assert aliases(result) == aliases(tree)
    assert not memory(result) & memory(tree)
    tensors = {id(leaf): leaf for leaf in optree.tree_leaves(result) if isinstance(leaf, torch.Tensor)}
    assert len(memory(result)) == sum(tensor.numel() > 0 for tensor in tensors.values()), "shared memory"


def check_reduction(rt, plan, op):
    trees = [build(plan, rank) for rank in range(rt.world_size)]
    expected = optree.tree_map(lambda *leaves: reduced(leaves, op), *trees)
    check_collective(rt, lambda rt, tree: all_reduce(rt, tree, op), trees[rt.rank], expected)


def check_moves(rt, plan):
    trees = [build(plan, rank) for rank in range(rt.world_size)]
    mine, last = trees[rt.rank], rt.world_size - 1
    stacked = optree.tree_map(lambda *leaves: stack([as_tensor(leaf) for leaf in leaves]), *trees)
    rows = optree.tree_map(lambda *leaves: stack([as_tensor(leaf) for leaf in leaves], uneven=True), *trees)
    check_collective(rt, all_gather, mine, stacked)
    check_collective(rt, lambda rt, tree: all_gather(rt, tree, uneven=True), mine, rows)
    check_collective(rt, lambda rt, tree: gather(rt, tree, last), mine, stacked if rt.rank == last else None)
    plain = optree.tree_map(lambda leaf: as_tensor(leaf).resolve_conj().contiguous(), trees[last])
    plain = optree.tree_map(lambda new, old: new if isinstance(old, torch.Tensor) else old, plain, trees[last])
    check_collective(rt, lambda rt, tree: broadcast(rt, tree, last), mine, plain)


def stack(tensors, uneven=False):
    """torch.stack or torch.cat, for dtypes that they do not know."""
    tensors = [tensor.resolve_conj() for tensor in tensors]
    tensors = [tensor if tensor.dim() or not uneven else tensor[None] for tensor in tensors]
    size, shape, dtype = len(tensors), tuple(tensors[0].shape), tensors[0].dtype
    data = torch.cat([raw(tensor) for tensor in tensors])
    return data.view(dtype).view((size * shape[0], *shape[1:]) if uneven else (size, *shape))


def check_parts(rt, plan):
    trees = [build(plan, rank) for rank in range(rt.world_size)]
    mine, size, rank = trees[rt.rank], rt.world_size, rt.rank
    total = optree.tree_map(lambda *leaves: reduced(leaves, "max").chunk(size)[rank].contiguous(), *trees)
    check_collective(rt, lambda rt, tree: reduce_scatter(rt, tree, "max"), mine, total)
    mean = optree.tree_map(lambda *leaves: reduced(leaves, "mean").chunk(size)[rank].contiguous(), *trees)
    check_collective(rt, reduce_scatter, mine, mean)
    swapped = optree.tree_map(lambda *leaves: torch.cat([leaf.detach().chunk(size)[rank] for leaf in leaves]), *trees)
    check_collective(rt, all_to_all, mine, swapped)
    rows = optree.tree_map(lambda leaf: leaf.detach().view(size, -1)[rank].contiguous(), flattened(trees[0]))
    same(scatter(rt, flattened(trees[0]) if rank == 0 else None, 0), rows)


def flattened(tree):
    return optree.tree_map(lambda leaf: leaf.detach().reshape(leaf.shape[0], leaf[:1].numel()), tree)


SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


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


# --- what differs between ranks ---------------------------------------------------------------------------------------

ONE = torch.ones(3)

MISMATCHES = {
    "size": (
        lambda rt: all_reduce(rt, {"w": torch.ones(3 + rt.rank)}),
        ["leaf w", "rank 0: float32[3]", "rank 1: float32[4]"],
    ),
    "shape of one size": (
        lambda rt: all_reduce(rt, torch.ones((6,) if rt.rank else (2, 3))),
        ["float32[2, 3]", "float32[6]"],
    ),
    "dtype": (lambda rt: all_reduce(rt, [torch.ones(3).to([torch.float32, torch.int32][rt.rank])]), ["int32[3]"]),
    "op": (
        lambda rt: all_reduce(rt, ONE, ["sum", "max"][rt.rank]),
        ["rank 0: all_reduce(op='sum')", "rank 1: all_reduce(op='max')"],
    ),
    "order": (
        lambda rt: (all_reduce(rt, ONE if rt.rank else ONE[:2]), all_reduce(rt, ONE[:2] if rt.rank else ONE)),
        ["float32[2]"],
    ),
    "kind": (lambda rt: all_gather(rt, ONE) if rt.rank else all_reduce(rt, ONE), ["all_gather()", "all_reduce("]),
    "keys": (lambda rt: all_reduce(rt, {"ab"[rt.rank]: ONE}), ["leaf a", "leaf b", "no such leaf"]),
    "containers": (lambda rt: all_reduce(rt, [[[ONE]], [(ONE,)]][rt.rank]), ["list(list(*))", "list(tuple(*))"]),
    "None": (lambda rt: all_reduce(rt, {"x": ONE, "y": [None, ()][rt.rank]}), ["NoneType", "tuple"]),
    "number": (lambda rt: all_reduce(rt, [1, 1.0][rt.rank]), ["a Python int", "a Python float"]),
    "number of leaves": (lambda rt: all_gather(rt, [ONE] * (50 + rt.rank)), ["leaf 50", "no such leaf"]),
    "trailing dims": (lambda rt: all_gather(rt, torch.ones(rt.rank, 2 + rt.rank), uneven=True), ["[*, 2]", "[*, 3]"]),
    "src": (lambda rt: broadcast(rt, ONE, rt.rank), ["broadcast(src=0)", "broadcast(src=1)"]),
    "dst": (lambda rt: gather(rt, ONE, rt.rank), ["gather(dst=0)", "gather(dst=1)"]),
    "barriers": (lambda rt: barrier(rt, ["data", "model"][rt.rank]), ["barrier('data')", "barrier('model')"]),
    "barrier and reduction": (lambda rt: barrier(rt) if rt.rank else all_reduce(rt, ONE), ["barrier()", "all_reduce("]),
    "objects": (
        lambda rt: all_gather_object(rt, 1) if rt.rank else all_to_all(rt, torch.ones(2)),
        ["all_gather_object"],
    ),
    "scatter": (lambda rt: scatter(rt, ONE[:2]) if rt.rank else reduce_scatter(rt, ONE[:2]), ["scatter(src=0)"]),
    "graph": (
        lambda rt: all_gather(rt, ONE.clone().requires_grad_(rt.rank == 0), differentiable=True),
        ["requires_grad"],
    ),
}

IMPOSSIBLE = {
    "object": (lambda rt: all_reduce(rt, {"w": "text" if rt.rank else ONE}), ["leaf w", "str"]),
    "op": (lambda rt: all_reduce(rt, ONE, "median" if rt.rank else "mean"), ["median", "product"]),
    "sparse": (lambda rt: all_reduce(rt, ONE.to_sparse() if rt.rank else ONE), ["sparse", "to_dense"]),
    "meta": (lambda rt: all_gather(rt, ONE.to("meta") if rt.rank else ONE), ["meta"]),
    "indivisible": (lambda rt: all_to_all(rt, torch.ones(2 + rt.rank)), ["multiple of 2", "[3]"]),
    "too large": (lambda rt: all_reduce(rt, 2**80 if rt.rank else 1), ["64 bits"]),
    "vote": (lambda rt: all_reduce(rt, ONE if rt.rank else ONE > 0, "any"), ["tensor != 0"]),
    "source": (lambda rt: scatter(rt, ONE, src=1), ["first dimension", "2"]),
    "graph": (lambda rt: all_reduce(rt, ONE, "max" if rt.rank else "sum", differentiable=True), ["keep the graph"]),
}


def check_mismatches(rt):
    for name, (call, words) in MISMATCHES.items():
        message = message_of(MismatchError, call, rt)
        assert all(word in message for word in words), (name, message)
        assert f"seen on rank {rt.rank}" in message
        assert all_reduce(rt, 1, "sum") == 2, f"the group is broken after {name}"
    for name, (call, words) in IMPOSSIBLE.items():
        error = (ConfigurationError, CapabilityError) if rt.rank else MismatchError
        message = message_of(error, call, rt)
        # where the calls differ, that is what the peers hear of
        assert rt.rank == 0 or all(word in message for word in words), (name, message)
        assert rt.rank == 1 or "rank 1" in message, (name, message)
        assert all_reduce(rt, 1, "sum") == 2, f"the group is broken after {name}"


def test_whatever_differs_is_an_error_on_every_rank(threads):
    fork(2, check_mismatches)
    threads.run(check_mismatches, world_size=2)


def odd_one_out(rt):
    return message_of(MismatchError, all_reduce, rt, {"a": ONE, "b": torch.ones(2 + (rt.rank == 1))})


def test_the_message_names_ranks_and_leaves():
    for rank, message in enumerate(fork(3, odd_one_out)):
        assert f"seen on rank {rank}" in message
        assert "leaf b: ranks 0, 2: float32[2] on cpu; rank 1: float32[3] on cpu" in message
        assert "leaf a" not in message


def test_dtypes_without_the_operation_are_refused_by_name():
    rt = runtime()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates making them
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    cases = {
        "uint16": (torch.ones(2, dtype=torch.uint16), "sum"),
        "float8_e4m3fn": (torch.ones(2).to(torch.float8_e4m3fn), "mean"),
        "bool tensor": (torch.ones(2) > 0, "sum"),
        "complex64": (torch.ones(2, dtype=torch.complex64), "max"),
        "quantized": (quantized, "sum"),
        "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "sum"),
    }
    for word, (tensor, op) in cases.items():
        message = message_of(ConfigurationError, all_reduce, rt, {"metrics": [tensor]}, op)
        assert word in message
        assert "metrics/0" in message


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


# --- gradients --------------------------------------------------------------------------------------------------------


def embeddings(rank, rows=4):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rows, 5, dtype=torch.float64, generator=generator)


def contrastive(rank, anchors, everyone):
    """The loss of one rank: its rows against all rows."""
    start = anchors.shape[0] * rank
    target = torch.arange(start, start + anchors.shape[0])
    return F.cross_entropy(F.normalize(anchors) @ F.normalize(everyone).T / 0.1, target)


def gathered_gradient(rt):
    mine = embeddings(rt.rank).requires_grad_()
    frozen = torch.ones(2)
    everyone, constant = all_gather(rt, (mine, frozen), differentiable=True)
    assert not constant.requires_grad
    (grad,) = torch.autograd.grad(contrastive(rt.rank, mine, everyone.flatten(0, 1)), mine)
    # second order: the norm of a gradient that went through the collective
    loss = contrastive(rt.rank, mine, all_gather(rt, mine, differentiable=True).flatten(0, 1))
    (first,) = torch.autograd.grad(loss, mine, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), mine)
    with torch.no_grad():
        assert not all_gather(rt, mine, differentiable=True).requires_grad
    assert not all_gather(rt, mine).requires_grad
    return grad, second


def oracle_gradients(world_size):
    parts = [embeddings(rank).requires_grad_() for rank in range(world_size)]
    everyone = torch.cat(parts)
    loss = sum(contrastive(rank, part, everyone) for rank, part in enumerate(parts))
    first = torch.autograd.grad(loss, parts, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), parts)
    return [(grad.detach(), again) for grad, again in zip(first, second, strict=True)]


def test_a_contrastive_loss_has_the_gradients_of_one_process(threads):
    for world_size in (1, 2, 3):
        expected = oracle_gradients(world_size)
        torch.testing.assert_close(
            threads.run(gathered_gradient, world_size=world_size), expected, rtol=1e-10, atol=1e-12
        )
    torch.testing.assert_close(fork(2, gathered_gradient), oracle_gradients(2), rtol=1e-10, atol=1e-12)


def uneven_and_reduced_gradients(rt):
    mine = embeddings(rt.rank, rows=rt.rank + 1).requires_grad_()
    rows = all_gather(rt, mine, uneven=True, differentiable=True)
    (grad,) = torch.autograd.grad(((rt.rank + 1) * rows.pow(3)).sum(), mine)
    x = embeddings(rt.rank).requires_grad_()
    mean = all_reduce(rt, {"x": x}, differentiable=True)["x"]
    total = all_reduce(rt, x, "sum", differentiable=True)
    (other,) = torch.autograd.grad((rt.rank + 1) * (mean.pow(3) + total.pow(2)).sum(), x)
    return grad, other


def test_uneven_gathers_and_reductions_have_the_gradients_of_one_process(threads):
    for world_size in (1, 3):
        weight = sum(rank + 1 for rank in range(world_size))
        xs = [embeddings(rank).requires_grad_() for rank in range(world_size)]
        stacked = torch.stack(xs)
        loss = weight * (stacked.mean(0).pow(3) + stacked.sum(0).pow(2)).sum()
        expected = [
            (weight * 3 * embeddings(rank, rank + 1).square(), grad)
            for rank, grad in enumerate(torch.autograd.grad(loss, xs))
        ]
        results = threads.run(uneven_and_reduced_gradients, world_size=world_size)
        torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-12)


def backward_on_one_rank(rt):
    x = torch.ones(2, requires_grad=True)
    total = all_reduce(rt, x, "sum", differentiable=True)
    if rt.rank == 0:
        return message_of(MismatchError, total.sum().backward)
    return message_of(MismatchError, barrier, rt)


def test_a_backward_pass_that_a_peer_does_not_run_is_named():
    for message in fork(2, backward_on_one_rank):
        assert "rank 0: the backward pass of all_reduce" in message
        assert "rank 1: barrier()" in message


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
