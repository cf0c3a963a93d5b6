"""Objects that keep a state of their own and ride along in a checkpoint: loaders with `state_dict`/`load_state_dict`.

What is stored is the list of their states, one a rank, or a single one where all ranks have the same; plain containers
of tensors and numbers, as any other entry. A loader's position belongs to its rank, so states that differ are loaded at
the world size that saved them only.
"""

import pickle
from collections.abc import Mapping
from typing import Any, cast

import torch

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.manifest import DEPTH_LIMIT, class_of, path_text
from fabricfn.checkpoint.outline import Path, listing
from fabricfn.errors import CheckpointError, MismatchError
from fabricfn.tree import tree_map
from fabricfn.world import World

STATES = "states_by_rank"
OTHERWISE_STORED = ("Module", "Optimizer", "LRScheduler", "GradScaler")
"""Classes of torch with a `state_dict` for which there is another way."""


def rides(value: object) -> bool:
    """Whether an entry is an object with `state_dict` and `load_state_dict` for which there is no other way."""
    kind = class_of(value)
    if any(base.__name__ in OTHERWISE_STORED and base.__module__.startswith("torch") for base in kind.__mro__):
        return False
    return all(callable(getattr(kind, name, None)) for name in ("state_dict", "load_state_dict"))


def riders(tree: Any, path: Path = ()) -> dict[Path, Any]:
    """The objects that ride along in dicts, lists and tuples, by their paths."""
    kind = class_of(tree)
    if len(path) > DEPTH_LIMIT:  # a container that holds itself; what stores it says so
        return {}
    if kind is dict or kind is list or kind is tuple:
        items = cast("Any", tree.items() if kind is dict else enumerate(tree))
        return {place: value for key, item in items for place, value in riders(item, (*path, key)).items()}
    return {path: tree} if rides(tree) else {}


def replaced(tree: Any, values: Mapping[Path, Any], path: Path = ()) -> Any:
    """The tree with these values at these paths."""
    if not values:
        return tree
    if path in values:
        return values[path]
    kind = class_of(tree)
    if kind is dict:
        return {key: replaced(item, values, (*path, key)) for key, item in tree.items()}
    if kind is list or kind is tuple:
        items = [replaced(item, values, (*path, index)) for index, item in enumerate(cast("list[Any]", tree))]
        return items if kind is list else tuple(items)
    return tree


def with_states(world: World, what: str, tree: Any) -> Any:
    """The tree with the states of what rides along in it. Collective where something does."""
    found = riders(tree)
    if not found:
        return tree
    names = [path_text(path) for path in found]

    def own() -> tuple[None, tuple[str, list[str], list[tuple[Any, bytes]]]]:
        states = [one.state_dict() for one in found.values()]
        return None, (STATES, names, [(state, _text(state)) for state in states])

    answers = together(world, what, own)[1]
    if any(type(answer) is not tuple or answer[:2] != (STATES, names) for answer in answers):
        raise MismatchError(
            f"{what}: every rank must save the same entries, but not all have objects with a state_dict at"
            f" {', '.join(names)} (this is rank {world.rank})."
        )
    by_place = zip(*(states for _, _, states in answers), strict=True)
    return replaced(tree, {path: {STATES: _once(list(states))} for path, states in zip(found, by_place, strict=True)})


def _text(state: Any) -> bytes:
    """What equal states agree in; each rank makes its own, so that all ranks compare the same."""
    plain = tree_map(_contents, state)
    return pickle.dumps(pickle.loads(pickle.dumps(plain)))  # a round trip: what it shares with itself is as it travels


def _contents(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    # pickled tensors name their memory's address
    return str(leaf.dtype), tuple(leaf.shape), leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()


def _once(states: list[tuple[Any, bytes]]) -> list[Any]:
    own = [state for state, _ in states]
    return own[:1] if len({text for _, text in states}) == 1 else own


def put_back(world: World, like: Any, tree: Any) -> Any:
    """Give what rides along in the template its state, and put it into the loaded tree.

    Raises:
        CheckpointError: the states are those of another number of ranks, or something else stands there.
    """
    found = riders(like)
    states: dict[Path, Any] = {}
    problems: list[str] = []
    for path in found:
        stored = tree
        for key in path:
            stored = stored[key]
        if stored is None:  # not selected, or missing where that is no error: it stays as it is
            continue
        by_rank = cast("list[Any]", stored[STATES]) if class_of(stored) is dict and STATES in stored else []
        if not by_rank:
            problems.append(
                f"{path_text(path)}: the template has a {class_of(found[path]).__name__}, the checkpoint not"
            )
        elif len(by_rank) not in (1, world.world_size):
            problems.append(
                f"{path_text(path)}: each of {len(by_rank)} ranks saved a position of its own, but {world.world_size}"
                " load. Use as many ranks; or save a Cursor instead, which holds at any world size"
            )
        else:
            states[path] = by_rank[world.rank % len(by_rank)]
    if problems:
        raise CheckpointError(f"what keeps a state of its own cannot be given it:{listing(problems)}")
    for path, state in states.items():
        found[path].load_state_dict(state)
    return replaced(tree, found)
