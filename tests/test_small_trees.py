"""Small trees ride along with the words that the ranks compare; what comes back is what a message of its own brings."""

import functools
from unittest import mock

import pytest
import torch
from hypothesis import given, strategies as st

import fabricfn as ff
from fabricfn.collectives import agreement
from fabricfn.flat import reducing
from tests.support.worlds import few, world_of

three = world_of("threads", 3)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex128, torch.int64, torch.int8, torch.uint8]
LEAVES = st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=2)), max_size=18)


def tree_of(leaves, rank):
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randint(-9, 9, shape, generator=generator).abs().to(dtype) for dtype, shape in leaves]
    return {"tensors": tensors, "number": rank + 0.5}


def results(leaves, rt):
    """Sums, means, largest and all values of a tree, small numbers without rounding."""
    tree = tree_of(leaves, rt.rank)
    real = {"tensors": [leaf for leaf in tree["tensors"] if not leaf.is_complex()]}
    return [
        *(ff.all_reduce(rt, tree, op) for op in ("sum", "mean")),
        ff.all_reduce(rt, real, "max"),
        ff.all_gather(rt, tree),
    ]


@few(60)
@given(LEAVES)
def test_what_rides_along_is_what_travels_by_itself(three, leaves):
    fn = functools.partial(results, leaves)
    along = three.run(fn)
    with mock.patch.object(agreement, "CROWD", 0):
        alone = three.run(fn)
    for one, other in zip(along, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if torch.bfloat16 in dict(leaves) else 1e-12, atol=0)
    torch.testing.assert_close(along[0][:3], along[2][:3], rtol=0, atol=0)


def reduce(size, aliased, rt):
    leaf = torch.ones(size)
    return ff.all_reduce(rt, [leaf, leaf if aliased == rt.rank else leaf.clone()], "sum")


@pytest.mark.parametrize("aliased", [None, 1])
def test_a_small_tree_needs_no_message_of_its_own_and_a_large_one_does(three, aliased):
    def refuse(*_):
        raise AssertionError("a message of its own")

    with mock.patch.object(reducing, "sum_in_place", refuse):
        for found in three.run(functools.partial(reduce, 59, aliased)):
            assert [leaf.tolist() for leaf in found] == [[3.0] * 59] * 2 and found[0] is not found[1]
        with pytest.raises(AssertionError, match="a message of its own"):
            three.run(functools.partial(reduce, 61, aliased))
