"""A template meets a manifest: what to read, what to keep, what is missing, what is left over.

The template says what the result is made of. Where it has None, plain containers come back, as without a template.
"""

import dataclasses
from typing import Any

from fabricfn.checkpoint.format.manifest import Leaf, Manifest, Node, class_of, path_text, plain_value
from fabricfn.checkpoint.trees.adapters import Adapter, Types, adapter_of, fields_of, rides
from fabricfn.checkpoint.trees.arrays import identity
from fabricfn.checkpoint.trees.bare import Bare
from fabricfn.checkpoint.trees.matching import (
    fits,
    leaf_of,
    leaf_text,
    mapping_like,
    node_text,
    settled,
    span,
    unfillable,
)
from fabricfn.checkpoint.trees.outline import MAPPINGS, Only, Path, is_state, leaf_paths, selector
from fabricfn.checkpoint.trees.plans import Build, Fit, kept
from fabricfn.checkpoint.trees.riding import state_of
from fabricfn.leases import Place
from fabricfn.world import World

Tree = Node | int | None

FIXED, GROWING, LOOSE = 0, 1, 2
"""Who decides the structure: the template; the checkpoint, but for shapes and dtypes; the checkpoint alone."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a template is filled."""

    world: World
    """The ranks that load."""
    only: Only
    """What is selected; entries of the template that are not are kept."""
    types: Types
    """Of the caller."""
    exact: bool
    """Entries missing in the checkpoint are problems."""
    extras: bool
    """What only the checkpoint has is left over; otherwise it is passed over, and a problem in a record."""
    where: Place | None
    """The place where the template is given away, or None when it is left alone."""


def fit(manifest: Manifest, tree: Tree, like: Any, terms: Terms) -> Fit:
    """Plan the load of `tree`, the selected part of the manifest's tree under its new names, into the shape of `like`.

    `manifest` has the leaves that are meant.
    """
    fitter = _Fitter(manifest.leaves, terms)
    build = fitter.fit(like, tree, (), True)
    if terms.where is not None:
        fitter.check_donated()
    return Fit(
        build=build,
        wants=tuple(fitter.bare.wants),
        missing=tuple(fitter.missing),
        rest=tuple(fitter.rest),
        problems=tuple(fitter.bare.problems),
        claims=tuple(fitter.claims),
        states=tuple(fitter.states),
    )


class _Fitter:
    """Walks template and manifest side by side, and notes what it finds."""

    def __init__(self, leaves: tuple[Leaf, ...], terms: Terms) -> None:
        self.bare, self.leaves, self.terms = Bare(leaves, terms.types), leaves, terms
        self.selected = selector(terms.only)
        self.missing: list[str] = []
        self.rest: list[tuple[Path, Build]] = []
        self.claims: list[tuple[Adapter, Any]] = []
        self.states: list[tuple[Path, Any, Build]] = []

    def fit(self, like: Any, node: Tree, path: Path, top: bool, free: int = FIXED) -> Build:
        """The build of one place. `top`: not inside a record; `free`: who decides the structure."""
        if node is None:
            return kept(like)
        if like is None:
            return self.bare.plain(node, path)
        if rides(like, self.terms.types):
            return self.state(like, node, path)
        kind, adapter = class_of(like), adapter_of(like, self.terms.types)
        fields: Any = like if adapter is None else fields_of(adapter, like, path)
        sort = "record" if adapter else "dict" if kind in MAPPINGS else kind.__name__ if kind in (list, tuple) else ""
        if sort:
            node = settled(node, sort, adapter.tag if adapter else "", fields)
        if free and sort != ("" if type(node) is int else node.kind if type(node) is Node else ""):
            return self.bare.plain(node, path)
        if not sort:
            return self.leaf(like, node, path, free)
        if type(node) is not Node or node.kind != sort:
            there = node_text(node, self.leaves)
            return self.bare.problem(path, f"the template has a {kind.__name__}, the checkpoint {there}")
        if adapter is not None:
            return self.record(adapter, like, fields, node, path)
        if sort == "dict":
            return self.mapping(like, node, path, top, free)
        return self.sequence(like, node, path, top, free)

    def state(self, like: Any, node: Tree, path: Path) -> Build:
        """An object that is given its state when everything has been read; it is itself in the result."""
        name = class_of(like).__name__
        fields = dict(zip(node.keys, node.children, strict=True)) if is_state(node) and type(node) is Node else {}
        by_rank, shaped = fields.get("states_by_rank"), fields.get("plain_containers")
        if type(by_rank) is not Node or not by_rank.children or type(shaped) is not int:
            there = node_text(node, self.leaves)
            return self.bare.problem(
                path, f"the template has a {name}, which is given a state, the checkpoint has {there}"
            )
        states, world = by_rank.children, self.terms.world
        if len(states) not in (1, world.world_size):
            return self.bare.problem(
                path,
                f"each of {len(states)} ranks saved a position of its own, but {world.world_size} load. Use as many"
                " ranks; or save a Cursor instead, which holds at any world size",
            )
        model = None if plain_value(self.leaves[shaped]) else state_of(like, path)
        self.states.append((path, like, self.bare.plain(states[world.rank % len(states)], path, model)))
        return Build(make=lambda _: like)

    def items(self, like: Any, node: Node, path: Path, top: bool, free: int) -> dict[Any, Build]:
        """The builds of the entries of a mapping, in the template's order."""
        children = dict(zip(node.keys, node.children, strict=True))
        found: dict[Any, Build] = {}
        for key, item in like.items():
            if key in children:
                found[key] = self.fit(item, children[key], (*path, key), top, free)
            elif self.left_out(item, (*path, key)):
                found[key] = kept(item)
            elif not free:
                found[key] = self.absent(item, (*path, key))
        if not free:
            self.further(like, node, path, top)
            return found
        more = {key: self.bare.plain(child, (*path, key)) for key, child in children.items() if key not in like}
        return {key: {**found, **more}[key] for key in (*children, *found)}

    def further(self, like: Any, node: Node, path: Path, top: bool, optional: frozenset[str] = frozenset()) -> None:
        """Note the entries that only the checkpoint has."""
        for key, child in zip(node.keys, node.children, strict=True):
            if key in like:
                continue
            if self.terms.extras:
                self.rest.append(((*path, key), self.bare.plain(child, (*path, key))))
            elif not top and key not in optional:
                self.bare.problem((*path, key), "is in the checkpoint, not in the template")

    def left_out(self, item: Any, path: Path) -> bool:
        """Whether `only` selects nothing of this entry of the template."""
        return self.terms.only is not None and not any(map(self.selected, leaf_paths(item, path, self.terms.types)))

    def absent(self, item: Any, path: Path, optional: bool = False) -> Build:
        self.missing.append(path_text(path))
        if self.terms.exact and not optional:
            return self.bare.problem(path, "is in the template, not in the checkpoint")
        return kept(item)

    def mapping(self, like: Any, node: Node, path: Path, top: bool, free: int) -> Build:
        items = self.items(like, node, path, top, free)
        keys, parts = tuple(items), tuple(items.values())
        if parts and all(part.kept for part in parts):
            return kept(like)
        return Build(make=lambda values: mapping_like(like, dict(zip(keys, values, strict=True))), parts=parts)

    def record(self, adapter: Adapter, like: Any, fields: dict[Any, Any], node: Node, path: Path) -> Build:
        if node.name != adapter.tag:
            return self.bare.problem(path, f"the template has a {adapter.tag}, the checkpoint a {node.name}")
        self.bare.placed |= {(*path, *place): beside for place, beside in adapter.placed(like).items()}
        if adapter.cls is not None:
            found = self.items(fields, node, path, False, LOOSE)
        else:
            found = self.fields(adapter, fields, node, path)
        if found and all(part.kept for part in found.values()):
            return kept(like)
        if self.terms.where is not None:
            self.claims.append((adapter, like))
        return self.bare.made(adapter, like, tuple(found), tuple(found.values()), path, self.terms.where)

    def fields(self, adapter: Adapter, fields: dict[Any, Any], node: Node, path: Path) -> dict[Any, Build]:
        children = dict(zip(node.keys, node.children, strict=True))
        found: dict[Any, Build] = {}
        for key, item in fields.items():
            if key in children:
                free = GROWING if key in adapter.free else FIXED
                found[key] = self.fit(item, children[key], (*path, key), False, free)
            elif self.left_out(item, (*path, key)):
                found[key] = kept(item)
            else:
                found[key] = self.absent(item, (*path, key), key in adapter.optional)
        self.further(fields, node, path, False, adapter.optional)
        return found

    def sequence(self, like: Any, node: Node, path: Path, top: bool, free: int) -> Build:
        if len(like) != len(node.children):
            if free:
                return self.bare.plain(node, path)
            text = f"the template has {len(like)} elements, the checkpoint {len(node.children)}"
            return self.bare.problem(path, text)
        pairs = enumerate(zip(like, node.children, strict=True))
        parts = tuple(self.fit(item, child, (*path, index), top, free) for index, (item, child) in pairs)
        if parts and all(part.kept for part in parts):
            return kept(like)
        return Build(make=list if type(like) is list else tuple, parts=parts)

    def leaf(self, like: Any, node: Tree, path: Path, free: int) -> Build:
        expected = leaf_of(like)
        if type(expected) is str:
            return self.bare.problem(path, expected)
        assert type(expected) is Leaf
        if type(node) is not int:
            return self.bare.problem(
                path, f"the template has {leaf_text(expected)}, the checkpoint {node_text(node, self.leaves)}"
            )
        found = self.leaves[node]
        if not fits(found, expected):
            if free == LOOSE:
                return self.bare.plain(node, path)
            return self.bare.problem(path, f"the template has {leaf_text(expected)}, the checkpoint {leaf_text(found)}")
        return self.bare.want(node, like, path)

    def check_donated(self) -> None:
        """Memory that is filled can hold one array only."""
        filled: dict[Any, int] = {}
        spans: dict[Any, tuple[tuple[str, int, int], Path]] = {}
        for want in self.bare.wants:
            place, leaf = identity(want.like), self.leaves[want.leaf]
            base = want.leaf if leaf.alias is None else leaf.alias
            if place is not None and filled.setdefault(place, base) != base:
                self.bare.problem(want.path, "the template has one tensor at two places, the checkpoint two; clone it")
            text = unfillable(want.like)
            if text and not want.standing_in:
                self.bare.problem(want.path, f"donate=True cannot fill {text}")
            where = span(want.like)
            if where is not None:
                spans[place] = where, want.path
        self.check_apart(list(spans.values()))

    def check_apart(self, spans: list[tuple[tuple[str, int, int], Path]]) -> None:
        """Two arrays that share some memory cannot both be filled."""
        before: tuple[str, int, Path] = "", 0, ()
        for (device, begin, end), path in sorted(spans, key=lambda item: item[0]):
            if device == before[0] and begin < before[1]:
                text = f"donate=True cannot fill it, as it shares memory with {path_text(before[2])}; clone it"
                self.bare.problem(path, text)
            if device != before[0] or end > before[1]:
                before = device, end, path
