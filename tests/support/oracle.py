"""Collectives on trees, done in one process: trees as plain data, and what every collective must give."""

import optree
import torch
from hypothesis import strategies as st

from fabricfn.collectives import all_gather, all_reduce, all_to_all, broadcast, gather, reduce_scatter, scatter

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
