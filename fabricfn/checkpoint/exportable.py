"""The tensors of a checkpoint, ours or another tool's, under the names that other tools want. Nothing is read yet."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fabricfn.checkpoint.foreign.dcp import whole_tree
from fabricfn.checkpoint.foreign.kinds import is_foreign
from fabricfn.checkpoint.foreign.names import candidates, is_state_dict
from fabricfn.checkpoint.foreign.places import opened_raw
from fabricfn.checkpoint.foreign.values import Refused, Stored, leaves, settled
from fabricfn.checkpoint.format.manifest import ARRAYS, DTYPES, Node, array_bytes, path_text
from fabricfn.checkpoint.format.pieces import Source
from fabricfn.checkpoint.storage.objects import Options, unresolved
from fabricfn.checkpoint.storage.opening import opened
from fabricfn.checkpoint.trees.outline import (
    Only,
    Path as Keys,
    listing,
    nothing_selected,
    patterns_of,
    prune,
    selector,
)
from fabricfn.checkpoint.trees.reading import read_parts, torch_dtype
from fabricfn.errors import CheckpointError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of an export."""

    name: str
    stored: Stored
    path: str
    """In the checkpoint, for messages."""

    @property
    def dtype(self) -> str:
        """As torch names it."""
        return str(self.stored.dtype).removeprefix("torch.")

    @property
    def size(self) -> int:
        """Its bytes."""
        return array_bytes(self.dtype, self.stored.shape)


def exportable(path: str | os.PathLike[str], only: Only, stack: contextlib.ExitStack, options: Options) -> list[Tensor]:
    """The tensors of an export of what `save`, or another tool, wrote; files stay open as long as `stack`.

    Raises:
        CheckpointError: as in `consolidate`.
    """
    if not is_foreign(path):
        return chosen(stack.enter_context(opened(path, options=options)), only)
    place = unresolved(path)
    return chosen_raw(whole_tree(opened_raw(place, stack)), only, place)


def chosen(source: Source, only: Only, where: str = "") -> list[Tensor]:
    """The tensors of an export of ours.

    Raises:
        CheckpointError: there are none, two have one name, or one cannot be written.
    """
    whole, where = source.manifest.tree, where or str(source.path)
    tree = prune(whole, only)
    if tree is None:
        raise nothing_selected(only, whole)
    models = list(_models(tree, ()))
    if not models and only is None:
        raise CheckpointError(
            f"{where} holds no Model; say which entries are meant: ff.consolidate(path, target, only='...'). The"
            f" checkpoint has {', '.join(_heads(whole)) or 'a single leaf'}."
        )
    named: list[tuple[str, Keys, int]] = []
    for keys, fields in models:
        named += [
            (_head(keys, models) + str(place[1]), (*keys, *place), leaf)
            for place, leaf in _leaves(fields, ())
            if place[0] in _OURS
        ]
    if not models:
        named = _relative(list(_leaves(tree, ())))
    return _tensors([(name, keys, stored(source, number)) for name, keys, number in named], where)


def chosen_raw(tree: Any, only: Only, file: Path) -> list[Tensor]:
    """The tensors of an export of another tool's file or folder: its state dicts, or what `only` selects."""
    if only is not None:
        selected = selector(only)
        items = [(keys, settled(item)) for keys, item in leaves(tree) if selected(keys)]
        if not items:
            raise CheckpointError(f"{file}: only={patterns_of(only) or only!r} selects nothing.")
        return _tensors(_relative(items), str(file))
    states = candidates(tree, is_state_dict)
    if not states:
        raise CheckpointError(
            f"{file} holds no state dict, name -> tensor; say which entries are meant: only='...'. fabricfn inspect"
            " shows them."
        )
    named = [
        (_head(keys, states) + name, (*keys, name), item) for keys, found in states for name, item in found.items()
    ]
    return _tensors(named, str(file))


def stored(source: Source, number: int) -> Stored | None:
    """A leaf that is an array, wherever its pieces are; None for a plain value."""
    leaf = source.manifest.leaves[number]
    if leaf.kind not in ARRAYS:
        return None
    number = number if leaf.alias is None else leaf.alias
    base = source.manifest.leaves[number]
    fill = functools.partial(read_parts, source, base)
    return Stored(dtype=torch_dtype(leaf), shape=leaf.shape, file=Path(source.path), fill=fill, same=number)


def _tensors(named: Sequence[tuple[str, Keys, Any]], where: str) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, keys, item in named:
        if type(item) is Refused:
            problems.append(f"{path_text(keys)}: {item.text}")
        if type(item) is not Stored:
            continue
        if name in found:
            problems.append(f"{path_text(keys)}: the name {name} is that of {found[name].path}, too")
        found[name] = Tensor(name=name, stored=item, path=path_text(keys))
        if found[name].dtype not in DTYPES:
            problems.append(f"{path_text(keys)}: not every safetensors reads the dtype {found[name].dtype}")
    if problems:
        raise CheckpointError(
            f"{where} cannot be written for other tools; leave out what is meant by only=:{listing(problems)}"
        )
    if not found:
        raise CheckpointError(f"{where}: what is selected has no tensors.")
    return list(found.values())


_OURS = ("params", "buffers")


def _models(node: Node | int | None, keys: Keys) -> Iterator[tuple[Keys, Node]]:
    """(path, record) of the Models of a tree."""
    if type(node) is not Node:
        return
    if node.kind == "record" and node.name == "Model":
        yield keys, node
        return
    for key, child in _children(node):
        yield from _models(child, (*keys, key))


def _leaves(node: Node | int | None, keys: Keys) -> Iterator[tuple[Keys, int]]:
    if type(node) is int:
        yield keys, node
    elif type(node) is Node:
        for key, child in _children(node):
            yield from _leaves(child, (*keys, key))


def _children(node: Node) -> Iterator[tuple[str | int, Any]]:
    return zip(node.keys or range(len(node.children)), node.children, strict=True)


def _heads(node: Node | int) -> list[str]:
    return [str(key) for key, _ in _children(node)][:8] if type(node) is Node else []


def _head(keys: Keys, states: Sequence[Any]) -> str:
    """What comes before the names of one of several models."""
    return ".".join(map(str, keys)) + "." if len(states) > 1 and keys else ""


def _relative(items: Sequence[tuple[Keys, T]]) -> list[tuple[str, Keys, T]]:
    """Named by the path below what all have in common."""
    heads = [keys[:-1] for keys, _ in items]
    shared = 0
    while heads and all(len(head) > shared and head[shared] == heads[0][shared] for head in heads):
        shared += 1
    return [(".".join(map(str, keys[shared:])) or "value", keys, item) for keys, item in items]
