"""The rows that `ff.loggers.csv` and `ff.loggers.jsonl` wrote, as curves."""

import csv
import dataclasses
import fnmatch
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fabricfn.errors import ConfigurationError

FILES = ("metrics.csv", "metrics.jsonl")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One name of one run."""

    run: str
    """As it is told apart from the others: "digits/version_0"."""
    name: str
    steps: tuple[int, ...]
    """Ascending. Of a step that was logged twice, as after a resume, the last number counts."""
    values: tuple[float, ...]
    num_strange: int
    """How many were nan or infinite, and are left out."""


def curves_of(paths: Sequence[str], only: Sequence[str] = ()) -> dict[str, list[Curve]]:
    """Name -> its curve in each run that has one.

    Args:
        paths: files of rows, or folders, in which and below which they are looked for.
        only: patterns of names; none is all.

    Raises:
        ConfigurationError: there are none, or a row is no row; the message names the file and the line.
    """
    files = list(dict.fromkeys(file for path in paths for file in _files(Path(os.path.expanduser(path)))))
    found: dict[str, list[Curve]] = {}
    for file, run in zip(files, _labels(files), strict=True):
        for name, points in _points(file).items():
            if not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only):
                found.setdefault(name, []).append(_curve(run, name, points))
    if not found:
        names = sorted({name for file in files for name in _points(file)})
        raise ConfigurationError(
            f"{', '.join(paths)}: no name fits {', '.join(only)}; there is {', '.join(names[:12])}."
            if names
            else f"{', '.join(paths)}: nothing was logged there yet."
        )
    return found


def _curve(run: str, name: str, points: dict[int, float]) -> Curve:
    finite = sorted((step, value) for step, value in points.items() if math.isfinite(value))
    steps, values = zip(*finite, strict=True) if finite else ((), ())
    return Curve(run=run, name=name, steps=steps, values=values, num_strange=len(points) - len(finite))


def _files(path: Path) -> Iterator[Path]:
    """The files of rows at a path; of two in one folder, which have the same rows, the first kind."""
    if path.is_file():
        yield path
        return
    if not path.exists():
        raise ConfigurationError(f"there is no {path}. Name a metrics.csv, a metrics.jsonl, or a folder above them.")
    folders = sorted({file.parent for name in FILES for file in path.rglob(name)}, key=_natural)
    if not folders:
        raise ConfigurationError(
            f"{path} holds no {' or '.join(FILES)}; ff.loggers.csv(folder) and ff.loggers.jsonl(folder) write them."
        )
    for folder in folders:
        yield next(folder / name for name in FILES if (folder / name).is_file())


def _natural(path: Path) -> list[Any]:
    """version_10 comes after version_9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _labels(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell the runs apart."""
    homes = [Path(os.path.abspath(file)) for file in files]
    homes = [home.parent if home.name in FILES else home.with_suffix("") for home in homes]
    for count in range(1, 1 + max(len(home.parts) for home in homes)):
        labels = ["/".join(home.parts[-count:]) for home in homes]
        if len(set(labels)) == len(labels):
            return labels
    return [str(file) for file in files]


def _points(file: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> number."""
    found: dict[str, dict[int, float]] = {}
    read = _csv_rows if file.suffix == ".csv" else _json_rows
    with file.open(newline="", encoding="utf-8") as text:
        for number, row in enumerate(read(_whole_lines(text)), 1):
            try:
                step = int(row.pop("step"))
                for name, value in row.items():
                    if value not in ("", None):
                        found.setdefault(name, {})[step] = float(value)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigurationError(
                    f"{file}: row {number} is none of a logger's ({type(error).__name__}: {error}); a row has a whole"
                    ' number "step", and numbers.'
                ) from None
    return found


def _whole_lines(text: Iterable[str]) -> Iterator[str]:
    """All but a last one that a killed process left unfinished."""
    return (line for line in text if line.endswith("\n"))


def _csv_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    return csv.DictReader(lines)


def _json_rows(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row: Any = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            row = {"step": None}  # which the caller refuses, with the number of the row
        row.pop("time", None)
        yield row
