"""Names of a state dict and names of a Model: where the state dict lies in the file, wrappers' prefixes, tied names."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from fabricfn.checkpoint.foreign.values import Keys, Later, Refused, Stored
from fabricfn.checkpoint.format.manifest import path_text
from fabricfn.errors import CheckpointError
from fabricfn.records import Model

WRAPPERS = frozenset({"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What DDP, torch.compile, Fabric, FSDP and activation checkpointing put into names."""

Rename = Callable[[str], str | None] | Mapping[str, str]
"""A function name -> name, or None for what is left out; or {name in the file: name in the model}, with `*` for any
text."""


def canonical(model: Model) -> dict[str, str]:
    """Every name that a state dict of the model's module has -> the name in the Model; a tied tensor has several."""
    found = {name: name for name in (*model.params, *model.buffers)}
    engine = model.ref.engine
    if engine is None:
        return found
    for tensors, ours in (
        (engine.template.named_parameters(remove_duplicate=False), model.params),
        (engine.template.named_buffers(remove_duplicate=False), model.buffers),
    ):
        first: dict[int, str] = {}
        pairs = [(name, id(tensor)) for name, tensor in tensors]
        for name, place in pairs:
            if name in ours:
                first.setdefault(place, name)
        for name, place in pairs:
            if place in first:
                found.setdefault(name, first[place])
    return found


def renamed(
    names: Iterable[str], rename: Rename | None, prefix: str | None, known: Mapping[str, str]
) -> dict[str, str]:
    """Name in the file -> name as the module has it.

    With a prefix, names that do not begin with it are left out. Without one, a name that the module has is itself, and
    of any other the wrappers' parts are taken away, until it is one that the module has.
    """
    found: dict[str, str] = {}
    for name in names:
        new: str | None = name
        if prefix is not None:
            if not name.startswith(prefix):
                continue
            new = name.removeprefix(prefix)
        if callable(rename):
            new = rename(new)
        elif rename is not None:
            new = _by_patterns(new, rename)
        if new is not None:
            found[name] = new if prefix is not None else unwrapped(new, known)
    return found


def _by_patterns(name: str, rename: Mapping[str, str]) -> str:
    """The new name by the first pattern that fits."""
    for old, new in rename.items():
        if old.count("*") != new.count("*"):
            raise CheckpointError(f"rename={{{old!r}: {new!r}}}: both sides have the same number of *")
        fits = re.fullmatch("(.*)".join(map(re.escape, old.split("*"))), name, re.DOTALL)
        if fits is not None:
            texts = iter((*fits.groups(), ""))
            return "".join(part + next(texts) for part in new.split("*"))
    return name


def unwrapped(name: str, known: Mapping[str, str]) -> str:
    """The name without the parts that wrappers put into it, where the module has none of that name itself."""
    if name in known:
        return name
    parts = name.split(".")
    for begin, part in enumerate(parts):
        if part not in WRAPPERS:
            break
        short = ".".join(parts[begin + 1 :])
        if short in known:
            return short
    short = ".".join(part for part in parts if part not in WRAPPERS)
    return short if short in known else name


def is_state_dict(tree: Any) -> bool:
    """Whether it is a flat dict name -> tensor."""
    if not isinstance(tree, dict):
        return False
    items = cast("dict[Any, Any]", tree)
    kinds: set[Any] = {type(items[name]) for name in items if not str(name).endswith("_extra_state")}
    return all(type(name) is str for name in items) and kinds <= {Stored, Refused} and Stored in kinds


def is_optimizer(tree: Any) -> bool:
    """Whether it is what `optimizer.state_dict()` returns; distributed checkpoints leave out a state that is empty."""
    keys: set[Any] = set(cast("dict[Any, Any]", tree)) if isinstance(tree, dict) else set()
    return "param_groups" in keys and ("state" in keys or len(keys) == 1)


def candidates(tree: Any, fits: Callable[[Any], bool], keys: Keys = ()) -> list[tuple[Keys, Any]]:
    """The places of a tree, three containers deep, where something that fits begins; nothing is looked for in it."""
    if fits(tree):
        return [(keys, tree)]
    if not isinstance(tree, dict) or len(keys) > 2 or is_state_dict(tree) or is_optimizer(tree):
        return []
    items = cast("dict[str, Any]", tree).items()
    return [found for key, item in items for found in candidates(item, fits, (*keys, key))]


def only_one(tree: Any, fits: Callable[[Any], bool], what: str, useful: Callable[[Any], bool]) -> tuple[Keys, Any]:
    """The one place of a tree that can be meant.

    Args:
        tree: the content of a file, or of a place of it.
        fits: what is looked for.
        what: how messages name it.
        useful: of several that fit, those count for which this is true.

    Raises:
        CheckpointError: there is none, or several.
    """
    found = candidates(tree, fits)
    if len(found) > 1:
        found = [entry for entry in found if useful(entry[1])] or found
    if len(found) == 1:
        return found[0]
    keys = list(cast("dict[Any, Any]", tree)) if isinstance(tree, dict) else []
    there = ", ".join(map(str, keys[:8])) or "nothing with a name"
    if not found:
        raise CheckpointError(f"there is no {what} (there is: {there}{', ...' if len(keys) > 8 else ''})")
    places = ", ".join(path_text(place) for place, _ in found[:8])
    raise CheckpointError(
        f"there are several that could be meant by {what}: {places}. Say which: key={path_text(found[0][0])!r}"
    )


def at_key(tree: Any, key: str | None) -> Any:
    """What stands at `key`, whose parts are divided by "/".

    Raises:
        CheckpointError: there is nothing.
    """
    for part in key.split("/") if key else ():
        inner: Any = tree
        items: dict[str, Any] = {}
        if isinstance(inner, dict):
            items = {str(name): item for name, item in cast("dict[Any, Any]", inner).items()}
        elif isinstance(inner, list | tuple):
            items = {str(index): item for index, item in enumerate(cast("list[Any]", inner))}
        if part not in items:
            raise CheckpointError(f"key={key!r} names nothing: there is {', '.join([*items][:8]) or 'no container'}.")
        tree = items[part]
        tree = tree.read() if type(tree) is Later else tree
    return tree
