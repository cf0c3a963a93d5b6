"""Learning rates as pure functions of the step, by torch's own schedulers; and the reaction to a plateau."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch

from fabricfn.errors import ConfigurationError
from fabricfn.tracing import Unknown

Rate = float | list[float]


class _Dummy(torch.optim.Optimizer):
    """What a scheduler drives: groups of hyperparameters, without parameters. The real constructor is not called."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.defaults = {key: value for key, value in groups[0].items() if key != "params"}
        self.param_groups = groups
        self.state = {}  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, closure: Any = None) -> Any:
        """Nothing."""


def schedule_from_torch(
    scheduler: Callable[..., Any],
    lr: Rate,
    *,
    momentum: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    **options: Any,
) -> Callable[[int], dict[str, Any]]:
    """A `torch.optim.lr_scheduler` as a pure function of the step: `optimizer_step(..., **schedule(opt.step))`.

    The values are those that the scheduler itself gives after that many of its steps, exactly, in any order of calls:
    asked for step n, it is stepped up to n once, and remembered. Not collective.

    Args:
        scheduler: a scheduler class, or any function `(optimizer, **options) -> scheduler`.
        lr: the initial learning rate; a list has one per group, and then the function returns lists.
        momentum: that of the optimizer, if it has one (SGD): OneCycleLR and CyclicLR move it.
        betas: those of the optimizer otherwise (Adam and its kin): OneCycleLR and CyclicLR move the first.
        **options: the scheduler's own arguments. In `schedulers=[...]` (SequentialLR, ChainedScheduler) stand functions
            `optimizer -> scheduler`, as `functools.partial(LinearLR, total_iters=10)`.

    Returns:
        step (an int, 0 for the first step) -> {"lr": ...}, with "momentum" or "betas" where the scheduler moves them.

    Raises:
        ConfigurationError: a negative step. What the scheduler refuses (OneCycleLR beyond its end), it raises itself.

    Example:
        >>> import torch, fabricfn as ff
        >>> schedule = ff.schedule_from_torch(torch.optim.lr_scheduler.StepLR, 1.0, step_size=2, gamma=0.5)
        >>> [schedule(step)["lr"] for step in (4, 0, 2)]
        [0.25, 1.0, 0.5]
    """
    rates = lr if isinstance(lr, list) else [lr]
    moving = "betas" if momentum is None else "momentum"
    start = (*list(betas),) if momentum is None else momentum + 0.0  # an object of its own: see `moves`
    dummy = _Dummy([{"params": [], "lr": rate, moving: start} for rate in rates])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a deprecated argument that SequentialLR itself passes
        if "schedulers" in options:
            options["schedulers"] = [make(dummy) for make in options["schedulers"]]
            made = scheduler(optimizer=dummy, **options)  # ChainedScheduler takes the optimizer second
        else:
            made = scheduler(dummy, **options)

    def now() -> dict[str, Any]:
        values: dict[str, Any] = {"lr": [group["lr"] for group in dummy.param_groups]}
        if moves:
            values[moving] = [group[moving] for group in dummy.param_groups]
        return values if isinstance(lr, list) else {key: value[0] for key, value in values.items()}

    moves = any(group[moving] is not start for group in dummy.param_groups)
    table: list[dict[str, Any]] = [now()]

    def schedule(step: Any) -> dict[str, Any]:
        if isinstance(step, Unknown):
            return cast("Any", step).then(schedule)
        at = int(step)
        if at < 0:
            raise ConfigurationError(f"a schedule begins with step 0; it was asked for {at}. Write schedule(opt.step).")
        if len(table) <= at:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                while len(table) <= at:
                    dummy.step()
                    made.step()
                    table.append(now())
        return dict(table[at])

    return schedule


class Plateau(NamedTuple):
    """Where `reduce_on_plateau` is: plain numbers, to be saved with the rest."""

    lr: Any
    """The learning rate to use now: a float, or a list with one per group."""
    best: float
    """The best value so far."""
    num_bad: int = 0
    """How many calls in a row were no better."""
    cooldown_left: int = 0
    """For how many calls no bad one is counted."""


def reduce_on_plateau(
    *,
    mode: str = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int = 0,
    min_lr: float | Sequence[float] = 0.0,
    eps: float = 1e-8,
) -> tuple[Callable[[Rate], Plateau], Callable[[Plateau, Any], Plateau]]:
    """`torch.optim.lr_scheduler.ReduceLROnPlateau` as a pair of pure functions.

    Args:
        mode: "min" or "max", what is better.
        factor: by which a learning rate is multiplied when the metric stands still.
        patience: how many evaluations without improvement are let pass.
        threshold, threshold_mode: what counts as an improvement, relative ("rel") or absolute ("abs").
        cooldown: how many evaluations are not counted after a reduction.
        min_lr: the lower bound, one for all groups or one per group.
        eps: a reduction smaller than this is not made.

    Returns:
        (init, update): `init(lr) -> Plateau`, and `update(plateau, metric) -> Plateau`, to be called once per
        evaluation, with the same metric on every rank. Use `optimizer_step(..., lr=plateau.lr)`.

    Raises:
        ConfigurationError: an unknown mode, or a factor of 1 or more.

    Example:
        >>> import fabricfn as ff
        >>> init, update = ff.reduce_on_plateau(patience=0, factor=0.5)
        >>> plateau = init(0.1)
        >>> for loss in (1.0, 0.9, 0.9):
        ...     plateau = update(plateau, loss)
        >>> plateau.lr
        0.05
    """
    if mode not in ("min", "max") or threshold_mode not in ("rel", "abs"):
        raise ConfigurationError(
            f'mode is "min" or "max", threshold_mode "rel" or "abs"; they are {mode!r}, {threshold_mode!r}'
        )
    if factor >= 1.0:
        raise ConfigurationError(f"factor must be below 1, since learning rates are multiplied by it; it is {factor}")

    def better(value: float, best: float) -> bool:
        if mode == "min":
            return value < (best * (1.0 - threshold) if threshold_mode == "rel" else best - threshold)
        return value > (best * (threshold + 1.0) if threshold_mode == "rel" else best + threshold)

    def init(lr: Rate) -> Plateau:
        count = len(lr) if isinstance(lr, list) else 1
        if isinstance(min_lr, Sequence) and len(min_lr) != count:
            raise ConfigurationError(f"min_lr has {len(min_lr)} values, lr has {count}")
        return Plateau(lr=lr, best=math.inf if mode == "min" else -math.inf)

    def lower(lr: float, least: float) -> float:
        new = max(lr * factor, least)
        return new if lr - new > eps else lr

    def update(plateau: Plateau, metric: Any) -> Plateau:
        value = float(metric)
        improved = better(value, plateau.best)
        num_bad = 0 if improved or plateau.cooldown_left > 0 else plateau.num_bad + 1
        next_one = Plateau(
            lr=plateau.lr,
            best=value if improved else plateau.best,
            num_bad=num_bad,
            cooldown_left=max(plateau.cooldown_left - 1, 0),
        )
        if num_bad <= patience:
            return next_one
        several = type(plateau.lr) is list
        rates: list[float] = [*plateau.lr] if several else [plateau.lr]
        least: list[Any] = [*min_lr] if isinstance(min_lr, Sequence) else [min_lr] * len(rates)
        lowered = [lower(float(rate), bound) for rate, bound in zip(rates, least, strict=True)]
        return next_one._replace(lr=lowered if several else lowered[0], num_bad=0, cooldown_left=cooldown)

    return init, update
