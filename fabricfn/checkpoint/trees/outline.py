"""A tree as a checkpoint sees it: an outline of containers, and numbered leaves with their paths."""

import collections
import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fabricfn.checkpoint.format.manifest import (
    ARRAYS,
    DEPTH_LIMIT,
    SURROGATES,
    Leaf,
    Node,
    class_of,
    path_text,
    paths_of,
    plain_leaf,
)
from fabricfn.checkpoint.trees.adapters import OBJECT_STATE, Types, adapter_of, fields_of, rides
from fabricfn.checkpoint.trees.arrays import advice, array_leaf, identity
from fabricfn.errors import CheckpointError

Path = tuple[str | int, ...]
Only = str | Sequence[str] | Callable[[str], bool] | None
"""Which entries: a path, a pattern, several of them, or a predicate of the path of a leaf; None is all."""

MAPPINGS: tuple[type, ...] = (
    *(dict, collections.OrderedDict, collections.defaultdict, collections.Counter),
    MappingProxyType,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The containers of a tree, and its leaves by number."""

    tree: Node | int
    values: tuple[Any, ...]
    paths: tuple[Path, ...]


def outline(tree: Any, only: Only, types: Types, states: Mapping[int, Any]) -> Outline:
    """The outline of a tree, or of the part of it that `only` selects.

    Args:
        tree: any tree.
        only: what is selected.
        types: of the caller.
        states: id of an object -> what stands for it.
    """
    values: list[Any] = []
    whole = _Walk(types, states, values).node(tree, ())
    paths = paths_of(whole)
    kept = prune(whole, only) if only is not None else whole
    if kept is None:
        raise nothing_selected(only, whole)
    idle = idle_patterns(only, whole)
    if idle:
        raise nothing_selected(idle, whole)
    numbers = {old: new for new, old in enumerate(paths_of(kept))}
    return Outline(
        tree=_renumbered(kept, numbers, ()),
        values=tuple(values[old] for old in numbers),
        paths=tuple(paths[old] for old in numbers),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Walk:
    types: Types
    states: Mapping[int, Any]
    values: list[Any]

    def node(self, value: Any, path: Path) -> Node | int:
        if len(path) > DEPTH_LIMIT:
            raise CheckpointError(
                f"{path_text(path[:6])}/... is nested deeper than {DEPTH_LIMIT} containers; does a container hold"
                " itself?"
            )
        if self.states:
            value = self.states.get(id(value), value)
        if rides(value, self.types):
            return self.leaf(value)
        kind = class_of(value)
        adapter = adapter_of(value, self.types)
        if adapter is not None or kind in MAPPINGS:
            items: dict[Any, Any] = dict(value) if adapter is None else fields_of(adapter, value, path)
            for key in items:
                whole = type(key) is int and abs(key) < 1 << 62
                if not whole and (type(key) is not str or SURROGATES.search(key)):
                    raise CheckpointError(
                        f"{path_text(path)} has the key {key!r}; keys are strings or integers. Write str(key)."
                    )
            children = tuple(self.node(item, (*path, key)) for key, item in items.items())
            if adapter is None:
                return Node(kind="dict", keys=tuple(items), children=children)
            return Node(kind="record", name=adapter.tag, keys=tuple(items), children=children)
        if kind is list or kind is tuple:
            children = tuple(self.node(item, (*path, index)) for index, item in enumerate(value))
            return Node(kind=kind.__name__, children=children)
        return self.leaf(value)

    def leaf(self, value: Any) -> int:
        self.values.append(value)
        return len(self.values) - 1


def leaf_paths(tree: Any, path: Path, types: Types) -> list[Path]:
    """The paths of the leaves of a tree that stands at `path`."""
    return [(*path, *below) for below in paths_of(_Walk(types, {}, []).node(tree, ())).values()]


def _renumbered(node: Node | int | None, numbers: dict[int, int], path: Path) -> Node | int:
    if node is None:
        raise CheckpointError(
            f"only= leaves out {path_text(path)}, one element of a list; lists are stored whole or not at all. Name the"
            f" list: only=({path_text(path[:-1])!r},)."
        )
    if type(node) is int:
        return numbers[node]
    assert type(node) is Node
    keys = node.keys or range(len(node.children))
    children = (_renumbered(child, numbers, (*path, key)) for key, child in zip(keys, node.children, strict=True))
    return dataclasses.replace(node, children=tuple(children))


def patterns_of(only: Only) -> tuple[str, ...]:
    """The patterns of a selection; none when it is everything, or a predicate."""
    if only is None or callable(only):
        return ()
    return (only,) if isinstance(only, str) else tuple(only)


def idle_patterns(only: Only, tree: Node | int) -> tuple[str, ...]:
    """The patterns that select nothing of a tree."""
    patterns = patterns_of(only)
    return tuple(one for one in patterns if len(patterns) > 1 and prune(tree, one) is None)


def is_state(node: Node | int | None) -> bool:
    """Whether it is what was stored of an object with a state of its own; that is one entry, whole or not at all."""
    return type(node) is Node and node.kind == "record" and node.name == OBJECT_STATE


def selector(only: Only) -> Callable[[Path], bool]:
    """Whether a path is selected: it, or a container that it is in, fits one of the patterns."""
    if only is None:
        return lambda path: True
    if callable(only):
        return lambda path: bool(only(path_text(path)))
    patterns = patterns_of(only)

    def selected(path: Path) -> bool:
        texts = [path_text(path[: i + 1]) for i in range(len(path))] or ["."]
        return any(text == pattern or fnmatch.fnmatchcase(text, pattern) for text in texts for pattern in patterns)

    return selected


def prune(tree: Node | int | None, only: Only) -> Node | int | None:
    """The part of a tree that `only` selects; None when that is nothing. Left out elements of a list become None."""
    selected = selector(only)

    def walk(node: Node | int | None, path: Path) -> Node | int | None:
        if node is None or type(node) is int or is_state(node):
            return node if selected(path) else None
        assert type(node) is Node
        if not node.children:
            return node if selected(path) else None
        keys = node.keys or tuple(range(len(node.children)))
        kept = [(key, walk(child, (*path, key))) for key, child in zip(keys, node.children, strict=True)]
        if all(child is None for _, child in kept):
            return None
        if node.keys:
            kept = [(key, child) for key, child in kept if child is not None]
            return dataclasses.replace(
                node, keys=tuple(key for key, _ in kept), children=tuple(child for _, child in kept)
            )
        return dataclasses.replace(node, children=tuple(child for _, child in kept))

    return walk(tree, ())


def nothing_selected(only: Only, tree: Node | int) -> CheckpointError:
    """The error when a selection is empty."""
    entries = [path_text(path) for path in paths_of(tree).values()]
    return CheckpointError(
        f"only={only!r} selects nothing; a pattern is a path or a container's path, with * for any text. The entries"
        f" are {', '.join(entries[:8]) or 'none'}{', ...' if len(entries) > 8 else ''}."
    )


def leaves_of(plan: Outline, host: bool) -> tuple[Leaf, ...]:
    """The leaves of an outline, their pieces still to be written; the same memory is one leaf and its aliases.

    Raises:
        CheckpointError: some values cannot be stored; one message names all of them and what to write.
    """
    found: list[Leaf] = []
    first: dict[Any, int] = {}
    problems: list[str] = []
    for index, (path, value) in enumerate(zip(plan.paths, plan.values, strict=True)):
        leaf = plain_leaf(value) or array_leaf(value, host) or advice(value)
        if type(leaf) is str:
            problems.append(f"{path_text(path)}: {leaf}")
            continue
        assert type(leaf) is Leaf
        same = identity(value) if leaf.kind in ARRAYS else None
        alias = None if same is None else first.setdefault(same, index)
        found.append(leaf if alias is None or alias == index else dataclasses.replace(leaf, alias=alias))
    if problems:
        raise CheckpointError(f"these entries cannot be stored:{listing(problems)}")
    return tuple(found)


def places(problems: Sequence[str]) -> str:
    """How many there are, as messages have it."""
    return f"{len(problems)} place{'s' if len(problems) > 1 else ''}"


def listing(lines: Sequence[str]) -> str:
    """Lines of a message, at most twenty."""
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "".join(f"\n  {line}" for line in [*lines[:20], *more])
