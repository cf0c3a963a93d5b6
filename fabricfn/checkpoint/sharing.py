"""Who writes what: the parts that the ranks hold become the pieces of the arrays, each written by one of its holders.

Every rank works it out for all ranks, from what each of them said about its parts; so nobody waits for a plan.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from fabricfn.checkpoint.format.boxes import Box, flaw, whole
from fabricfn.checkpoint.format.manifest import ARRAYS, Leaf, array_bytes, path_text, stored_as
from fabricfn.checkpoint.trees.outline import Outline, leaves_of, listing
from fabricfn.checkpoint.trees.placements import layout_of, layout_text, local_tensor, parts_of, view_of
from fabricfn.errors import CheckpointError, MismatchError
from fabricfn.sharding import is_sharded


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What this rank is about to save."""

    plan: Outline
    leaves: tuple[Leaf, ...]
    layouts: tuple[int | None, ...]
    """For each leaf the number of its layout, in the order of first use; None for what is not sharded."""
    texts: tuple[str, ...]
    """The layouts as messages name them."""
    holding: "Holding"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a rank tells the others about its parts."""

    boxes: tuple[tuple[Box, ...], ...]
    """For each layout the boxes in this rank's part."""
    aliases: dict[int, int]
    """Sharded leaf -> the first leaf with the same memory, where this rank has some: an empty part cannot tell."""


@dataclasses.dataclass(frozen=True, slots=True)
class Chore:
    """One piece that a rank writes."""

    leaf: int
    number: int
    """Which piece of the leaf."""
    box: Box


Owners = Sequence[tuple[Box, Sequence[int]]]
"""The pieces of one leaf, and the ranks that hold each."""


def drafted(plan: Outline, host: bool) -> Draft:
    """What this rank would save; `host` as in `array_leaf`."""
    leaves = list(leaves_of(plan, host))
    numbers: dict[Hashable, int] = {}
    layouts: list[int | None] = []
    texts: list[str] = []
    boxes: list[tuple[Box, ...]] = []
    aliases: dict[int, int] = {}
    for index, value in enumerate(plan.values):
        if not is_sharded(value):
            layouts.append(None)
            continue
        number = numbers.setdefault(layout_of(value), len(numbers))
        if number == len(boxes):
            texts.append(layout_text(value))
            boxes.append(tuple(part.box for part in parts_of(value)))
        layouts.append(number)
        leaf = leaves[index]
        if boxes[number]:
            aliases[index] = index if leaf.alias is None else leaf.alias
        leaves[index] = dataclasses.replace(leaf, alias=None)
    return Draft(
        plan=plan,
        leaves=tuple(leaves),
        layouts=tuple(layouts),
        texts=tuple(texts),
        holding=Holding(boxes=tuple(boxes), aliases=aliases),
    )


def agreed_leaves(draft: Draft, holdings: Sequence[Holding]) -> tuple[Leaf, ...]:
    """The leaves, with the aliases among the sharded ones as the ranks that hold them see them.

    Raises:
        MismatchError: they see different ones.
    """
    leaves, problems = list(draft.leaves), list[str]()
    for index, layout in enumerate(draft.layouts):
        if layout is None:
            continue
        seen = {holding.aliases[index] for holding in holdings if index in holding.aliases}
        if len(seen) > 1:
            problems.append(path_text(draft.plan.paths[index]))
        elif seen and seen != {index}:
            leaves[index] = dataclasses.replace(leaves[index], alias=seen.pop())
    if problems:
        raise MismatchError(
            "sharded tensors share memory with other entries on some ranks and not on others; clone them on all ranks,"
            f" or on none:{listing(problems)}"
        )
    return tuple(leaves)


def owners_of(draft: Draft, leaves: Sequence[Leaf], holdings: Sequence[Holding]) -> list[Owners]:
    """For each leaf its pieces and who holds them; what is not sharded is one piece that all ranks hold.

    Raises:
        CheckpointError: the parts of a sharded leaf overlap or leave a gap; all such leaves are named.
    """
    everyone = range(len(holdings))
    layouts = [_holders([holding.boxes[number] for holding in holdings]) for number in range(len(draft.texts))]
    faults: dict[int, str] = {}
    found: list[Owners] = []
    problems: list[str] = []
    for index, leaf in enumerate(leaves):
        number = draft.layouts[index]
        if leaf.kind not in ARRAYS or leaf.alias is not None:
            found.append(())
        elif number is None or 0 in leaf.shape:
            found.append(((whole(leaf.shape), everyone),))
        else:
            if number not in faults:
                faults[number] = flaw([box for box, _ in layouts[number]], leaf.shape)
            if faults[number]:
                problems.append(f"{path_text(draft.plan.paths[index])}, {draft.texts[number]}: {faults[number]}")
            found.append(layouts[number])
    if problems:
        raise CheckpointError(
            "these sharded tensors are not whole on the ranks that save. Every rank of a tensor's mesh calls ff.save,"
            f" with the same tree:{listing(problems)}"
        )
    return found


def _holders(boxes: Sequence[Sequence[Box]]) -> Owners:
    """The different boxes in the order of the array, each with the ranks that hold it."""
    found: dict[Box, list[int]] = {}
    for rank, held in enumerate(boxes):
        for box in held:
            found.setdefault(box, []).append(rank)
    return sorted(found.items(), key=lambda item: (item[0].offset, item[0].shape))


def shares(leaves: Sequence[Leaf], owners: Sequence[Owners], world_size: int) -> list[list[Chore]]:
    """For each rank the pieces that it writes: what it alone holds, and of the rest an even share.

    The rest is dealt out largest first, each piece to that of its holders which has the least so far. Within a rank's
    file pieces are ordered by the size of their elements, so that each is aligned.
    """
    loads = [0] * world_size
    found: list[list[Chore]] = [[] for _ in range(world_size)]
    rest: list[tuple[int, Chore, Sequence[int]]] = []
    for index, leaf in enumerate(leaves):
        for number, (box, holders) in enumerate(owners[index]):
            rest.append((array_bytes(leaf.dtype, box.shape), Chore(index, number, box), holders))
    for size, chore, holders in sorted(rest, key=lambda item: (len(item[2]) > 1, -item[0])):
        rank = min(holders, key=loads.__getitem__)
        found[rank].append(chore)
        loads[rank] += size
    for chores in found:
        chores.sort(key=lambda chore: (-stored_as(leaves[chore.leaf].dtype)[1], chore.leaf, chore.number))
    return found


def held(value: Any, box: Box) -> Any:
    """The piece of a value that this rank holds, a view of its memory; None when it has no elements."""
    if not is_sharded(value):
        return value
    found = [part for part in parts_of(value) if part.box == box]
    return view_of(local_tensor(value), found[0]) if found else None


def to_plain(holding: Holding) -> list[Any]:
    """As JSON has it."""
    boxes = [[[list(box.offset), list(box.shape)] for box in of] for of in holding.boxes]
    return [boxes, list(holding.aliases.items())]


def from_plain(plain: Any) -> Holding:
    """Undoes `to_plain`."""
    boxes, aliases = plain
    found = tuple(tuple(Box(tuple(offset), tuple(shape)) for offset, shape in of) for of in boxes)
    return Holding(boxes=found, aliases=dict(aliases))
