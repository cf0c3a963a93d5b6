"""What was logged and is not written yet: numbers on a device stay there until many of them travel at once."""

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fabricfn.loggers.logger import Logger

ROWS = 100
PATIENCE = 2.0
"""Seconds; rows with a number on a device wait for so many others, or so long for the next one."""

Number = float | torch.Tensor


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Journal:
    """The loggers of one runtime, and the rows that wait for them. Changes; all that reach it share it."""

    loggers: tuple[Logger, ...]
    rows: list[tuple[dict[str, Number], int]] = dataclasses.field(default_factory=list[Any])
    since: float = 0.0
    """When the oldest row that waits was noted."""
    step: int = 0
    """Of the next row that names none."""
    used: bool = False
    """Whether a logger may have something open."""
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


def note(journal: Journal, values: Mapping[str, Number], step: int | None) -> None:
    """Write a row, or keep it as long as one of its numbers, or of those before it, is on a device."""
    with journal.lock:
        step = next_step(journal, step)
        if not journal.rows:
            journal.since = time.monotonic()
        journal.used = True
        journal.rows.append((dict(values), step))
        waits = any(isinstance(value, torch.Tensor) for row, _ in journal.rows for value in row.values())
        if not waits or len(journal.rows) >= ROWS or time.monotonic() - journal.since > PATIENCE:
            _write(journal)


def in_use(journal: Journal) -> tuple[Logger, ...]:
    """The loggers, which `close` will close."""
    journal.used = True
    return journal.loggers


def next_step(journal: Journal, step: int | None) -> int:
    """The step, or where there is none the one after the last."""
    step = journal.step if step is None else step
    journal.step = step + 1
    return step


def write_rows(journal: Journal) -> None:
    """Write all that waits."""
    with journal.lock:
        _write(journal)


def close(journal: Journal) -> None:
    """Write all that waits, and close every logger; the first error is raised when all of them were closed."""
    first: Exception | None = None
    if not journal.used:
        return
    journal.used = False
    for act in (lambda: write_rows(journal), *(logger.close for logger in journal.loggers)):
        try:
            act()
        except Exception as error:  # of one logger: the others are closed all the same
            first = first or error
    if first is not None:
        raise first


def _write(journal: Journal) -> None:
    rows, journal.rows = journal.rows, []
    numbers = iter(_on_host([value for row, _ in rows for value in row.values()]))
    for row, step in rows:
        plain = {name: next(numbers) for name in row}
        for logger in journal.loggers:
            logger.log(plain, step)


def _on_host(values: Sequence[Number]) -> list[float]:
    """The same as Python numbers; one copy for all tensors of a device and dtype."""
    found: dict[int, float] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            groups.setdefault((value.device, value.dtype), []).append(index)
        else:
            found[index] = value
    for indices in groups.values():
        stacked: Any = torch.stack([torch.as_tensor(values[index]).reshape(()) for index in indices])
        found.update(zip(indices, stacked.tolist(), strict=True))
    return [found[index] for index in range(len(values))]
