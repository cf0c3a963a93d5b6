"""Hyperparameters in a graph: which of them go into it as numbers, so that a schedule is never compiled again."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

Hyper = Mapping[str, Any]


def is_number(name: str, value: Any) -> bool:
    """Whether a value goes into the graph as a number. A 0 leaves its term out, but for a learning rate."""
    return (isinstance(value, float) and (value != 0.0 or name == "lr")) or (type(value) is int and name == "lr")


def split(groups: Sequence[Hyper]) -> tuple[Hashable, list[float]]:
    """(what the graph depends on, the numbers that go into it)."""
    static: list[Hashable] = []
    numbers: list[float] = []
    for group in groups:
        for name, value in group.items():
            several = value if name == "betas" else (value,)
            if name == "betas" or is_number(name, value):
                numbers += several
                static.append((name, len(several)))
            else:
                static.append((name, value.__class__, value))
        static.append(None)
    return tuple(static), numbers


def joined(groups: Sequence[Hyper], number: Callable[[], Any]) -> tuple[dict[str, Any], ...]:
    """The hyperparameters with `number()` in place of each number, in the order of `split`."""

    def value_of(name: str, value: Any) -> Any:
        if name == "betas":
            return tuple(number() for _ in value)
        return number() if is_number(name, value) else value

    return tuple({name: value_of(name, value) for name, value in group.items()} for group in groups)
