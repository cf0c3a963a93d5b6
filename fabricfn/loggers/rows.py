"""Rows in files that any tool reads: CSV and JSON lines. Each row is on its way to the disk when the call returns."""

import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from fabricfn.loggers.folders import RunFolder, open_folder, run_folder
from fabricfn.loggers.logger import Logger

HYPERPARAMS = "hyperparams.json"


@dataclasses.dataclass(slots=True, kw_only=True)
class Rows:
    """A file that grows by a row at a time."""

    run: RunFolder
    file_name: str
    prefix: str
    file: BinaryIO | None = None
    columns: list[str] = dataclasses.field(default_factory=list[str])
    """Of a CSV file."""

    @property
    def path(self) -> Path:
        """The file."""
        return open_folder(self.run) / self.file_name


def csv_logger(
    folder: str | os.PathLike[str], name: str = "", version: int | str | None = None, prefix: str = ""
) -> Logger:
    """Rows in `folder/name/version_N/metrics.csv`: "step", then a column for each name, in the order of appearance.

    A name that comes later gets a column of its own, and the rows before keep theirs. Each row is given to the
    operating system at once, so a process that is killed loses none. Hyperparameters go to `hyperparams.json` beside.

    Args:
        folder: made when the first row is written; `~` is your home.
        name: of the experiment, a folder in between.
        version: None takes the next free number; a number or a string names the folder of a run that goes on: rows
            are appended.
        prefix: comes before each name, with "/" between.

    Returns:
        The logger, for `init_runtime(loggers=...)`.

    Example:
        >>> import pathlib, tempfile, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ff.runtime(devices=1, accelerator="cpu", loggers=ff.loggers.csv(folder, "digits")) as rt:
        ...         ff.log_dict(rt, {"loss": 0.5, "accuracy": 0.75}, step=1)
        ...     print(pathlib.Path(folder, "digits/version_0/metrics.csv").read_text(), end="")
        step,loss,accuracy
        1,0.5,0.75
    """
    rows = Rows(run=run_folder(folder, name, version), file_name="metrics.csv", prefix=prefix)
    return _logger(rows, _put_csv)


def jsonl_logger(
    folder: str | os.PathLike[str], name: str = "", version: int | str | None = None, prefix: str = ""
) -> Logger:
    """Rows in `folder/name/version_N/metrics.jsonl`: an object a line, with "step", "time" (Unix seconds) and names.

    Rows may have different names. All else is as in `csv`.

    Args:
        folder: made when the first row is written; `~` is your home.
        name: of the experiment, a folder in between.
        version: None takes the next free number; a number or a string names the folder of a run that goes on.
        prefix: comes before each name, with "/" between.

    Returns:
        The logger, for `init_runtime(loggers=...)`.

    Example:
        >>> import json, pathlib, tempfile, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ff.runtime(devices=1, accelerator="cpu", loggers=ff.loggers.jsonl(folder, version="a")) as rt:
        ...         ff.log(rt, "loss", 0.5, step=1)
        ...     sorted(json.loads(pathlib.Path(folder, "a/metrics.jsonl").read_text()))
        ['loss', 'step', 'time']
    """
    rows = Rows(run=run_folder(folder, name, version), file_name="metrics.jsonl", prefix=prefix)
    return _logger(rows, _put_json)


def _logger(rows: Rows, put: Any) -> Logger:
    return Logger(
        log=partial(put, rows),
        hyperparams=partial(_put_hyperparams, rows),
        close=partial(_close, rows),
        folder=partial(open_folder, rows.run),
    )


def prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under `prefix/name`."""
    return {f"{prefix}/{name}" if prefix else name: value for name, value in values.items()}


def _put_csv(rows: Rows, values: Mapping[str, float], step: int) -> None:
    named = prefixed(rows.prefix, values)
    file = _opened(rows)
    if not rows.columns and file.tell():
        rows.columns = _columns_of(rows.path)
    fresh = [name for name in named if name not in rows.columns]
    if not rows.columns:
        rows.columns = ["step", *fresh]
        file.write(_line(rows.columns))
    elif fresh:
        rows.columns += fresh
        file = _with_columns(rows, len(fresh))
    file.write(_line([step, *(named.get(name, "") for name in rows.columns[1:])]))


def _columns_of(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), list[str]())


def _line(cells: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _with_columns(rows: Rows, count: int) -> BinaryIO:
    """The same file with further columns, which the rows that are there leave empty; old or new, whatever happens."""
    _close(rows)
    path = rows.path
    beside = path.with_name(f".{path.name}.new")
    with path.open(newline="", encoding="utf-8") as old, beside.open("wb") as new:
        reader = csv.reader(old)
        next(reader)
        new.write(_line(rows.columns))
        for cells in reader:
            new.write(_line([*cells, *[""] * count]))
    os.replace(beside, path)
    return _opened(rows)


def _put_json(rows: Rows, values: Mapping[str, float], step: int) -> None:
    row = {"step": step, "time": round(time.time(), 3), **prefixed(rows.prefix, values)}
    _opened(rows).write(json.dumps(row).encode() + b"\n")


def _opened(rows: Rows) -> BinaryIO:
    """The file, at its end. A row that an earlier process did not finish is cut off."""
    if rows.file is None:
        file = rows.path.open("a+b", buffering=0)
        rows.file = file
        if end := file.seek(0, os.SEEK_END):
            file.seek(max(0, end - (1 << 20)))
            tail = file.read()
            if not tail.endswith(b"\n"):
                file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
    return rows.file


def _put_hyperparams(rows: Rows, values: Mapping[str, Any]) -> None:
    path = rows.path.with_name(HYPERPARAMS)
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps({**known, **values}, indent=1) + "\n")
    os.replace(beside, path)


def _close(rows: Rows) -> None:
    if rows.file is not None:
        rows.file.close()
        rows.file = None
