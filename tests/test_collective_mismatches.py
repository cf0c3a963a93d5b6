"""Collectives that differ between ranks, or cannot be: a named error on every rank."""

import warnings

import torch

from fabricfn.collectives import (
    all_gather,
    all_gather_object,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    gather,
    reduce_scatter,
    scatter,
)
from fabricfn.errors import CapabilityError, ConfigurationError, MismatchError
from tests.support.forks import ONE, fork, message_of, runtime
from tests.support.worlds import world_of

threads = world_of("threads", 3)

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
