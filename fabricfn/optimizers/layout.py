"""Which parameter stands where: positions, groups by name pattern, and the way from trees of models to flat lists."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from fabricfn.errors import ConfigurationError, GradientError, ModelError
from fabricfn.optimizers.shards import taken_row
from fabricfn.records import Grads, Model
from fabricfn.states import Optimizer, Plan
from fabricfn.tree import Tree, TreeSpec, path_name, tree_flatten, tree_paths, tree_unflatten

Pattern = str | Callable[[str], bool]
"""A name pattern as the shell knows it ("*.bias"), or a predicate of the name."""


def _is_model(node: Any) -> bool:
    return type(node) is Model


def _is_grads(node: Any) -> bool:
    return type(node) is Grads


def models_of(models: Tree) -> tuple[list[Model], TreeSpec | None, list[str]]:
    """(models, structure or None for one Model, one label per position) of what `setup_optimizer` was given."""
    if type(models) is Model:
        return [models], None, list(models.params)
    leaves, spec = tree_flatten(models, _is_model)
    strangers = [type(leaf).__name__ for leaf in leaves if type(leaf) is not Model]
    if strangers or not leaves:
        raise ConfigurationError(
            f"setup_optimizer takes one Model or a pytree of Models; it got {strangers[:3] or 'an empty tree'}. Write"
            " setup_optimizer(rt, setup_model(rt, module), torch.optim.AdamW, lr=1e-3)."
        )
    paths = tree_paths(models, _is_model)
    labels = [f"{path_name(path)}/{name}" for path, model in zip(paths, leaves, strict=True) for name in model.params]
    return leaves, spec, labels


def moving_of(model: Model) -> list[bool]:
    """Which parameters may be updated: those that were not frozen when the module was set up."""
    engine = model.ref.engine
    if engine is None:
        return [value.is_floating_point() or value.is_complex() for value in model.params.values()]
    frame = engine.frames[0]
    trainable = dict(zip(frame.names, (slot.requires_grad for slot in frame.slots), strict=True))
    return [trainable[name] for name in model.params]


def matches(pattern: Pattern, label: str) -> bool:
    """Whether a name fits a pattern or a predicate."""
    return fnmatch.fnmatchcase(label, pattern) if isinstance(pattern, str) else bool(pattern(label))


def select(patterns: Pattern | Sequence[Pattern] | None, labels: Sequence[str], positions: Iterable[int]) -> list[int]:
    """The positions whose label fits one of the patterns; all of them for None."""
    positions = list(positions)
    if patterns is None:
        return positions
    several = [patterns] if isinstance(patterns, str) or callable(patterns) else list(patterns)
    found = [i for i in positions if any(matches(pattern, labels[i]) for pattern in several)]
    if not found:
        raise ConfigurationError(no_match(patterns, labels, positions))
    return found


def no_match(pattern: Any, labels: Sequence[str], positions: Sequence[int]) -> str:
    """What to say about a pattern that fits nothing."""
    there = ", ".join(labels[i] for i in positions[:8]) + (", ..." if len(positions) > 8 else "")
    return f"{pattern!r} fits no trainable parameter; there are: {there}"


def divide(
    groups: Mapping[Pattern, Mapping[str, Any]] | None, labels: Sequence[str], positions: Sequence[int]
) -> list[tuple[tuple[int, ...], Mapping[str, Any]]]:
    """[(positions, their own hyperparameters)]: the groups in the given order, then what no pattern fits."""
    left = list(positions)
    out: list[tuple[tuple[int, ...], Mapping[str, Any]]] = []
    for pattern, hyperparams in (groups or {}).items():
        taken = [i for i in left if matches(pattern, labels[i])]
        if not taken:
            raise ConfigurationError(f"groups: {no_match(pattern, labels, left)}")
        out.append((tuple(taken), hyperparams))
        left = [i for i in left if i not in set(taken)]
    if left or not out:
        out.append((tuple(left), {}))
    return out


def parts(plan: Plan, tree: Tree, kind: type) -> list[Any]:
    """The Models (or Grads) of a tree, in the plan's order."""
    if plan.spec is None:
        if type(tree) is kind:
            return [tree]
    else:
        leaves, spec = tree_flatten(tree, _is_model if kind is Model else _is_grads)
        if spec == plan.spec and all(type(leaf) is kind for leaf in leaves):
            return leaves
    wanted = f"one {kind.__name__}" if plan.spec is None else f"{kind.__name__}s in the structure {plan.spec}"
    raise ConfigurationError(
        f"this optimizer was set up for {wanted}; it got {_kind(tree)}. Pass models and gradients in the structure that"
        " setup_optimizer was given."
    )


def _kind(tree: Any) -> str:
    if type(tree) in (Model, Grads) or tree is None:
        return type(tree).__name__
    leaves, spec = tree_flatten(tree, lambda node: type(node) in (Model, Grads))
    return f"{len(leaves)} leaves ({', '.join(sorted({type(leaf).__name__ for leaf in leaves}))}) in {spec}"


def values_of(mapping: Mapping[str, Any], names: tuple[str, ...], what: type) -> list[Any]:
    """The values in the order of the plan's names."""
    if tuple(mapping) == names:
        return list(mapping.values())
    differ = sorted(set(mapping) ^ set(names))
    if differ:
        error = ModelError if what is Model else GradientError
        raise error(f"this {what.__name__} does not fit the optimizer: names differ: {differ[:6]}")
    return [mapping[name] for name in names]


def mappings(plan: Plan, values: Sequence[Any]) -> list[MappingProxyType[str, Any]]:
    """One mapping name -> value per model."""
    if len(plan.names) == 1:
        return [MappingProxyType(dict(zip(plan.names[0], values, strict=True)))]
    out: list[MappingProxyType[str, Any]] = []
    start = 0
    for names in plan.names:
        out.append(MappingProxyType(dict(zip(names, values[start : start + len(names)], strict=True))))
        start += len(names)
    return out


def joined(plan: Plan, records: Sequence[Any]) -> Tree:
    """The tree in the plan's structure."""
    return records[0] if plan.spec is None else tree_unflatten(plan.spec, records)


def mirrored(plan: Plan, rows: Mapping[int, Any]) -> Tree:
    """The rows by position, as name -> row in the tree of the models."""
    out: list[dict[str, Any]] = []
    start = 0
    for names in plan.names:
        out.append({name: rows[start + i] for i, name in enumerate(names) if start + i in rows})
        start += len(names)
    return joined(plan, out)


def rows_of(like: Optimizer, state: Tree) -> dict[int, dict[str, Any]]:
    """The inverse of `mirrored`: position -> {slot: value}, for all positions of the groups."""
    plan = like.plan
    try:
        trees: list[Any] = [state] if plan.spec is None else plan.spec.flatten_up_to(state)
    except ValueError as error:
        raise ConfigurationError(f"this optimizer state is for another tree of models: {error}") from None
    covered = {i for group in plan.groups for i in group}
    rows: dict[int, dict[str, Any]] = {}
    start = 0
    for names, tree in zip(plan.names, trees, strict=True):
        ours = {name for i, name in enumerate(names) if start + i in covered}
        differ = sorted(ours ^ set(tree))
        if differ:
            raise ConfigurationError(f"this optimizer state is for other parameters; names differ: {differ[:6]}")
        rows |= {
            start + i: taken_row(plan, start + i, tree[name], name) for i, name in enumerate(names) if name in ours
        }
        start += len(names)
    return rows


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf of a state is a tensor."""
    return isinstance(leaf, torch.Tensor)
