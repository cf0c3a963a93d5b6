"""Which leaf of a checkpoint may stand where the template has a leaf, and how messages name the two."""

import collections
import copy
import dataclasses
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from fabricfn.checkpoint.format.manifest import ANY, ARRAYS, Leaf, Node, plain_leaf
from fabricfn.checkpoint.trees.arrays import advice, array_leaf, shard_fault
from fabricfn.checkpoint.trees.placements import local_tensor
from fabricfn.sharding import is_sharded


def leaf_of(like: Any) -> Leaf | str:
    """What the template expects; or what is wrong with it. A tensor on the meta device stands for one with values."""
    if isinstance(like, torch.Tensor) and like.is_meta:
        fault = shard_fault(like) if is_sharded(like) else ""
        return fault or Leaf(kind="tensor", dtype=str(like.dtype).removeprefix("torch."), shape=tuple(like.shape))
    return plain_leaf(like) or array_leaf(like, False) or advice(like)


def fits(found: Leaf, expected: Leaf) -> bool:
    """Arrays have the same kind, dtype and shape; numbers and other plain values may stand for each other."""
    if _sort(found) != _sort(expected):
        return False
    return _sort(found) == "plain" or (found.dtype, found.shape) == (expected.dtype, expected.shape)


def _sort(leaf: Leaf) -> str:
    return leaf.kind if leaf.kind in ("tensor", "array") else "plain"


def leaf_text(leaf: Leaf) -> str:
    """A leaf as messages name it: "a tensor float32[2, 3]"."""
    if leaf.kind in ARRAYS:
        return f"a {leaf.kind} {leaf.dtype}{list(leaf.shape)}"
    return f"a plain value ({leaf.kind})"


def node_text(node: Node | int | None, leaves: tuple[Leaf, ...]) -> str:
    """A place of a checkpoint's tree as messages name it."""
    if type(node) is int:
        return leaf_text(leaves[node])
    if type(node) is not Node:
        return "nothing"
    names = [str(key) for key in node.keys]
    holds = f" of {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else ""
    return f"a {node.kind}{' ' * bool(node.name)}{node.name}{holds}"


def settled(node: Node | int | None, sort: str, tag: str, fields: Any) -> Node | int | None:
    """A container that only a renaming made, as the template has it there; any other node is itself.

    Args:
        node: of the checkpoint's tree.
        sort: "dict", "record", "list" or "tuple".
        tag: of a record.
        fields: the template's entries.
    """
    if type(node) is not Node or node.kind != ANY:
        return node
    children = dict(zip(map(str, node.keys), node.children, strict=True))
    if sort in ("list", "tuple"):
        places = [str(index) for index in range(len(children))]
        if set(places) == set(children):
            return Node(kind=sort, children=tuple(children[place] for place in places))
        return dataclasses.replace(node, kind="dict")
    keys = {str(key): key for key in fields}
    return dataclasses.replace(node, kind=sort, name=tag, keys=tuple(keys.get(text, text) for text in children))


def unfillable(like: Any) -> str:
    """Why an array of the template cannot be overwritten; empty when it can."""
    if isinstance(like, torch.Tensor):
        if like.is_meta:
            return "a tensor on the meta device. Write value.to_empty(device=rt.device)"
        local = local_tensor(like)
        if _overlaps(local):
            return "a tensor whose elements share memory with each other. Write value.clone()"
    if type(like) is np.ndarray and not like.flags.writeable:
        return "a read-only array. Write value.copy()"
    return ""


def _overlaps(value: torch.Tensor) -> bool:
    """Whether two elements may be at one place: an expanded tensor, windows of `unfold`."""
    end = 0
    for stride, length in sorted((stride, length) for stride, length in zip(value.stride(), value.shape, strict=True)):
        if length > 1 and stride <= end:
            return value.numel() > 0
        end += stride * (length - 1)
    return False


def span(like: Any) -> tuple[str, int, int] | None:
    """The device of an array's memory, where that begins, and where it ends; None where there is none."""
    if isinstance(like, torch.Tensor):
        local = local_tensor(like)
        if local.is_meta or not local.numel():
            return None
        size, device, place = local.element_size(), str(local.device), local.data_ptr()
        if not place:  # XLA tells nobody where its memory is
            return None
        reach = [stride * (length - 1) * size for stride, length in zip(local.stride(), local.shape, strict=True)]
    elif type(like) is np.ndarray and like.size:
        size, device, place = like.itemsize, "cpu", int(like.ctypes.data)
        reach = [stride * (length - 1) for stride, length in zip(like.strides, like.shape, strict=True)]
    else:
        return None
    return device, place + sum(min(step, 0) for step in reach), place + sum(max(step, 0) for step in reach) + size


def mapping_like(like: Any, items: dict[Any, Any]) -> Any:
    """`items` in a mapping of the class of `like`."""
    if type(like) is dict:
        return items
    if type(like) is MappingProxyType:
        return MappingProxyType(items)
    if type(like) is collections.defaultdict:
        return collections.defaultdict(like.default_factory, items)
    made = copy.copy(like)  # keeps what a state_dict has besides its items
    made.clear()
    for key, item in items.items():  # update() of a Counter adds
        made[key] = item
    return made
