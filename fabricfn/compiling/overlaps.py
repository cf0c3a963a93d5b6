"""Memory that a step gives away must be that of no other argument: the graph may write to it at any time."""

from collections.abc import Sequence
from typing import Any

import torch

from fabricfn.compiling.arguments import Part
from fabricfn.errors import ModelError
from fabricfn.states import addresses, overlap

Changed = tuple[int, ...] | None
"""Which of a record's tensors change; None is all."""


def check_memory(spent: Sequence[tuple[int, Changed]], parts: Sequence[Part], names: Sequence[str]) -> None:
    """Raise `ModelError` if a tensor that will change in place lies in the memory of another one."""
    given_away = {place: _memory(parts[place], changed) for place, changed in spent}
    for place, part in enumerate(parts):
        others = [memory for other, memory in given_away.items() if other != place]
        if others and part.tensors:
            ours = given_away.get(place) or _memory(part, None)
            for memory in others:
                if not memory.isdisjoint(ours):
                    _refuse(spent, parts, names)
    for place, changed in spent:
        lease = parts[place].given.lease
        if not lease.apart and len(given_away[place]) < len(_tensors(parts[place], changed)):
            _refuse(spent, parts, names)


def _tensors(part: Part, changed: Changed) -> Sequence[torch.Tensor]:
    return part.tensors if changed is None else [part.tensors[i] for i in changed]


def _memory(part: Part, changed: Changed) -> frozenset[int]:
    """Where these tensors lie; kept with the lease of a record."""
    known = part.known
    if known is None:
        return frozenset(addresses(part.tensors))
    if changed not in known.memory:
        known.memory[changed] = frozenset(addresses(_tensors(part, changed)))
    return known.memory[changed]


def _refuse(spent: Sequence[tuple[int, Changed]], parts: Sequence[Part], names: Sequence[str]) -> None:
    """Look closely: disjoint views of one storage, and tensors that do not change, may share."""
    changing = dict(spent)
    labelled: list[tuple[str, bool, torch.Tensor]] = []
    for place, (name, part) in enumerate(zip(names, parts, strict=True)):
        changed: Any = changing.get(place, ())
        moves = range(len(part.tensors)) if changed is None else changed
        labelled += [(name, i in moves, tensor) for i, tensor in enumerate(part.tensors)]
    for index, (name, moves, tensor) in enumerate(labelled):
        for other, also, second in labelled[index + 1 :]:
            if (moves or also) and overlap([tensor, second]) is not None:
                raise ModelError(
                    f"the step gives memory away with donate=True that two of its arguments hold: {name} and {other}."
                    " Copy first: ff.tree_map(torch.clone, ...)."
                )
