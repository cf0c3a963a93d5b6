"""What a checkpoint has, as it has it: plain containers and leaves, where no template says more."""

from typing import Any

from fabricfn.checkpoint.format.manifest import Leaf, Node, class_of, path_text
from fabricfn.checkpoint.trees.adapters import Adapter, Types, adapter_of, fields_of, record_from
from fabricfn.checkpoint.trees.matching import mapping_like
from fabricfn.checkpoint.trees.outline import MAPPINGS, Path
from fabricfn.checkpoint.trees.placements import hollow_like
from fabricfn.checkpoint.trees.plans import Build, Want, kept
from fabricfn.leases import Place


class Bare:
    """Collects what shall be read, and what is wrong."""

    def __init__(self, leaves: tuple[Leaf, ...], types: Types) -> None:
        self.leaves, self.types, self.by_tag = leaves, types, {adapter.tag: adapter for adapter in types.values()}
        self.wants: list[Want] = []
        self.problems: list[str] = []
        self.placed: dict[Path, Any] = {}

    def want(self, leaf: int, like: Any, path: Path, standing_in: bool = False) -> Build:
        """The build of one leaf, which shall be read."""
        self.wants.append(Want(leaf=leaf, like=like, path=path, standing_in=standing_in))
        return Build(want=len(self.wants) - 1)

    def problem(self, path: Path, text: str) -> Build:
        """Note what is wrong at a path."""
        self.problems.append(f"{path_text(path) if path else 'the whole tree'}: {text}")
        return kept(None)

    def plain(self, node: Node | int | None, path: Path, like: Any = None) -> Build:
        """Dicts, lists, tuples and leaves as the checkpoint has them; in the containers of `like`, where they agree."""
        if type(node) is int:
            beside, leaf = self.placed.get(path[:-1]), self.leaves[node]
            if beside is not None and leaf.kind == "tensor" and leaf.shape == tuple(beside.shape):
                return self.want(node, hollow_like(beside, leaf.dtype), path, standing_in=True)
            return self.want(node, None, path)
        if node is None:
            return self.problem(path, "only= leaves out an element of this list. Name the whole list")
        assert type(node) is Node
        adapter = adapter_of(like, self.types)
        if adapter is None or node.kind != "record" or adapter.tag != node.name:
            adapter = self.by_tag.get(node.name) if node.kind == "record" else None
            like = None if node.kind == "record" else like
        inner: Any = {} if like is None else fields_of(adapter, like, path) if adapter else like
        keys = node.keys or tuple(range(len(node.children)))
        if class_of(inner) in MAPPINGS:
            beneath = [inner.get(key) for key in keys]
        else:
            beneath = [*inner, *[None] * len(keys)] if class_of(inner) in (list, tuple) else [None] * len(keys)
        places = zip(keys, node.children, beneath, strict=False)
        parts = tuple(self.plain(child, (*path, key), below) for key, child, below in places)
        if node.kind in ("list", "tuple"):
            return Build(make=list if node.kind == "list" else tuple, parts=parts)
        if adapter is not None and (adapter.cls is not None or set(inner) == set(keys)):
            return self.made(adapter, like, keys, parts, path, None)
        model: Any = like if class_of(like) in MAPPINGS else {}
        return Build(make=lambda values: mapping_like(model, dict(zip(keys, values, strict=True))), parts=parts)

    def made(
        self,
        adapter: Adapter,
        like: Any,
        keys: tuple[Any, ...],
        parts: tuple[Build, ...],
        path: Path,
        where: Place | None,
    ) -> Build:
        """A record of these fields."""
        return Build(
            make=lambda values: record_from(adapter, like, dict(zip(keys, values, strict=True)), where, path),
            parts=parts,
        )
