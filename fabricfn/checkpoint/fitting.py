"""A template meets a manifest: what to read, what to keep, what is missing, what is left over. Plain data.

The template says what the result is made of. Where it has None, plain containers come back, as without a template.
"""

import collections
import copy
import dataclasses
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from fabricfn.checkpoint.adapters import Adapter, adapter_of
from fabricfn.checkpoint.arrays import identity
from fabricfn.checkpoint.manifest import Leaf, Manifest, Node, class_of, path_text
from fabricfn.checkpoint.matching import fits, leaf_of, leaf_text, node_text, unfillable
from fabricfn.checkpoint.outline import MAPPINGS, Only, Path, leaf_paths, selector
from fabricfn.checkpoint.placements import hollow_like
from fabricfn.leases import Place

Tree = Node | int | None


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


def built(build: Build, values: list[Any]) -> Any:
    """The value, from the values of all wanted leaves."""
    if build.want >= 0:
        return values[build.want]
    return build.make([built(part, values) for part in build.parts])


def fit(
    manifest: Manifest, tree: Tree, like: Any, *, only: Only, exact: bool, extras: bool, where: Place | None
) -> Fit:
    """Plan the load of `tree`, the selected part of the manifest's tree, into the shape of `like`.

    Args:
        manifest: whose leaves are meant.
        tree: its tree, pruned by `only`.
        like: the template, or None.
        only: what is selected; entries of the template that are not are kept.
        exact: entries missing in the checkpoint are problems.
        extras: entries of a record that only the checkpoint has are left over; otherwise they are problems.
        where: the place where the template is given away, or None when it is left alone.
    """
    fitter = _Fitter(manifest, only, exact, extras, where)
    build = fitter.fit(like, tree, (), True)
    if where is not None:
        fitter.check_donated()
    return Fit(
        build=build,
        wants=tuple(fitter.wants),
        missing=tuple(fitter.missing),
        rest=tuple(fitter.rest),
        problems=tuple(fitter.problems),
        claims=tuple(fitter.claims),
    )


def _keep(value: Any) -> Build:
    return Build(make=lambda _: value, kept=True)


class _Fitter:
    """Walks template and manifest side by side, and notes what it finds."""

    def __init__(self, manifest: Manifest, only: Only, exact: bool, extras: bool, where: Place | None) -> None:
        self.leaves, self.exact, self.extras, self.where = manifest.leaves, exact, extras, where
        self.only, self.selected = only, selector(only)
        self.wants: list[Want] = []
        self.missing: list[str] = []
        self.rest: list[tuple[Path, Build]] = []
        self.problems: list[str] = []
        self.claims: list[tuple[Adapter, Any]] = []
        self.placed: dict[Path, Any] = {}

    def want(self, leaf: int, like: Any, path: Path, standing_in: bool = False) -> Build:
        self.wants.append(Want(leaf=leaf, like=like, path=path, standing_in=standing_in))
        return Build(want=len(self.wants) - 1)

    def problem(self, path: Path, text: str) -> Build:
        self.problems.append(f"{path_text(path)}: {text}")
        return _keep(None)

    def fit(self, like: Any, node: Tree, path: Path, top: bool, free: bool = False) -> Build:
        """The build of one place. `top`: not inside a record; `free`: the checkpoint decides the structure."""
        if node is None:
            return _keep(like)
        if like is None:
            return self.plain(node, path)
        kind = class_of(like)
        adapter = adapter_of(like)
        sort = "record" if adapter else "dict" if kind in MAPPINGS else kind.__name__ if kind in (list, tuple) else ""
        if free and sort != ("" if type(node) is int else node.kind if type(node) is Node else ""):
            return self.plain(node, path)
        if not sort:
            return self.leaf(like, node, path)
        if type(node) is not Node or node.kind != sort:
            there = node_text(node, self.leaves)
            return self.problem(path, f"the template has a {kind.__name__}, the checkpoint {there}")
        if adapter is not None:
            return self.record(adapter, like, node, path)
        if sort == "dict":
            return self.mapping(like, node, path, top, free)
        return self.sequence(like, node, path, top, free)

    def plain(self, node: Tree, path: Path) -> Build:
        """Dicts, lists, tuples and leaves as the checkpoint has them."""
        if type(node) is int:
            beside, leaf = self.placed.get(path[:-1]), self.leaves[node]
            if beside is not None and leaf.kind == "tensor" and leaf.shape == tuple(beside.shape):
                return self.want(node, hollow_like(beside, leaf.dtype), path, standing_in=True)
            return self.want(node, None, path)
        if node is None:
            return self.problem(path, "only= leaves out an element of this list. Name the whole list")
        assert type(node) is Node
        keys = node.keys or tuple(range(len(node.children)))
        parts = tuple(self.plain(child, (*path, key)) for key, child in zip(keys, node.children, strict=True))
        if node.kind in ("list", "tuple"):
            return Build(make=list if node.kind == "list" else tuple, parts=parts)
        return Build(make=lambda values: dict(zip(node.keys, values, strict=True)), parts=parts)

    def items(self, like: Any, node: Node, path: Path, top: bool, free: bool) -> dict[Any, Build]:
        """The builds of the entries of a mapping, in the template's order."""
        children = dict(zip(node.keys, node.children, strict=True))
        found: dict[Any, Build] = {}
        for key, item in like.items():
            if key in children:
                found[key] = self.fit(item, children[key], (*path, key), top, free)
            elif self.left_out(item, (*path, key)):
                found[key] = _keep(item)
            elif not free:
                found[key] = self.absent(item, (*path, key))
        if not free:
            self.further(like, node, path, top)
            return found
        more = {key: self.plain(child, (*path, key)) for key, child in children.items() if key not in like}
        return {key: {**found, **more}[key] for key in (*children, *found)}

    def further(self, like: Any, node: Node, path: Path, top: bool, optional: frozenset[str] = frozenset()) -> None:
        """Note the entries that only the checkpoint has."""
        for key, child in zip(node.keys, node.children, strict=True):
            if key in like:
                continue
            if self.extras:
                self.rest.append(((*path, key), self.plain(child, (*path, key))))
            elif not top and key not in optional:
                self.problem((*path, key), "is in the checkpoint, not in the template")

    def left_out(self, item: Any, path: Path) -> bool:
        """Whether `only` selects nothing of this entry of the template."""
        return self.only is not None and not any(map(self.selected, leaf_paths(item, path)))

    def absent(self, item: Any, path: Path, optional: bool = False) -> Build:
        self.missing.append(path_text(path))
        if self.exact and not optional:
            return self.problem(path, "is in the template, not in the checkpoint")
        return _keep(item)

    def mapping(self, like: Any, node: Node, path: Path, top: bool, free: bool) -> Build:
        items = self.items(like, node, path, top, free)
        keys, parts = tuple(items), tuple(items.values())
        if parts and all(part.kept for part in parts):
            return _keep(like)
        return Build(make=lambda values: _mapping(like, dict(zip(keys, values, strict=True))), parts=parts)

    def record(self, adapter: Adapter, like: Any, node: Node, path: Path) -> Build:
        if node.name != adapter.tag:
            return self.problem(path, f"the template has a {adapter.tag}, the checkpoint a {node.name}")
        fields = adapter.to_tree(like)
        self.placed |= {(*path, *place): beside for place, beside in adapter.placed(like).items()}
        children = dict(zip(node.keys, node.children, strict=True))
        found: dict[str, Build] = {}
        for key, item in fields.items():
            if key in children:
                found[key] = self.fit(item, children[key], (*path, key), False, key in adapter.free)
            elif self.left_out(item, (*path, key)):
                found[key] = _keep(item)
            else:
                found[key] = self.absent(item, (*path, key), key in adapter.optional)
        self.further(fields, node, path, False, adapter.optional)
        if found and all(part.kept for part in found.values()):
            return _keep(like)
        keys, where = tuple(found), self.where
        if where is not None:
            self.claims.append((adapter, like))
        make: Callable[[list[Any]], Any] = lambda values: adapter.from_tree(  # noqa: E731
            like, dict(zip(keys, values, strict=True)), where
        )
        return Build(make=make, parts=tuple(found.values()))

    def sequence(self, like: Any, node: Node, path: Path, top: bool, free: bool) -> Build:
        if len(like) != len(node.children):
            if free:
                return self.plain(node, path)
            text = f"the template has {len(like)} elements, the checkpoint {len(node.children)}"
            return self.problem(path, text)
        pairs = enumerate(zip(like, node.children, strict=True))
        parts = tuple(self.fit(item, child, (*path, index), top, free) for index, (item, child) in pairs)
        if parts and all(part.kept for part in parts):
            return _keep(like)
        return Build(make=list if type(like) is list else tuple, parts=parts)

    def leaf(self, like: Any, node: Tree, path: Path) -> Build:
        expected = leaf_of(like)
        if type(expected) is str:
            return self.problem(path, expected)
        assert type(expected) is Leaf
        if type(node) is not int:
            return self.problem(path, f"the template has {leaf_text(expected)}, the checkpoint a container")
        found = self.leaves[node]
        if not fits(found, expected):
            return self.problem(path, f"the template has {leaf_text(expected)}, the checkpoint {leaf_text(found)}")
        return self.want(node, like, path)

    def check_donated(self) -> None:
        """Memory that is filled can hold one array only."""
        filled: dict[Any, int] = {}
        for want in self.wants:
            place, leaf = identity(want.like), self.leaves[want.leaf]
            base = want.leaf if leaf.alias is None else leaf.alias
            if place is not None and filled.setdefault(place, base) != base:
                self.problem(want.path, "the template has one tensor at two places, the checkpoint two; clone it")
            text = unfillable(want.like)
            if text and not want.standing_in:
                self.problem(want.path, f"donate=True cannot fill {text}")


def _mapping(like: Any, items: dict[Any, Any]) -> Any:
    """`items` in a mapping of the class of `like`."""
    if type(like) is dict:
        return items
    if type(like) is MappingProxyType:
        return MappingProxyType(items)
    if type(like) is collections.defaultdict:
        return collections.defaultdict(like.default_factory, items)
    made = copy.copy(like)  # keeps what a state_dict has besides its items
    made.clear()
    made.update(items)
    return made
