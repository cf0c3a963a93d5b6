"""Stopping early: when a value has not got better for a while."""

import dataclasses
import math
from typing import Any

from fabricfn.collectives import all_reduce
from fabricfn.errors import ConfigurationError
from fabricfn.runtimes import Runtime


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopping:
    """Where `early_stopping` is: plain numbers, the same on every rank, to be saved with the rest."""

    best: float = math.nan
    """The best value so far; NaN before the first."""
    num_bad: int = 0
    """How many values in a row were no better."""
    stop: bool = False
    """Whether that is as many as `patience`."""

    @property
    def improved(self) -> bool:
        """Whether the last value was the best one."""
        return self.num_bad == 0 and not math.isnan(self.best)


def early_stopping(
    rt: Runtime,
    state: EarlyStopping,
    value: Any,
    *,
    patience: int = 3,
    min_delta: float = 0.0,
    mode: str = "min",
    reduce: str = "mean",
) -> EarlyStopping:
    """The next state, given the value of one more evaluation. Every rank must call it.

    Laws: all ranks get the same state. A value is better when it is finite and differs from the best by more than
    `min_delta` in the right direction; the first finite value is.

    Args:
        rt: the runtime.
        state: of the last call; at first `ff.EarlyStopping()`.
        value: this rank's number, or a tensor with one element; the device is waited for.
        patience: how many values in a row must be no better for `stop`.
        min_delta: an improvement that is not greater than this is none.
        mode: "min" or "max", what is better.
        reduce: "mean", "max" or "min", the value of the ranks that counts.

    Returns:
        A new state on every rank: `stop`, `improved`, `best`.

    Raises:
        ConfigurationError: an unknown mode, a patience below 1, a negative `min_delta`.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> state = ff.EarlyStopping()
        >>> for epoch, loss in enumerate((1.0, 0.5, 0.7, 0.6, 0.4)):
        ...     state = ff.early_stopping(rt, state, loss, patience=2)
        ...     if state.stop:
        ...         break
        >>> epoch, state
        (3, EarlyStopping(best=0.5, num_bad=2, stop=True))
    """
    if mode not in ("min", "max") or reduce not in ("mean", "max", "min") or patience < 1 or not min_delta >= 0:
        raise ConfigurationError(
            'mode is "min" or "max", reduce "mean", "max" or "min", patience at least 1 and min_delta at least 0; found'
            f" mode={mode!r}, reduce={reduce!r}, patience={patience!r}, min_delta={min_delta!r}."
        )
    value = all_reduce(rt, float(value), reduce)
    gain = state.best - value if mode == "min" else value - state.best
    if math.isfinite(value) and (math.isnan(state.best) or gain > min_delta):
        return EarlyStopping(best=value)
    num_bad = state.num_bad + 1
    return EarlyStopping(best=state.best, num_bad=num_bad, stop=num_bad >= patience)
