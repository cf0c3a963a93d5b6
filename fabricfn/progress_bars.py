"""How far a loop has come, on rank 0: a bar in a terminal (with tqdm), plain lines elsewhere."""

import importlib.util
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from fabricfn.runtimes import Runtime

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds between two lines."""


def progress(
    rt: Runtime,
    iterable: Iterable[T],
    *,
    total: int | None = None,
    desc: str = "",
    values: Callable[[], Any] | None = None,
    every: float = PATIENCE,
) -> Iterator[T]:
    """The same items, while rank 0 shows how far the loop has come; the other ranks show nothing.

    In a terminal, and in a notebook, it is tqdm's bar where that is installed (`pip install 'fabricfn[progress]'`).
    Elsewhere, in a log file for instance, it is a line every ten seconds and one at the end, on stderr.

    Args:
        rt: the runtime. Not collective.
        iterable: a range, `ff.batches(...)`, anything.
        total: the number of items; None asks `len`, and without one only the count is shown.
        desc: comes first.
        values: called when something is shown, and gives a mapping of names to numbers, which is shown too:
            `lambda: {"loss": loss.item()}`. It may wait for the device: a few times a second at most.
        every: seconds between two lines.

    Returns:
        The items, the same on every rank.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(accelerator="cpu")
        >>> sum(ff.progress(rt, range(4), desc="epoch 1"))
        6
    """
    if rt.global_rank != 0:
        return iter(iterable)
    if total is None:
        try:
            total = len(iterable)  # pyright: ignore[reportArgumentType] # what has none raises
        except TypeError:
            total = None
    bar = sys.stderr.isatty() or "ipykernel" in sys.modules
    if bar and importlib.util.find_spec("tqdm") is not None:
        return _with_bar(iterable, total, desc, values)
    return _with_lines(iterable, total, desc, values, every)


def _with_bar(iterable: Iterable[T], total: int | None, desc: str, values: Callable[[], Any] | None) -> Generator[T]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=desc or None, dynamic_ncols=True) as bar:
        shown = bar.last_print_t
        for item in iterable:
            yield item
            bar.update()
            if values is not None and bar.last_print_t != shown:
                shown = bar.last_print_t
                bar.set_postfix(values(), refresh=False)


def _with_lines(
    iterable: Iterable[T], total: int | None, desc: str, values: Callable[[], Any] | None, every: float
) -> Generator[T]:
    began = shown = time.monotonic()
    count = 0

    def line() -> None:
        seconds = time.monotonic() - began
        rate = count / seconds if seconds > 0 else 0.0
        of = f"/{total} ({100 * count / total:.0f}%)" if total else ""
        left = f", {(total - count) / rate:.0f} s left" if total and rate and count < total else ""
        numbers: dict[str, float] = values() if values and count else {}
        more = "".join(f" {name}={value:.4g}" for name, value in numbers.items())
        print(f"{desc + ': ' if desc else ''}{count}{of} in {seconds:.0f} s, {rate:.3g}/s{left}{more}", file=sys.stderr)

    try:
        for item in iterable:
            yield item
            count += 1
            now = time.monotonic()
            if now - shown >= every:
                shown = now
                line()
    finally:
        line()
