"""Objects with `state_dict` and `load_state_dict` ride along in a checkpoint: schedulers, loaders, ...

What is stored is the list of their states, one a rank, or a single one where all ranks have the same; plain containers
of tensors and numbers, as any other entry. A position in the data belongs to its rank, so states that differ are loaded
at the world size that saved them only.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, cast

import torch

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.format.manifest import ARRAYS, class_of, leaf_json, node_json, path_text
from fabricfn.checkpoint.trees.adapters import ObjectState, Types, adapter_of, of_the_caller, rides
from fabricfn.checkpoint.trees.arrays import chunks
from fabricfn.checkpoint.trees.custom import CheckpointType, types_of
from fabricfn.checkpoint.trees.outline import MAPPINGS, Only, Outline, Path, leaves_of, outline
from fabricfn.errors import CheckpointError, MismatchError
from fabricfn.sharding import is_sharded
from fabricfn.world import World


def stated(world: World, what: str, tree: Any, only: Only, given: Sequence[CheckpointType]) -> Outline:
    """The outline of a tree, with the states of the objects that ride along in it. Collective.

    Equal states do not travel: the ranks compare digests of them.

    Raises:
        CheckpointError: a state cannot be had or stored.
        MismatchError: the ranks have such objects at different places.
    """
    states: dict[int, Any] = {}

    def own() -> tuple[tuple[Types, Outline, dict[Path, Any]], list[tuple[str, str]]]:
        types = types_of(given)
        plan = outline(tree, only, types, {})
        found = {path: one for path, one in zip(plan.paths, plan.values, strict=True) if rides(one, types)}
        for path, one in found.items():
            states[id(one)] = state_of(one, path)
        return (types, plan, found), [
            (path_text(path), _digest(states[id(one)], one, path, types)) for path, one in found.items()
        ]

    (types, plan, found), answers = together(world, what, own)
    if any([name for name, _ in answer] != [name for name, _ in answers[0]] for answer in answers):
        places = "; ".join(f"rank {rank} {[name for name, _ in at]}" for rank, at in enumerate(answers))
        raise MismatchError(
            f"{what}: every rank must save the same entries, but the ranks have objects with a state_dict at different"
            f" places: {places} (this is rank {world.rank})."
        )
    if not found:
        return plan
    differ = [
        path
        for path, digests in zip(found, zip(*answers, strict=True), strict=True)
        if len({text for _, text in digests}) > 1
    ]
    everyone: list[list[Any]] = []
    if differ:
        everyone = together(
            world, what, lambda: (None, [_hosted(states[id(found[path])]) for path in differ]), objects=True
        )[1]
    stored: dict[int, ObjectState] = {}
    for path, one in found.items():
        by_rank = [theirs[differ.index(path)] for theirs in everyone] if path in differ else [states[id(one)]]
        stored[id(one)] = ObjectState(
            states_by_rank=by_rank, plain_containers=all(_is_plain(state, types) for state in by_rank)
        )
    return outline(tree, only, types, stored)


def state_of(one: Any, path: Path) -> Any:
    """The state of the object at this path."""
    with of_the_caller(f"{path_text(path)}: state_dict() of the {class_of(one).__name__}"):
        return one.state_dict()


def _digest(state: Any, one: Any, path: Path, types: Types) -> str:
    """Equal for states that are the same."""
    try:
        plan = outline(state, None, types, {})
        if any(map(is_sharded, plan.values)):
            raise CheckpointError("it holds a DTensor. Put its state into the tree itself: x.state_dict()")
        leaves = leaves_of(plan, False)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path_text(path)}: the state_dict() of the {class_of(one).__name__} cannot be stored: {error}"
        ) from error
    text = [node_json(plan.tree), [leaf_json(leaf, at) for leaf, at in zip(leaves, plan.paths, strict=True)]]
    found = hashlib.sha256(json.dumps(text).encode())
    for leaf, value in zip(leaves, plan.values, strict=True):
        if leaf.kind in ARRAYS and leaf.alias is None:
            for chunk in chunks(value):
                found.update(chunk)
    return found.hexdigest()


def _hosted(value: Any) -> Any:
    """A state that can travel: a tensor of one rank's device is none of another's."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if type(value) is dict:
        return {key: _hosted(item) for key, item in cast("dict[Any, Any]", value).items()}
    kind = class_of(value)
    if kind is list or kind is tuple:
        made = list(map(_hosted, value))
        return made if kind is list else tuple(made)
    return value


def _is_plain(state: Any, types: Types) -> bool:
    """Whether plain dicts, lists and tuples, without a template, are what the object gave."""
    kind = class_of(state)
    if kind is dict:
        return all(_is_plain(item, types) for item in state.values())
    if kind is list or kind is tuple:
        return all(_is_plain(item, types) for item in state)
    return kind not in MAPPINGS and adapter_of(state, types) is None


def put_back(states: Sequence[tuple[Path, Any, Any]]) -> None:
    """Give objects their states: (path, object, state) each.

    Raises:
        CheckpointError: an object did not take its state.
    """
    for path, one, state in states:
        then = ". It may have taken a part of its state, as may have the objects before it: make them anew."
        with of_the_caller(f"{path_text(path)}: load_state_dict() of the {class_of(one).__name__}", then):
            one.load_state_dict(state)
