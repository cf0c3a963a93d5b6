"""Pytrees: nested dicts, lists, tuples and records of leaves. The only file that names optree.

A record's class is registered once, for optree (in its global namespace, so that a user's own `optree.tree_map` sees
it) and for `torch.utils._pytree` (which torch.func, torch.compile and the functional collectives read). None is a
node without leaves, as in JAX.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import optree
from optree.registry import __GLOBAL_NAMESPACE as _GLOBAL  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
from torch.utils import _pytree as torch_pytree

Tree = Any
"""Nested containers and records of leaves."""
Leaf = Any
TreeSpec = optree.PyTreeSpec
T = TypeVar("T")


def register(
    cls: type[T],
    flatten: Callable[[T], tuple[Sequence[Any], Any, Sequence[str]]],
    unflatten: Callable[[Any, Iterable[Any]], T],
) -> None:
    """Make `cls` a node of every pytree.

    Args:
        cls: the exact class; sub-classes stay leaves.
        flatten: record -> (children, static part, one name per child). Two records combine when their static parts are
            equal.
        unflatten: (static part, children) -> record.
    """

    def flatten_torch(record: T) -> tuple[list[Any], Any]:
        children, static, names = flatten(record)
        return list(children), (static, tuple(names))

    def unflatten_torch(children: Iterable[Any], context: Any) -> T:
        return unflatten(context[0], children)

    optree.register_pytree_node(cls, flatten, unflatten, namespace=_GLOBAL)  # pyright: ignore[reportArgumentType, reportUnknownArgumentType, reportCallIssue]
    torch_pytree.register_pytree_node(cls, flatten_torch, unflatten_torch)


def tree_map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`f` on every leaf of a tree. Not collective.

    Args:
        f: takes a leaf of `tree`, then the leaves at the same places of `rest`.
        tree: nested dicts, lists, tuples and records (`Model`, `Optimizer`, `Grads`); None is no leaf, and stays.
        rest: trees of the same structure.

    Returns:
        A new tree of the same structure, with what `f` returned; a record in it has a lease of its own.

    Example:
        >>> import fabricfn as ff
        >>> ff.tree_map(lambda a, b: a + b, {"x": 1, "y": [2, None]}, {"x": 10, "y": [20, None]})
        {'x': 11, 'y': [22, None]}
    """
    return optree.tree_map(f, tree, *rest)


def tree_leaves(tree: Tree) -> list[Leaf]:
    """The leaves, in the order of `tree_flatten`."""
    return optree.tree_leaves(tree)


def tree_flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Leaf], TreeSpec]:
    """(leaves, structure); `is_leaf` stops the descent at the nodes for which it is true."""
    return optree.tree_flatten(tree, is_leaf)


def tree_unflatten(spec: TreeSpec, leaves: Iterable[Leaf]) -> Tree:
    """The tree of this structure that holds these leaves."""
    return optree.tree_unflatten(spec, leaves)


def tree_paths(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[Any, ...]]:
    """One path per leaf, in the order of `tree_flatten`: ("model", "0.weight"), ("epoch",), ..."""
    return list(optree.tree_paths(tree, is_leaf))


def path_name(path: tuple[Any, ...]) -> str:
    """A path as messages show it: `model/0.weight`."""
    return "/".join(str(part) for part in path) or "."
