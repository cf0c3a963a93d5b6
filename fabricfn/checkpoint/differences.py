"""Whether all ranks are about to save the same tree to the same place; else the error that says where they differ."""

import hashlib
import json
from collections.abc import Mapping

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.format.manifest import ARRAYS, leaf_json, node_json, path_text
from fabricfn.checkpoint.sharing import Draft
from fabricfn.checkpoint.trees.outline import listing
from fabricfn.errors import MismatchError
from fabricfn.world import World


def digest(call: Mapping[str, str], draft: Draft) -> str:
    """Equal on ranks that are about to save the same tree by the same call."""
    text = json.dumps([dict(call), node_json(draft.plan.tree), _descriptions(draft)])
    return hashlib.sha256(text.encode()).hexdigest()


def _descriptions(draft: Draft) -> dict[str, str]:
    """What must be equal on all ranks, by the place of the leaf.

    Its kind, dtype, global shape, how it is sharded, its alias; or its plain value. A rank's own part is not in it.
    """
    found: dict[str, str] = {}
    for path, leaf, layout in zip(draft.plan.paths, draft.leaves, draft.layouts, strict=True):
        text = leaf_json(leaf, path)
        if layout is not None:
            text["sharded"] = [layout, draft.texts[layout]]
        found[path_text(path)] = json.dumps(text)
    return found


def raise_mismatch(world: World, what: str, call: Mapping[str, str], draft: Draft) -> None:
    """Raise on every rank the error that says which entries differ, and where. Collective."""
    mine = {**call, **_descriptions(draft)}
    everyone = together(world, what, lambda: (None, mine))[1]
    lines: list[str] = []
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        by_value: dict[str, list[int]] = {}
        for rank, theirs in enumerate(everyone):
            by_value.setdefault(_shown(theirs.get(name)), []).append(rank)
        if len(by_value) > 1:
            parts = (f"ranks {', '.join(map(str, ranks))} have {value}" for value, ranks in by_value.items())
            lines.append(f"{name}: {'; '.join(parts)}")
    raise MismatchError(
        f"{what}: the ranks do not hold the same tree (this is rank {world.rank}). Tensors that differ in shape and"
        " plain values that differ cannot be saved as one; make them equal: ff.broadcast(rt, tree), or leave them out:"
        f" only=....{listing(lines or ['the order of the keys of a dict differs, or the meshes of sharded tensors'])}"
    )


def _shown(description: str | None) -> str:
    if description is None:
        return "nothing"
    if description[0] != "{":
        return description
    leaf = json.loads(description)
    if leaf["kind"] in ARRAYS:
        alias = f", the same as entry {leaf['alias']}" if "alias" in leaf else ""
        sharded = f", sharded {leaf['sharded'][1]}" if "sharded" in leaf else ""
        return f"a {leaf['kind']} {leaf['dtype']}{leaf['shape']}{sharded}{alias}"
    return f"{str(leaf.get('v'))[:40]} ({leaf['kind']})"
