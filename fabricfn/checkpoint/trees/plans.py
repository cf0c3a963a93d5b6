"""What a load will do, as plain data: which leaves it reads, and what it makes of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from fabricfn.checkpoint.trees.adapters import Adapter
from fabricfn.checkpoint.trees.outline import Path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """One leaf to load."""

    leaf: int
    """Its number in the manifest."""
    like: Any
    """The template's leaf, or one that stands for it; None where there is none."""
    path: Path
    standing_in: bool = False
    """`like` is not the template's own: nothing can be filled."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """How one value of the result is made."""

    want: int = -1
    """Which wanted leaf it is; -1 when `make` makes it."""
    make: Callable[[list[Any]], Any] = len
    """From the values of `parts`."""
    parts: tuple["Build", ...] = ()
    kept: bool = False
    """It is the template's own value."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The outcome: everything that a load will do."""

    build: Build
    wants: tuple[Want, ...]
    missing: tuple[str, ...]
    """Paths of the template that the checkpoint does not have."""
    rest: tuple[tuple[Path, Build], ...]
    """What the checkpoint has and the template does not."""
    problems: tuple[str, ...]
    claims: tuple[tuple[Adapter, Any], ...]
    """The records of the template that will be filled."""
    states: tuple[tuple[Path, Any, Build], ...]
    """The objects of the template that are given a state, and the states."""


def built(build: Build, values: list[Any]) -> Any:
    """The value, from the values of all wanted leaves."""
    if build.want >= 0:
        return values[build.want]
    return build.make([built(part, values) for part in build.parts])


def kept(value: Any) -> Build:
    """The template's own value."""
    return Build(make=lambda _: value, kept=True)
