"""The laws of training, to be checked on any training function.

[Note: training functions] What is checked is a function `train(rt) -> tree`: it trains on the rank's own part of the
data and returns the values that are equal on all ranks (gathered parameters, global metrics). It must be a function of
`rt` alone: modules and data are built outside, or from explicit generators. It takes options as keywords, as far as it
has them; each one makes laws checkable:

* `accumulation`: into how many micro-batches the rank's part of a batch is cut
* `donate`: passed on to `optimizer_step`
* `folder` and `stop`: go on from the checkpoint in `folder` when there is one; end after `stop` steps and save there

`training_loop` makes such a function of a module, a loss, data and an optimizer.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch

from fabricfn.checkpoint import load, save
from fabricfn.runtimes import Runtime
from fabricfn.sharding import local_of
from fabricfn.testing.bench import Settings, open_bench, require_options
from fabricfn.testing.comparing import Difference, difference, require, snapshot
from fabricfn.testing.loops import Train
from fabricfn.tree import Tree, tree_map

TOLERANCE = 1e-11
"""What float64 arithmetic in another order may change; a wrong average changes more than 1e-3."""


def check_purity(
    fn: Train, make: Callable[[Runtime], tuple[Any, ...]] | None = None, **settings: Unpack[Settings]
) -> int:
    """Purity: the same inputs give the same bits, and are unchanged afterwards.

    Args:
        fn: a training function, or with `make` any function `fn(rt, *args) -> tree`, for instance one step.
        make: `make(rt) -> args`; called once on each rank, then `fn` twice with them.
        **settings: see `Settings`.

    Returns:
        The number of comparisons.

    Raises:
        AssertionError: says what differs, and under which strategy and world size.

    Example:
        >>> check_purity(lambda rt: {"rank": rt.rank}, world_sizes=(1, 2), strategies=("functional",))
        6
    """
    count = 0
    with open_bench(settings) as bench:
        for row in bench.rows:
            for rank, (first, second, changed) in enumerate(bench.run(_twice, row, fn, make)):
                where = f"{row.text}, rank {rank}"
                require("purity", where, second, first, 0.0, "the first call with the same inputs")
                if changed is not None:
                    raise AssertionError(
                        f"the law of purity is broken under {where}: the function changed its input at {changed.path}"
                        f" by up to {changed.largest:.3g} ({changed.detail}); inputs must stay as they are."
                    )
                count += 2
    return count


def _twice(rt: Runtime, fn: Train, make: Any) -> tuple[Tree, Tree, Difference | None]:
    args = () if make is None else make(rt)
    before = snapshot(args)
    first = snapshot(fn(rt, *args))
    second = snapshot(fn(rt, *args))
    return first, second, difference(snapshot(args), before)


def check_equivalence(
    train: Train, *, accumulation: Sequence[int] = (1, 2, 4), tolerance: float = TOLERANCE, **settings: Unpack[Settings]
) -> int:
    """Equivalence: every strategy, world size and accumulation gives the result of one process on the whole batch.

    Args:
        train: see [Note: training functions]. Batch normalisation in training mode and dropout do not obey this law.
        accumulation: numbers of micro-batches, if `train` takes them; otherwise 1 alone.
        tolerance: of each number, relative above 1; for float64 and SGD.
        **settings: see `Settings`.

    Returns:
        The number of comparisons.

    Raises:
        AssertionError: says which leaf differs by how much, under which strategy, world size and accumulation.
    """
    count = 0
    counts = accumulation if "accumulation" in require_options("equivalence", train) else (1,)
    with open_bench(settings) as bench:
        oracle = bench.run(train, bench.oracle)[0]
        for row, number in itertools.product(bench.rows, counts):
            options = {} if number == 1 else {"accumulation": number}
            for rank, found in enumerate(bench.run(train, row, **options)):
                where = f"{row.text}, rank {rank}, accumulation {number}"
                require("equivalence", where, found, oracle, tolerance, "single on the whole batch")
                count += 1
    return count


def check_accumulation(
    train: Train, *, accumulation: Sequence[int] = (2, 3, 4), tolerance: float = TOLERANCE, **settings: Unpack[Settings]
) -> int:
    """Accumulation: k micro-batches, of uneven sizes too, give the result of one batch.

    Args:
        train: must take `accumulation`.
        accumulation: numbers of micro-batches.
        tolerance: of each number, relative above 1.
        **settings: see `Settings`.

    Returns:
        The number of comparisons.

    Raises:
        AssertionError: as for `check_equivalence`.
    """
    count = 0
    require_options("accumulation", train, "accumulation")
    with open_bench(settings) as bench:
        for row in bench.rows:
            whole = bench.run(train, row)
            for number in accumulation:
                for rank, found in enumerate(bench.run(train, row, accumulation=number)):
                    where = f"{row.text}, rank {rank}, accumulation {number}"
                    require("accumulation", where, found, whole[rank], tolerance, "one batch")
                    count += 1
    return count


def check_donation(train: Train, **settings: Unpack[Settings]) -> int:
    """Donation: `donate=True` changes no bits.

    Args:
        train: must take `donate`.
        **settings: see `Settings`.

    Returns:
        The number of comparisons.

    Raises:
        AssertionError: as for `check_purity`.
    """
    count = 0
    require_options("donation", train, "donate")
    with open_bench(settings) as bench:
        for row in bench.rows:
            pure = bench.run(train, row, donate=False)
            for rank, found in enumerate(bench.run(train, row, donate=True)):
                require("donation", f"{row.text}, rank {rank}", found, pure[rank], 0.0, "donate=False")
                count += 1
    return count


def check_checkpoint(make: Train, **settings: Unpack[Settings]) -> int:
    """Checkpoints: `load(save(x))` is `x`, bit for bit, whichever strategy and world size wrote and read it.

    Args:
        make: `make(rt) -> tree` to be saved, equal on all ranks; `Model` and `Optimizer` records may be in it.
        **settings: see `Settings`.

    Returns:
        The number of comparisons.

    Raises:
        AssertionError: as for `check_purity`.
    """
    count = 0
    with open_bench(settings) as bench, tempfile.TemporaryDirectory() as folder:
        for number, writer in enumerate(bench.rows):
            path = os.path.join(folder, str(number))
            saved = bench.run(_save, writer, make, path)[0]
            for reader in bench.rows:
                for rank, found in enumerate(bench.run(_load, reader, make, path)):
                    where = f"{reader.text}, rank {rank}"
                    require("checkpoints", where, found, saved, 0.0, f"what {writer.text} saved")
                    count += 1
    return count


def _save(rt: Runtime, make: Train, path: str) -> Tree:
    tree = make(rt)
    save(rt, path, tree)
    return snapshot(tree)


def _load(rt: Runtime, make: Train, path: str) -> Tree:
    return snapshot(load(rt, path, like=tree_map(_other, make(rt))))


def _other(leaf: Any) -> Any:
    """A leaf of the same kind with other values, so that a load that reads nothing is found out."""
    if isinstance(leaf, torch.Tensor):
        return torch.zeros_like(leaf) if bool(local_of(leaf).cpu().any()) else torch.ones_like(leaf)
    return type(leaf)(not leaf) if isinstance(leaf, bool | int | float) else leaf


def check_resume(
    train: Train, *, stops: Sequence[int] = (1,), tolerance: float = TOLERANCE, **settings: Unpack[Settings]
) -> int:
    """Resume: n + m steps are n steps, a checkpoint, and m steps from it.

    Bit for bit at the same strategy and world size, data order included; within the tolerance at any other. Dropout
    is included with kind="processes": threads share the generators that it draws from.

    Args:
        train: must take `folder` and `stop`.
        stops: after how many steps it is interrupted.
        tolerance: for going on under another strategy or world size.
        **settings: see `Settings`.

    Returns:
        The number of comparisons.

    Raises:
        AssertionError: as for `check_equivalence`.
    """
    count = 0
    require_options("resume", train, "folder", "stop")
    with open_bench(settings) as bench:
        full = {row: bench.run(train, row)[0] for row in bench.rows}
        for stop, first, second in itertools.product(stops, bench.rows, bench.rows):
            with tempfile.TemporaryDirectory() as folder:
                bench.run(train, first, folder=folder, stop=stop)
                if not os.listdir(folder):
                    raise AssertionError(f"train(folder=..., stop={stop}) saved nothing in its folder ({first.text})")
                for rank, found in enumerate(bench.run(train, second, folder=folder)):
                    where = f"{first.text} for {stop} steps, then {second.text}, rank {rank}"
                    same = first == second
                    require("resume", where, found, full[second], 0.0 if same else tolerance, "no interruption")
                    count += 1
    return count
