"""Comparing trees: which leaf differs most, and the error that says so."""

import dataclasses
import math
from typing import Any

import torch

from fabricfn.sharding import local_of, whole
from fabricfn.tree import Tree, path_name, tree_flatten, tree_leaves, tree_map, tree_paths


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The leaf that differs most."""

    path: str
    """Where it is, as "model/0.weight"."""
    largest: float
    """The largest absolute difference of two numbers; infinite where they cannot be compared."""
    detail: str
    """What was found and what was expected, in short."""


def snapshot(tree: Tree) -> Tree:
    """The tree with copies of its tensors, sharded ones whole: then every rank must call it."""
    return tree_map(_copy, tree)


def _copy(leaf: Any) -> Any:
    return whole(leaf.detach()) if isinstance(leaf, torch.Tensor) else leaf


def difference(found: Tree, expected: Tree, tolerance: float = 0.0) -> Difference | None:
    """The leaf at which two trees differ most, None when they agree.

    Args:
        tolerance: numbers `a` and `b` agree when `|a - b| <= tolerance * max(1, |b|)`; 0 means bit for bit, where -0.0
            and 0.0 differ and a NaN equals itself. Structures, dtypes and shapes must be equal always.
    """
    paths, others = ([path_name(path) for path in tree_paths(tree)] for tree in (found, expected))
    if paths != others:
        odd = sorted(set(paths) ^ set(others))[:6] or ["another order of leaves"]
        return Difference(path=odd[0], largest=math.inf, detail=f"the structures differ: {', '.join(odd)}")
    if tree_flatten(found)[1] != tree_flatten(expected)[1]:
        return Difference(path=".", largest=math.inf, detail="the structures differ in the kinds of their nodes")
    worst: Difference | None = None
    for path, a, b in zip(paths, tree_leaves(found), tree_leaves(expected), strict=True):
        one = _tensors(path, a, b, tolerance) if isinstance(b, torch.Tensor) else _plain(path, a, b, tolerance)
        if one is not None and (worst is None or one.largest > worst.largest):
            worst = one
    return worst


def _tensors(path: str, a: Any, b: torch.Tensor, tolerance: float) -> Difference | None:
    if not isinstance(a, torch.Tensor) or a.dtype is not b.dtype or a.shape != b.shape:
        found = f"{a.dtype} {tuple(a.shape)}" if isinstance(a, torch.Tensor) else repr(a)
        return Difference(path=path, largest=math.inf, detail=f"{found} instead of {b.dtype} {tuple(b.shape)}")
    a, b = _unwrapped(a), _unwrapped(b)
    if not b.numel() or (tolerance == 0 and torch.equal(_bits(a), _bits(b))):
        return None
    wide = torch.complex128 if b.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    gaps = (x - y).abs().masked_fill((x == y) | (x.isnan() & y.isnan()), 0.0).nan_to_num(math.inf, math.inf)
    scale = y.abs().nan_to_num(1.0).clamp(min=1.0)
    if tolerance and bool((gaps <= tolerance * scale).all()):
        return None
    index = int(gaps.argmax())
    detail = f"{a.reshape(-1)[index].item()!r} instead of {b.reshape(-1)[index].item()!r} in a {tuple(b.shape)} tensor"
    return Difference(path=path, largest=float(gaps.max()), detail=detail)


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor of which one rank holds everything may stand for a whole one."""
    part = local_of(tensor.detach()).cpu()
    return part.reshape(tensor.shape) if part.numel() == tensor.numel() else part


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _plain(path: str, a: Any, b: Any, tolerance: float) -> Difference | None:
    if type(a) is type(b) and (a == b or a is b or repr(a) == repr(b)):
        return None
    numbers = isinstance(a, int | float) and isinstance(b, int | float) and type(a) is type(b)
    gap = abs(a - b) if numbers else math.inf
    if tolerance and gap <= tolerance * max(1.0, abs(b) if numbers else 1.0):
        return None
    return Difference(path=path, largest=gap, detail=f"{a!r} instead of {b!r}")


def require(law: str, where: str, found: Tree, expected: Tree, tolerance: float, meaning: str) -> None:
    """Raise `AssertionError` unless the trees agree.

    Args:
        law: which law is checked.
        where: strategy, world size, rank and so on.
        meaning: what `expected` is.
    """
    worst = difference(found, expected, tolerance)
    if worst is not None:
        bound = f"a tolerance of {tolerance:g}" if tolerance else "the same bits"
        raise AssertionError(
            f"the law of {law} is broken under {where}: {worst.path} differs by up to {worst.largest:.3g}"
            f" ({worst.detail}); expected {bound}, compared with {meaning}."
        )
