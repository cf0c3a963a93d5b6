"""Memory that a step gives away must be that of no other argument: the graph may write to it at any time."""

import operator
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from fabricfn.compiling.arguments import Part
from fabricfn.errors import ModelError
from fabricfn.states import addresses, overlap

Spent = Sequence[tuple[int, Sequence[int]]]
"""The places of the arguments that are given away, and which of its tensors change in each."""


class Guard:
    """Refuses overlaps. Records that a donated step handed on lie where the last ones did, and are not looked at."""

    def __init__(self) -> None:
        self.memories: list[Any] = []
        """What is known of the records of the last call."""
        self.starts: list[int] = []
        self.ends: list[int] = []
        """Where the tensors lie that change, in order."""

    def check(self, spent: Spent, parts: Sequence[Part], names: Sequence[str]) -> None:
        """Raise `ModelError` if a tensor that will change in place lies in the memory of another one."""
        memories = [part.known.memory for part in parts if part.known is not None]
        if len(memories) != len(self.memories) or not all(map(operator.is_, memories, self.memories)):
            refuse_overlaps(spent, parts, names)
            written = sorted(_span(parts[place].tensors[i]) for place, changed in spent for i in changed)
            self.starts, self.ends = [start for start, _ in written], [end for _, end in written]
            self.memories = memories
        for part in parts:
            if part.known is None:
                for tensor in part.tensors:
                    start, end = _span(tensor)
                    place = bisect_left(self.starts, end)
                    if place and self.ends[place - 1] > start:
                        refuse_overlaps(spent, parts, names)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the first number begins and the last one ends."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return start, start + reach * tensor.itemsize


def refuse_overlaps(spent: Spent, parts: Sequence[Part], names: Sequence[str]) -> None:
    """Look at every tensor. Disjoint views of one storage may be there, and what does not change may be shared."""
    changing = dict(spent)
    moving: list[tuple[str, torch.Tensor]] = []
    still: list[tuple[str, torch.Tensor]] = []
    for place, (name, part) in enumerate(zip(names, parts, strict=True)):
        changed = changing.get(place, ())
        for i, tensor in enumerate(part.tensors):
            (moving if i in changed else still).append((name, tensor))
    found = overlap([tensor for _, tensor in moving])
    if found is not None:
        _refuse(moving[found[0]][0], moving[found[1]][0])
    places = frozenset(addresses([tensor for _, tensor in moving]))
    for name, tensor in still:
        if not places.isdisjoint(addresses([tensor])):
            for other, written in moving:
                if overlap([tensor, written]) is not None:
                    _refuse(other, name)


def _refuse(one: str, other: str) -> None:
    raise ModelError(
        f"the step gives memory away with donate=True that two of its arguments hold: {one} and {other}. Copy first:"
        " ff.tree_map(torch.clone, ...)."
    )
