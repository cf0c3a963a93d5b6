"""A checkpoint under other names: the tree as if it had been saved so. Leaves keep their numbers.

[Note: renaming] The containers of a moved entry move along: "model/params/a" to "net/params/a" makes of "net" the
record that "model" was. Where nothing tells what a new container is (a plain dict moved into a model), the template
does.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from fabricfn.checkpoint.format.manifest import ANY, Node, class_of, path_text
from fabricfn.checkpoint.trees.outline import Path, is_state, listing
from fabricfn.errors import CheckpointError

Rename = Mapping[str, str] | Callable[[str], str] | None
"""{the checkpoint's path: the template's}, both with the same number of `*`; or a function of the path of a leaf."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Move:
    """One entry, where it was and where it goes; what bore the name `claims` before gives way."""

    node: Node | int
    old: Path
    new: Path
    claims: str | None


def renamed(tree: Node | int, rename: Rename) -> Node | int:
    """The tree under its new names.

    Raises:
        CheckpointError: a pattern fits nothing, two patterns or two entries contradict each other, or a list would have
            holes; all are named.
    """
    if rename is None:
        return tree
    items = _items(tree, ())
    moves = _by_function(items, rename) if callable(rename) else _by_patterns(items, rename)
    claims = {move.claims for move in moves if move.claims is not None}
    moves = [move for move in moves if move.claims is not None or not claims.intersection(_prefixes(move.new))]
    _check(moves)
    return _grown(tree, moves)


def _items(node: Node | int | None, path: Path) -> list[tuple[Path, Node | int]]:
    """What moves as one: leaves, empty containers, states of objects."""
    if type(node) is not Node:
        return [(path, node)] if type(node) is int else []
    if not node.children or is_state(node):
        return [(path, node)]
    keys = node.keys or range(len(node.children))
    return [item for key, child in zip(keys, node.children, strict=True) for item in _items(child, (*path, key))]


def _prefixes(path: Path) -> list[str]:
    return [path_text(path[: i + 1]) for i in range(len(path))]


def _by_function(items: Sequence[tuple[Path, Node | int]], rename: Callable[[str], str]) -> list[_Move]:
    moves: list[_Move] = []
    for path, node in items:
        old = path_text(path)
        try:
            new: Any = rename(old)
        except Exception as error:  # the caller's function may raise anything
            raise CheckpointError(f"rename= raised {type(error).__name__} for {old!r}: {error}") from error
        if type(new) is not str or not all(new.split("/")):
            raise CheckpointError(
                f"rename= returned {new!r} for {old!r}; it returns the path in the template: 'model/params/0.weight'."
            )
        moves.append(_Move(node, path, path if new == old else _new_path(path, new), None if new == old else new))
    return moves


def _by_patterns(items: Sequence[tuple[Path, Node | int]], rename: Mapping[str, str]) -> list[_Move]:
    rules = [(old, new, _expression(old, new)) for old, new in cast("Mapping[Any, Any]", rename).items()]
    used: set[str] = set()
    problems: list[str] = []
    moves: list[_Move] = []
    for path, node in items:
        found: dict[Path, tuple[str, str]] = {}
        for old, new, expression in rules:
            for depth, text in enumerate(_prefixes(path) or ["."], 1):
                match = expression.fullmatch(text)
                if match is None:
                    continue
                used.add(old)
                texts = iter(match.groups())
                place = "".join(next(texts) if part == "*" else part for part in re.split(r"(\*)", new))
                found.setdefault((*_new_path(path[:depth], place), *path[depth:]), (old, place))
                break
        if len(found) > 1:
            goals = " and ".join(f"{path_text(goal)} (by {rule!r})" for goal, (rule, _) in found.items())
            problems.append(f"{path_text(path)} would become {goals}")
        goal, (_, place) = next(iter(found.items()), (path, ("", None)))
        moves.append(_Move(node, path, goal, place))
    entries = [path_text(path) for path, _ in items]
    shown = f"{', '.join(entries[:8])}{', ...' if len(entries) > 8 else ''}"
    problems += [
        f"{old!r} fits no entry of the checkpoint; these are {shown}" for old, _, _ in rules if old not in used
    ]
    if problems:
        raise CheckpointError(f"rename={dict(rename)!r} cannot be done:{listing(problems)}")
    return moves


def _expression(old: Any, new: Any) -> re.Pattern[str]:
    """What matches the old path, with a group for each `*`, which takes as little as it can."""
    if type(old) is not str or type(new) is not str:
        raise CheckpointError(f"rename= maps paths to paths, not {old!r} to {new!r}.")
    if old.count("*") != new.count("*") or not all(old.split("/")) or not all(new.split("/")):
        raise CheckpointError(
            f"rename= maps {old!r} to {new!r}; both are paths with the same number of *: each stands for the same text"
            " on both sides, {'model/params/encoder.*': 'model/params/backbone.*'}."
        )
    parts = (re.escape(part) if part != "*" else "(.*?)" for part in re.split(r"(\*)", old))
    return re.compile("".join(parts), re.DOTALL)


def _new_path(old: Path, text: str) -> Path:
    """The path of this text; keys at its end that are those of the old path stay as they are (integers, slashes)."""
    for start in range(len(old)):
        end = path_text(old[start:])
        if text == end:
            return old[start:]
        if text.endswith("/" + end):
            return (*text.removesuffix("/" + end).split("/"), *old[start:])
    return tuple(text.split("/"))


def _check(moves: Sequence[_Move]) -> None:
    """Every name is that of one entry."""
    problems: list[str] = []
    at: dict[str, _Move] = {}
    for move in moves:
        other = at.setdefault(path_text(move.new), move)
        if other is not move:
            problems.append(f"{path_text(other.old)} and {path_text(move.old)} would both become {path_text(move.new)}")
    for move in moves:
        for above in _prefixes(move.new)[:-1]:
            if above in at:
                inside = f"{path_text(move.old)} would become {path_text(move.new)}"
                problems.append(f"{inside}, inside of {path_text(at[above].old)}, which is no container at {above}")
    if problems:
        raise CheckpointError(f"rename= cannot be done:{listing(problems)}")


def _grown(tree: Node | int, moves: Sequence[_Move]) -> Node | int:
    """The tree of these entries."""
    containers = _containers(tree, ())
    origins: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    names: dict[tuple[str, ...], str | int] = {}
    grown: Any = {}
    for move in moves:
        old, new = tuple(map(str, move.old)), tuple(map(str, move.new))
        if not new:
            return move.node
        place = grown
        for part in new[:-1]:
            place = place.setdefault(part, {})
        place[new[-1]] = move.node
        for depth, key in enumerate(move.new, 1):
            if type(key) is int or new[:depth] not in names:
                names[new[:depth]] = key
        for up in range(1, min(len(old), len(new)) + 1):  # see [Note: renaming]
            origins.setdefault(new[:-up], set()).add(old[:-up])
            if new[-up - 1 : -up] != old[-up - 1 : -up]:
                break

    def node(found: Any, path: tuple[str, ...]) -> Node | int:
        if class_of(found) is not dict:
            return found
        known = {(containers[at].kind, containers[at].name) for at in origins.get(path, {path}) if at in containers}
        kind, name = known.pop() if len(known) == 1 else (ANY, "")
        children = {key: node(child, (*path, key)) for key, child in found.items()}
        if kind not in ("list", "tuple"):
            keys = tuple(names[*path, key] for key in children)
            return Node(kind=kind, name=name, keys=keys, children=tuple(children.values()))
        places = [str(index) for index in range(len(children))]
        if set(places) != set(children):
            raise CheckpointError(
                f"rename= leaves the {kind} {path_text(path)} with the places {', '.join(children)}; lists have no"
                " holes. Rename the whole list, or every element."
            )
        return Node(kind=kind, children=tuple(children[place] for place in places))

    return node(grown, ())


def _containers(node: Node | int | None, path: tuple[str, ...]) -> dict[tuple[str, ...], Node]:
    if type(node) is not Node:
        return {}
    keys = node.keys or range(len(node.children))
    below = [_containers(child, (*path, str(key))) for key, child in zip(keys, node.children, strict=True)]
    return {path: node, **{at: inner for one in below for at, inner in one.items()}}
