"""Sums in one fixed binary tree: the same bits, however many ranks share out the leaves.

[Note: one tree] Leaves 0 .. n - 1 are summed as a binary counter counts. A *block* is a run of leaves whose number is a
power of two that divides the place of its first leaf; two blocks that are the halves of a block become one, the left
one plus the right one, and in the end what is left over is added from the right. So the tree is a function of n alone.
A rank with a contiguous part of the leaves can form every block that lies inside its part: one if the part is a block
itself, at most 2 log2(n) otherwise. Only these blocks travel, and every rank goes on from there in the same way.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fabricfn.flat.buckets import LARGE, complete, plan, split
from fabricfn.flat.wire import Group, exchanged, gathered, group_size

T = TypeVar("T")

Block = tuple[int, int]
"""(first leaf, number of leaves)."""
Stack = list[tuple[Block, T]]
"""Neighbouring blocks from left to right and the sum of each, none of which can be joined yet."""


def push(stack: Stack[T], block: Block, value: T, add: Callable[[T, T], T]) -> None:
    """Put the next block on the stack and join what can be joined. See [Note: one tree].

    Args:
        stack: changed in place.
        block: begins where the last one of the stack ends.
        value: the sum of its leaves.
        add: (left, right) -> sum; may write into the left one.
    """
    first, size = block
    while stack and stack[-1][0][1] == size and first // size % 2:
        (first, _), left = stack.pop()
        value = add(left, value)
        size *= 2
    stack.append(((first, size), value))


def fold(stack: Stack[T], add: Callable[[T, T], T]) -> T:
    """The sum of the whole stack, which is empty afterwards; it begins with leaf 0."""
    value = stack.pop()[1]
    while stack:
        value = add(stack.pop()[1], value)
    return value


def blocks_of(first: int, count: int) -> list[Block]:
    """The blocks that a rank with these leaves ends up with."""
    found: list[Block] = []
    end = first + count
    while first < end:
        size = first & -first or 1 << (end - first).bit_length()
        while size > end - first:
            size //= 2
        found.append((first, size))
        first += size
    return found


@torch.no_grad()
def sum_in_tree(stack: Stack[list[torch.Tensor]], counts: Sequence[int], group: Group) -> list[torch.Tensor]:
    """The sum of the leaves of all ranks, the same bits on every rank and for every `counts` with the same sum.

    Every rank must call it. Small tensors travel to every rank, which adds them up; of large ones each rank adds up its
    part only, and the parts are gathered, which moves no more than an all-reduce does.

    Args:
        stack: this rank's blocks, each a list of tensors; consumed. One rank gets its tensors back.
        counts: the number of leaves of each rank, in the order of the ranks; none is 0.
        group: the ranks.
    """
    if group is None:
        return fold(stack, add_lists)
    layout = [blocks_of(sum(counts[:rank]), count) for rank, count in enumerate(counts)]
    depth = max(map(len, layout))
    shapes = [tensor.shape for tensor in stack[0][1]]
    results: list[torch.Tensor | None] = [None] * len(shapes)
    for places in plan(stack[0][1]):
        numel = sum(shapes[place].numel() for place in places)
        share = group_size(group) if numel * stack[0][1][places[0]].itemsize > LARGE else 1
        width = -(-numel // share)
        # rank, block, element: what each rank adds up
        rows = stack[0][1][places[0]].new_zeros((share, depth, width))
        for place_in_stack, (_, tensors) in enumerate(stack):
            flat = torch.cat([tensors[place].reshape(-1) for place in places])
            for rank in range(share):
                part = flat[rank * width : (rank + 1) * width]
                rows[rank, place_in_stack, : part.numel()] = part
        if share == 1:
            # a copy: alone in its bucket it would be a view that keeps the memory of all ranks' blocks
            total = summed(gathered(rows.view(-1), group).view(-1, depth, width), layout).clone()
        else:
            mine = summed(exchanged(rows.view(share, -1), group).view(-1, depth, width), layout)
            total = gathered(mine, group).view(-1)[:numel]
        split(total, [shapes[place] for place in places], places, results)
    stack.clear()
    return complete(results)


def summed(rows: torch.Tensor, layout: Sequence[Sequence[Block]]) -> torch.Tensor:
    """[rank, block, n] -> [n]: the end of the tree; `rows` is written into."""
    stack: Stack[torch.Tensor] = []
    for blocks, values in zip(layout, rows, strict=True):
        for place, block in enumerate(blocks):
            push(stack, block, values[place], torch.Tensor.add_)
    return fold(stack, torch.Tensor.add_)


def add_lists(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sums, in the memory of the left ones."""
    if left:
        torch._foreach_add_(left, right)  # pyright: ignore[reportPrivateImportUsage]
    return left
