"""The one door to the laws: `check(train)`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from fabricfn.errors import ConfigurationError
from fabricfn.testing.bench import Settings, open_bench, options_in
from fabricfn.testing.laws import (
    check_accumulation,
    check_checkpoint,
    check_donation,
    check_equivalence,
    check_purity,
    check_resume,
)
from fabricfn.testing.loops import Train

LAWS: Mapping[str, tuple[Callable[..., int], frozenset[str]]] = {
    "purity": (check_purity, frozenset()),
    "equivalence": (check_equivalence, frozenset()),
    "donation": (check_donation, frozenset({"donate"})),
    "accumulation": (check_accumulation, frozenset({"accumulation"})),
    "checkpoint": (check_checkpoint, frozenset()),
    "resume": (check_resume, frozenset({"folder", "stop"})),
}
"""Each law of a training function, and the keywords that the function needs for it."""


def check(train: Train, laws: Sequence[str] | None = None, **settings: Unpack[Settings]) -> dict[str, int]:
    """Check the laws of training on a function of your own, over strategies and world sizes.

    Args:
        train: `train(rt) -> tree of final values, equal on all ranks`. Keywords that it takes (`accumulation`,
            `donate`, `folder` with `stop`) make further laws checkable; `training_loop` makes a function with all.
        laws: names of `LAWS`; None is every law that the function's keywords allow.
        **settings: `strategies`, `world_sizes`, `kind`, `precision`, `seed`, `timeout`, `ranks`; see `Settings`.

    Returns:
        law -> the number of comparisons made. What is not in it was not checked.

    Raises:
        AssertionError: a law is broken; names the law, the strategy, the world size, the leaf and the difference.
        ConfigurationError: an unknown law, or one that needs a keyword which the function does not take.

    Example:
        >>> import torch
        >>> from fabricfn.testing import training_loop
        >>> data = torch.arange(24.0, dtype=torch.float64).view(12, 2).sin()
        >>> net = torch.nn.Linear(2, 1).double()
        >>> train = training_loop(net, lambda net, x: net(x).square().mean(), data)
        >>> check(train, laws=("equivalence", "donation"), world_sizes=(1, 2), strategies=("ddp",))
        {'equivalence': 9, 'donation': 3}
    """
    if laws is None:
        taken = options_in(train)
        laws = [name for name, (_, needed) in LAWS.items() if needed <= taken]
    if unknown := [name for name in laws if name not in LAWS]:
        raise ConfigurationError(f"there is no law {unknown[0]!r}; there are {', '.join(LAWS)}.")
    with open_bench(settings) as bench:
        shared: Any = {**settings, "ranks": bench.ranks}
        return {name: LAWS[name][0](train, **shared) for name in laws}
