"""The arguments of a compiled step in words: what changed, that it is compiled once more."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fabricfn.binding import describe
from fabricfn.compiling.arguments import Part, is_record
from fabricfn.compiling.hyperparams import is_number
from fabricfn.random import Key
from fabricfn.records import Grads, Model
from fabricfn.states import Optimizer
from fabricfn.tree import TreeSpec, path_name, tree_paths

SHOWN = 4


def names_of(step_fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], spec: Any) -> list[str]:
    """What the step calls each of its arguments, in the order of `flatten`; an item of a tree is "batch/x"."""
    try:
        known = [one.name for one in inspect.signature(step_fn).parameters.values() if one.kind < one.VAR_POSITIONAL]
    except (TypeError, ValueError):  # a function written in C
        known = []
    known = [*known, *(f"argument {i}" for i in range(len(known), len(args)))][: len(args)]
    if type(spec) is not TreeSpec:
        return [*known, *kwargs]
    paths = tree_paths((tuple(args), dict(kwargs)), is_record)
    labels: list[tuple[Any, ...]] = [(known[p[1]] if p[0] == 0 else p[1], *p[2:]) for p in paths]
    return [path_name(label) for label in labels]


def described(names: Sequence[str], parts: Sequence[Part]) -> dict[str, str]:
    """Name -> what a graph depends on there."""
    return {name: text for label, part in zip(names, parts, strict=True) for name, text in _lines(label, part)}


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What is not the same."""
    lines = [
        f"{name}: {before.get(name, 'nothing')} -> {now.get(name, 'nothing')}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more or "a model or an optimizer that was set up anew"


def _lines(name: str, part: Part) -> Iterator[tuple[str, str]]:
    given = part.given
    if isinstance(given, torch.Tensor):
        yield name, f"{describe(given)}, strides {given.stride()}{', requires grad' * given.requires_grad}"
    elif type(given) is Model:
        yield f"{name}.training", f"{len(given.training)} modules in training mode"
        yield from ((f"{name}/{key}", describe(value)) for key, value in {**given.params, **given.buffers}.items())
    elif type(given) is Grads:
        for key, value in given.params.items():
            yield f"{name}/{key}", "None" if value is None else describe(value)
    elif type(given) is Optimizer:
        for place, leaf in enumerate(part.known.leaves):
            counted = place in part.known.counters
            text = "a counter" if counted else describe(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)
            yield f"{name}.state/{place}", text
        for number, group in enumerate(given.hyperparams):
            for key, value in group.items():
                text = "a number" if key == "betas" or is_number(key, value) else repr(value)
                yield f"{name}.hyperparams/{number}/{key}", text
    else:
        yield name, "a number" if type(given) is float else "a key" if type(given) is Key else f"{given!r:.80}"
