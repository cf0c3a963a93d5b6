"""Optimizers that are a pair of pure functions (init, update), in the shape that optax gave them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fabricfn.errors import ConfigurationError
from fabricfn.optimizers.layout import joined
from fabricfn.optimizers.shards import shown, taken
from fabricfn.states import Optimizer, Plan, addresses
from fabricfn.tree import tree_flatten, tree_leaves, tree_map, tree_paths, tree_unflatten


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """The detail of a plan that works by a pair of functions.

    The trees that they get are name -> tensor for one Model, and the tree of the models with such mappings otherwise.
    """

    init: Callable[[Any], Any]
    """params -> state."""
    update: Callable[..., tuple[Any, Any]]
    """(grads, state, params, **overrides) -> (updates, state)."""
    covered: tuple[int, ...]
    """The positions that it updates."""


def pair_of(optimizer: Any) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """(init, update) of a pair, or of an object with two such attributes; None for anything else."""
    found: list[Any] = [getattr(optimizer, name, None) for name in ("init", "update")]
    if type(optimizer) is tuple:
        found = [*optimizer]
    return (found[0], found[1]) if len(found) == 2 and all(map(callable, found)) else None


def tree_of(plan: Plan, values: Sequence[Any], covered: Sequence[int]) -> Any:
    """The values at the covered positions, as name -> value in the tree of the models."""
    chosen = set(covered)
    out: list[dict[str, Any]] = []
    start = 0
    for names in plan.names:
        out.append({name: values[start + i] for i, name in enumerate(names) if start + i in chosen})
        start += len(names)
    return joined(plan, out)


def advance(
    opt: Optimizer,
    params: list[Tensor],
    grads: list[Tensor | None],
    hyperparams: Sequence[Mapping[str, Any]],
    donate: bool,
    evaluate: Callable[[], tuple[Any, list[Tensor | None]]] | None,
) -> tuple[Any, Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """The step of a plan whose detail is `Pair`: params + updates.

    A gradient that is None is handed over as zeros, so that the trees fit, and its parameter stays as it is.
    """
    if evaluate is not None:
        grads = evaluate()[1]
    plan, detail = opt.plan, opt.plan.detail
    covered: tuple[int, ...] = detail.covered
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
    options: Mapping[str, Any] = hyperparams[0] if hyperparams else {}
    with torch.no_grad():
        updates, state = detail.update(
            tree_of(plan, zeros, covered), opt.store, tree_of(plan, params, covered), **options
        )
        # what the two kept of the parameters must not get the new values, nor be scaled by a clip of these gradients
        ours = addresses(params)
        state = _apart(state, {*ours, *addresses(grads)})
        for i, update in zip(covered, _by_position(plan, _apart(updates, {*ours}), covered), strict=True):
            if grads[i] is not None:
                params[i].copy_(params[i] + update)
    return state, opt.shared, opt.hyperparams


def _apart(tree: Any, taken: set[int]) -> Any:
    """The same values, in memory of their own where theirs is taken."""

    def apart(leaf: Any) -> Any:
        return leaf if taken.isdisjoint(addresses([leaf])) else leaf.clone()

    return tree_map(apart, tree)


def _by_position(plan: Plan, updates: Any, covered: Sequence[int]) -> list[Tensor]:
    """The updates in the order of the covered positions."""
    trees: list[Any] = [updates] if plan.spec is None else plan.spec.flatten_up_to(updates)
    chosen = set(covered)
    out: list[Tensor] = []
    start = 0
    for names, tree in zip(plan.names, trees, strict=True):
        own = [name for i, name in enumerate(names) if start + i in chosen]
        if set(tree) != set(own):
            raise ConfigurationError(
                f"update must return one tensor per parameter; names differ: {sorted(set(own) ^ set(tree))[:6]}"
            )
        out.extend(tree[name] for name in own)
        start += len(names)
    return out


def _owners(plan: Plan, tree: Any) -> list[int | None]:
    """The position of the parameter under whose name each leaf of a state stands."""
    models: list[tuple[Any, ...]] = [()] if plan.spec is None else list(plan.spec.paths())
    labels = [(*path, name) for path, names in zip(models, plan.names, strict=True) for name in names]
    positions = {label: position for position, label in enumerate(labels)}
    lengths = {*map(len, labels)}
    found: list[int | None] = []
    for path in tree_paths(tree):
        owners = [positions[path[-n:]] for n in lengths if path[-n:] in positions]
        found.append(owners[0] if owners else None)
    return found


def dressed(plan: Plan, store: Any) -> Any:
    """The store with DTensors in place of parts."""
    likes: Any = plan.likes
    leaves, spec = tree_flatten(store)
    owners = _owners(plan, store)
    pairs = zip(leaves, owners, strict=True)
    return tree_unflatten(spec, [leaf if i is None else shown(likes[i], "", leaf) for leaf, i in pairs])


def read(plan: Plan, store: Any) -> Any:
    """The state as `init` and `update` return it."""
    return store


def write(like: Optimizer, state: Any) -> Any:
    """The state in the structure that `like` has now: a checkpoint knows no named tuples."""
    leaves, (known, spec) = tree_leaves(state), tree_flatten(like.store)
    if len(leaves) != len(known):
        raise ConfigurationError(f"this state has {len(leaves)} leaves; the optimizer has {len(known)}")
    if like.plan.likes is not None:
        labels = [name for names in like.plan.names for name in names]
        pairs = zip(leaves, _owners(like.plan, like.store), strict=True)
        leaves = [leaf if i is None else taken(like.plan, i, "state", leaf, labels[i]) for leaf, i in pairs]
    return tree_unflatten(spec, leaves)
