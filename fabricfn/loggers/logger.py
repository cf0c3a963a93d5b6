"""What a logger is: functions that receive what a run measures. The laws are here, the places in the other files."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def nothing() -> None:
    """What a logger does that has nothing to close, and no folder."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Logger:
    """Receives what a run measures. A logger of your own is such a record; all but `log` may be left out.

    Laws: its functions are called on rank 0 alone, by one thread at a time, with names that have no prefix of a rank
    and numbers that are Python floats; the first call opens what there is to open, `close` is called once at the end,
    also after an error, and never before `log` has been given all rows. It can be pickled as long as it is not open,
    since `launch` sends it to the ranks.

    Example:
        >>> import fabricfn as ff
        >>> shown = ff.loggers.Logger(log=lambda values, step: print(step, values))
        >>> with ff.runtime(devices=1, accelerator="cpu", loggers=shown) as rt:
        ...     ff.log(rt, "loss", 0.5, step=3)
        3 {'loss': 0.5}
    """

    log: Callable[[Mapping[str, float], int], object]
    """(name -> number, step): one row."""
    hyperparams: Callable[[Mapping[str, Any]], object] | None = None
    """A flat mapping, "optimizer/lr" -> number, string, bool or None."""
    text: Callable[[str, str, int], object] | None = None
    """(name, text, step)."""
    image: Callable[[str, Any, int], object] | None = None
    """(name, uint8 array of shape (height, width, 3), step)."""
    graph: Callable[[Any, tuple[Any, ...]], object] | None = None
    """(module, its inputs): the network as a picture."""
    close: Callable[[], object] = nothing
    """Write out what is held back, and let go of files."""
    folder: Callable[[], Path | None] = nothing
    """Where it writes, which is opened by the question; None when that is no folder."""
