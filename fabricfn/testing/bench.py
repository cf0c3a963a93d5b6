"""Where laws are checked: which strategies on how many ranks of which world."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypedDict

from fabricfn.errors import ConfigurationError
from fabricfn.precision import Precision
from fabricfn.strategies import NAMES, resolve
from fabricfn.strategy import Strategy
from fabricfn.testing.ranks import TIMEOUT, Ranks
from fabricfn.testing.worlds import world


class Settings(TypedDict, total=False):
    """The settings that every law takes, as keywords."""

    strategies: Sequence[str | Strategy]
    """Names or records; all strategies of the package when left out. Worlds that one cannot serve are left out."""
    world_sizes: Sequence[int]
    """The numbers of ranks; (1, 2, 3, 4) when left out."""
    ranks: Ranks
    """An open world to run in; otherwise one is opened, and closed afterwards."""
    kind: str
    """"threads" (the default) or "processes", for the world that is opened."""
    precision: str | int | Precision
    """"64-true" when left out: other arithmetic needs other tolerances."""
    seed: int
    """`rt.seed`; 0 when left out."""
    timeout: float
    """Seconds for one run."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: a strategy on a number of ranks."""

    strategy: str | Strategy
    world_size: int

    @property
    def text(self) -> str:
        """As messages show it."""
        name = self.strategy if isinstance(self.strategy, str) else self.strategy.name
        return f"strategy {name!r} on {self.world_size} rank{'s' * (self.world_size > 1)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """An open world and the rows that are tried in it."""

    ranks: Ranks
    rows: Sequence[Row]
    oracle: Row
    """What every row is compared with: one process."""
    options: Mapping[str, Any]

    def run(self, fn: Callable[..., Any], row: Row, *args: Any, **options: Any) -> list[Any]:
        """`fn(rt, *args, **options)` on every rank of the row's world."""
        call = functools.partial(fn, **options) if options else fn
        return self.ranks.run(call, *args, world_size=row.world_size, strategy=row.strategy, **self.options)


@contextlib.contextmanager
def open_bench(settings: Settings) -> Generator[Bench]:
    """The bench of these settings; its world is closed afterwards unless it was handed over."""
    sizes = tuple(settings.get("world_sizes", (1, 2, 3, 4)))
    named = {strategy: resolve(strategy, 1).max_ranks for strategy in settings.get("strategies", tuple(NAMES))}
    rows = [Row(one, size) for one, most in named.items() for size in sizes if most is None or size <= most]
    if not rows:
        raise ConfigurationError(f"none of strategies={list(named)} serves any of world_sizes={sizes}.")
    options = {
        "precision": settings.get("precision", "64-true"),
        "seed": settings.get("seed", 0),
        "timeout": settings.get("timeout", TIMEOUT),
    }
    with contextlib.ExitStack() as stack:
        ranks = settings.get("ranks") or stack.enter_context(world(settings.get("kind", "threads"), max(sizes)))
        yield Bench(ranks=ranks, rows=rows, oracle=Row("single", 1), options=options)


def options_in(train: Callable[..., Any]) -> set[str]:
    """The names of the keywords that a training function takes."""
    return set(inspect.signature(train).parameters)


def require_options(law: str, train: Callable[..., Any], *names: str) -> set[str]:
    """`options_in(train)`.

    Raises:
        ConfigurationError: the law needs a keyword that the function does not take.
    """
    found = options_in(train)
    if missing := [name for name in names if name not in found]:
        raise ConfigurationError(
            f"the law of {law} calls train(rt, {', '.join(f'{name}=...' for name in names)}), but it does not take"
            f" {', '.join(missing)}. Give it the keyword, or leave the law out: check(train, laws=(...)). See"
            " fabricfn.testing.training_loop for a function that takes all of them."
        )
    return found
