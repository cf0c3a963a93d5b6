"""The lists of hosts that cluster managers write: SLURM's "node[01-03,7],x"."""

import itertools
import re
from collections.abc import Iterator, Sequence

from fabricfn.errors import ConfigurationError

_NAME = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
_PIECE = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)

Piece = Sequence[str | tuple[int, int, int]]
"""A part of a name: the texts that can stand there, and ranges of numbers as (low, high, digits)."""


def expand(text: str) -> Iterator[str]:
    """The hosts of a list in SLURM's notation, one after another; nothing is built for the ones that nobody asks for.

    Names are separated by commas. Brackets hold numbers and ranges, whose leading zeros count; several brackets in one
    name give every combination, the last one counting fastest.

    Raises:
        ConfigurationError: it is no such list.

    Example:
        >>> list(expand("node[01-03,7],x"))
        ['node01', 'node02', 'node03', 'node7', 'x']
        >>> list(expand("r[1-2]n[08-09]"))
        ['r1n08', 'r1n09', 'r2n08', 'r2n09']
    """
    text, at = text.strip(), 0
    while True:
        name = _NAME.match(text, at)
        if name is None or text[name.end() : name.end() + 1] not in ("", ","):
            raise _error(text)
        pieces = [_numbers(inside, text) if plain == "" else [plain] for inside, plain in _PIECE.findall(name.group())]
        yield from _combinations(pieces)
        if name.end() == len(text):
            return
        at = name.end() + 1


def _combinations(pieces: Sequence[Piece]) -> Iterator[str]:
    if not pieces:
        yield ""
        return
    for first in itertools.chain.from_iterable(map(_written, pieces[0])):
        for rest in _combinations(pieces[1:]):
            yield first + rest


def _written(span: str | tuple[int, int, int]) -> Iterator[str]:
    """The text itself, or the numbers low .. high with so many digits."""
    if isinstance(span, str):
        yield span
        return
    low, high, width = span
    for number in range(low, high + 1):
        yield f"{number:0{width}d}"


def _numbers(inside: str, text: str) -> Piece:
    """The numbers and ranges of one pair of brackets, as (low, high, digits)."""
    found: list[tuple[int, int, int]] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or high < low:
            raise _error(text)
        found.append((low, high, len(match[1])))
    return found


def _error(text: str) -> ConfigurationError:
    return ConfigurationError(
        f"{text!r} is no list of hosts in SLURM's notation, such as node[01-03,7],x. Write"
        " environment=fabricfn.environments.Topology(...) to say yourself where the ranks are."
    )


def counts(text: str) -> list[int]:
    """How many tasks each node has, in SLURM's notation.

    Raises:
        ConfigurationError: it is no such list.

    Example:
        >>> counts("2(x3),1")
        [2, 2, 2, 1]
    """
    found: list[int] = []
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip(), re.ASCII)
        if match is None:
            raise ConfigurationError(f"{text!r} is no list of tasks per node in SLURM's notation, such as 2(x3),1.")
        found += [int(match[1])] * int(match[2] or 1)
    return found
