"""Boxes: blocks of an array's elements, by where they begin and how long they are. Plain numbers, no torch."""

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations

TANGLE = 32
"""So many boxes that no straight cut parts are compared in pairs; no writer makes more."""
LOOKS = 8
"""So often each box may be looked at in each dimension; a writer cuts along fewer dimensions than that."""


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A block of an array's elements."""

    offset: tuple[int, ...]
    """Where it begins, one number a dimension."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def end(self, dim: int) -> int:
        """Where it ends along a dimension."""
        return self.offset[dim] + self.shape[dim]


def whole(shape: Sequence[int]) -> Box:
    """All elements of an array of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def common(a: Box, b: Box) -> Box | None:
    """The elements that two boxes share; None when there are none."""
    offset = tuple(map(max, a.offset, b.offset))
    shape = tuple(min(a.end(dim), b.end(dim)) - begin for dim, begin in enumerate(offset))
    return None if any(length <= 0 for length in shape) else Box(offset, shape)


def within(box: Box, outer: Box) -> Box:
    """The same elements, counted from where `outer` begins."""
    return Box(tuple(a - b for a, b in zip(box.offset, outer.offset, strict=True)), box.shape)


def flaw(boxes: Sequence[Box], shape: Sequence[int]) -> str:
    """Why boxes inside an array are no partition of it; empty when each element belongs to exactly one of them."""
    total, found = math.prod(shape), sum(box.size for box in boxes)
    if not boxes or found < total:
        return f"the pieces of an array leave a gap: they do not have as many elements as the array ({found}, {total})"
    if _overlapping([box for box in boxes if box.size], len(shape)):
        return "two pieces of an array overlap, or lie as no writer cuts an array"
    assert found == total, "boxes inside an array that do not meet have no more elements than it"
    return ""


def _overlapping(boxes: list[Box], ndim: int) -> bool:
    """Whether two of the boxes meet: cut them apart, along any dimension, until one is left or none can be cut off.

    The work is bounded by the number of boxes; a hostile arrangement that needs more counts as an overlap.
    """
    open_, looks = [boxes], LOOKS * ndim * len(boxes)
    while open_:
        group = open_.pop()
        if len(group) < 2:
            continue
        for dim in range(ndim):
            looks -= len(group)
            parts = _cut(group, dim) if looks >= 0 else []
            if len(parts) > 1:
                open_ += parts
                break
        else:
            if len(group) > TANGLE or any(common(a, b) for a, b in combinations(group, 2)):
                return True
    return False


def _cut(boxes: list[Box], dim: int) -> list[list[Box]]:
    """The groups that straight cuts across a dimension part."""
    parts: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box.offset[dim]):
        if not parts or box.offset[dim] >= end:
            parts.append([])
        parts[-1].append(box)
        end = max(end, box.end(dim))
    return parts
