"""The laws of data and of collectives, to be checked on functions of the user's own."""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Unpack

import torch

from fabricfn.runtimes import Runtime
from fabricfn.testing.bench import Settings, open_bench
from fabricfn.testing.comparing import difference, require, snapshot
from fabricfn.testing.laws import TOLERANCE
from fabricfn.tree import Tree, path_name, tree_flatten, tree_leaves, tree_map, tree_paths

Load = Callable[[Runtime, int], Iterable[Tree]]
"""`load(rt, epoch) -> the rank's batches`."""


def check_data(
    load: Load,
    dataset: Sequence[Any] | None = None,
    *,
    epochs: Sequence[int] = (0, 1),
    same_order: bool = True,
    **settings: Unpack[Settings],
) -> int:
    """Data: the ranks' samples are the dataset, each exactly once; the global order is that of one process.

    The global order is: for each step, the rows of rank 0, then those of rank 1, and so on.

    Args:
        load: `load(rt, epoch)` yields the rank's batches: trees of tensors with the same number of rows.
        dataset: what the samples must be; None compares with what one process loads.
        epochs: which epochs are loaded.
        same_order: False for loaders whose order depends on the world size.
        **settings: see `Settings`; the strategy does not matter.

    Returns:
        The number of comparisons.

    Raises:
        AssertionError: says which law is broken, in which epoch and on how many ranks.

    Example:
        >>> def load(rt, epoch):
        ...     return torch.arange(12)[rt.rank :: rt.world_size].split(2)
        >>> check_data(load, range(12), same_order=False)
        8
    """
    count = 0
    settings["strategies"] = settings.get("strategies", ("functional",))
    with open_bench(settings) as bench:
        for epoch in epochs:
            oracle = _order([bench.run(_rows, bench.oracle, load, epoch)[0]])
            wanted = Counter(oracle if dataset is None else [_row(dataset[i]) for i in range(len(dataset))])
            for row in bench.rows:
                where = f"the law of data is broken on {row.world_size} ranks in epoch {epoch}"
                per_rank = bench.run(_rows, row, load, epoch)
                steps = [len(one) for one in per_rank]
                if len(set(steps)) > 1:
                    raise AssertionError(f"{where}: the ranks take different numbers of steps, {steps}.")
                found = _order(per_rank)
                if (seen := Counter(found)) != wanted:
                    twice, never = sum((seen - wanted).values()), sum((wanted - seen).values())
                    raise AssertionError(
                        f"{where}: {never} samples never come, {twice} too often, of {wanted.total()}."
                    )
                if same_order and found != oracle:
                    first = next(i for i, (a, b) in enumerate(zip(found, oracle, strict=True)) if a != b)
                    raise AssertionError(f"{where}: the global order differs from one process, first at row {first}.")
                count += 1
    return count


def _row(item: Tree) -> bytes:
    return b"|".join(torch.as_tensor(leaf).contiguous().reshape(-1).numpy().tobytes() for leaf in tree_leaves(item))


def _rows(rt: Runtime, load: Load, epoch: int) -> list[list[bytes]]:
    """For each step, the bytes of its rows."""
    steps: list[list[bytes]] = []
    for batch in load(rt, epoch):
        count = len(tree_leaves(batch)[0])
        steps.append([_row(tree_map(operator.itemgetter(i), batch)) for i in range(count)])
    return steps


def _order(per_rank: list[list[list[bytes]]]) -> list[bytes]:
    return [row for step in zip(*per_rank, strict=False) for rows in step for row in rows]


def check_collectives(
    fn: Callable[[Runtime, Tree], Tree],
    make: Callable[[int, int], Tree],
    oracle: Callable[[list[Tree]], Tree] | None = None,
    *,
    same_dtypes: bool = True,
    same_aliases: bool = True,
    tolerance: float = TOLERANCE,
    **settings: Unpack[Settings],
) -> int:
    """Collectives: they keep tree structure, dtypes and aliasing, and leave their inputs unchanged.

    Args:
        fn: `fn(rt, tree) -> tree`, for instance `ff.all_reduce`, `ff.to_device`, or a function of your own.
        make: `make(rank, world_size)`: the tree of a rank.
        oracle: the trees of all ranks -> what every rank must get; None compares no values.
        same_dtypes: whether leaves keep their dtypes (the mean of integers is float64).
        same_aliases: whether one tensor that stands at two places is one tensor in the result, too.
        tolerance: of each number, relative above 1; 0 for what moves values without arithmetic.
        **settings: see `Settings`; the strategy does not matter.

    Returns:
        The number of comparisons.

    Raises:
        AssertionError: says what is broken, on how many ranks, at which leaf.

    Example:
        >>> def make(rank, world_size):
        ...     return {"x": torch.ones(2)}
        >>> check_collectives(lambda rt, tree: tree, make, lambda trees: trees[0])
        10
    """
    count = 0
    settings["strategies"] = settings.get("strategies", ("functional",))
    with open_bench(settings) as bench:
        for row in bench.rows:
            trees = [make(rank, row.world_size) for rank in range(row.world_size)]
            expected = None if oracle is None else oracle([snapshot(tree) for tree in trees])
            results = bench.run(_collect, row, fn, make)
            for rank, (found, changed) in enumerate(results):
                where = f"{row.world_size} ranks, rank {rank}"
                problem = changed or _shape_problem(found, trees[rank], same_dtypes, same_aliases)
                if problem is not None:
                    raise AssertionError(f"the law of collectives is broken under {where}: {problem}.")
                if oracle is not None:
                    require("collectives", where, found, expected, tolerance, "the oracle")
                count += 1
    return count


def _collect(rt: Runtime, fn: Any, make: Any) -> tuple[Tree, str | None]:
    tree = make(rt.rank, rt.world_size)
    before, aliases = snapshot(tree), _aliases(tree)
    found = fn(rt, tree)
    changed = difference(tree, before)
    if changed is not None:
        return found, f"the input was changed at {changed.path}: {changed.detail}"
    return found, None if _aliases(tree) == aliases else "the input's tensors were exchanged for others"


def _shape_problem(found: Tree, given: Tree, same_dtypes: bool, same_aliases: bool) -> str | None:
    if tree_flatten(found)[1] != tree_flatten(given)[1]:
        return f"the structure changed from {tree_flatten(given)[1]} to {tree_flatten(found)[1]}"
    for path, a, b in zip(tree_paths(given), tree_leaves(found), tree_leaves(given), strict=True):
        if same_dtypes and isinstance(b, torch.Tensor) and getattr(a, "dtype", None) is not b.dtype:
            return f"{path_name(path)} was {b.dtype} and is {getattr(a, 'dtype', type(a).__name__)}"
    if same_aliases and _aliases(found) != _aliases(given):
        return "tensors that were one are not one any more, or the other way round"
    return None


def _aliases(tree: Tree) -> list[int]:
    """For each tensor of the tree the number of its first appearance."""
    tensors = [id(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensors.index(one) for one in tensors]
