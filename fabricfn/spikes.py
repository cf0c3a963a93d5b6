"""A guard over the loss: what is not finite, or jumps, is told on all ranks, and the last good state is at hand."""

import dataclasses
import math
from typing import Any, TypeVar

import torch

from fabricfn.collectives import all_reduce
from fabricfn.errors import ConfigurationError, DonatedError
from fabricfn.records import Model
from fabricfn.runtimes import Runtime
from fabricfn.states import Optimizer
from fabricfn.tree import tree_flatten, tree_map

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpikeGuard:
    """Where `spike_guard` is, the same on every rank. It is saved with the rest, but for the good state."""

    values: tuple[float, ...] = dataclasses.field(default=(), metadata={"checkpoint": "free"})
    """The last good values, at most `window`, the oldest first."""
    count: int = 0
    """How many values there were."""
    in_a_row: int = 0
    """How many spikes the last values were."""
    good: Any = dataclasses.field(default=None, repr=False, metadata={"checkpoint": "skip"})
    """The last state whose value was good; None where there is none."""

    @property
    def spike(self) -> bool:
        """Whether the last value was a spike."""
        return self.in_a_row > 0


def spike_guard(
    rt: Runtime,
    guard: SpikeGuard,
    value: Any,
    state: T,
    *,
    mode: str = "min",
    window: int = 10,
    warmup: int = 1,
    atol: float | None = None,
    rtol: float | None = 2.0,
    finite_only: bool = True,
    every: int = 1,
    copy: bool = False,
) -> tuple[SpikeGuard, T]:
    """The next guard, and the state to go on with: `state`, or after a spike the last good one.

    Every rank must call it. Laws: all ranks get the same answer, and what counts is the worst value of any rank. A
    value is a spike when it is worse than the last good one, and at least `atol` and at least `rtol * mean` away from
    the mean of the last good ones. Neither spikes nor what is not finite enter that mean.

    The good state is the one with which the last good value was computed, so a step back undoes the batch before the
    spike, too, which may have been the cause. It is kept as it is, which costs nothing but its memory. A step with
    `donate=True` overwrites it: then the next call raises, rather than the first spike hours later; with `copy=True`
    each good state is copied, and so is what comes back.

    Args:
        rt: the runtime.
        guard: of the last call; at first `ff.SpikeGuard()`.
        value: the loss of this rank, a number or a tensor with one element; the device is waited for.
        state: that of which the value is: `(model, opt)`, any tree; None to be told only.
        mode: "min" where less is better, "max" where more is.
        window: how many good values the mean is of.
        warmup: how many values at the beginning are no spikes unless they are not finite.
        atol, rtol: the least distances; None is none.
        finite_only: whether NaN and infinities are always spikes; otherwise NaN is none, an infinity when it is worse.
        every: keep each `every`-th good state only; what is copied costs a copy then.
        copy: keep copies, for steps that donate.

    Returns:
        On every rank (guard, state). `guard.spike` says which it is; without a good state `state` comes back.

    Raises:
        ConfigurationError: an unknown mode, a window or `every` below 1.
        DonatedError: the good state was given away.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> guard, kept = ff.SpikeGuard(), []
        >>> for step, loss in enumerate((1.0, 0.9, 30.0, float("nan"), 0.8)):
        ...     guard, state = ff.spike_guard(rt, guard, loss, f"state {step}")
        ...     kept.append((state, guard.spike))
        >>> kept
        [('state 0', False), ('state 1', False), ('state 1', True), ('state 1', True), ('state 4', False)]
    """
    if mode not in ("min", "max") or window < 1 or every < 1:
        raise ConfigurationError(
            f'mode is "min" or "max", window and every are at least 1; found mode={mode!r}, window={window!r},'
            f" every={every!r}."
        )
    _check_alive(guard.good)
    sign = 1 if mode == "min" else -1
    own = sign * float(value)
    worst, odd = all_reduce(rt, (-math.inf if math.isnan(own) else own, float(not math.isfinite(own))), "max")
    jump = guard.count >= warmup and _jumps(worst, [sign * value for value in guard.values], atol or 0.0, rtol or 0.0)
    count = guard.count + 1
    if jump or (odd and finite_only):
        after = dataclasses.replace(guard, count=count, in_a_row=guard.in_a_row + 1)
        return after, state if guard.good is None else _kept(guard.good, copy)
    if odd:
        return dataclasses.replace(guard, count=count, in_a_row=0), state
    good = _kept(state, copy) if guard.good is None or guard.count % every == 0 else guard.good
    return SpikeGuard(values=(*guard.values, sign * worst)[-window:], count=count, good=good), state


def _jumps(value: float, before: list[float], atol: float, rtol: float) -> bool:
    """Whether it is greater than the last one, and far from the mean."""
    if not before or value <= before[-1]:
        return False
    mean = sum(before) / len(before)
    return abs(value - mean) >= max(abs(atol), abs(rtol * mean))


def _kept(state: Any, copy: bool) -> Any:
    return tree_map(_clone, state) if copy else state


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _check_alive(good: Any) -> None:
    for leaf in tree_flatten(good, lambda node: type(node) in (Model, Optimizer))[0]:
        if type(leaf) in (Model, Optimizer):
            try:
                leaf.lease.check(type(leaf).__name__)
            except DonatedError as error:
                raise DonatedError(
                    f"ff.spike_guard kept this as the state to go back to: {error} Here: ff.spike_guard(...,"
                    " copy=True) keeps copies."
                ) from error
