"""Sums in one fixed binary tree: the same bits, however many ranks share out the leaves.

[Note: one tree] Leaves 0 .. n - 1 are summed as a binary counter counts. A *block* is a run of leaves whose number is a
power of two that divides the place of its first leaf; two blocks that are the halves of a block become one, the left
one plus the right one, and in the end what is left over is added from the right. So the tree is a function of n alone.
A rank with a contiguous part of the leaves can form every block that lies inside its part: one if the part is a block
itself, at most 2 log2(n) otherwise. Only these blocks travel, and every rank goes on from there in the same way.

[Note: three ways] Where each rank has one block and the ranks are a power of two, they swap sums with a partner, then
with one at distance 2, 4, ... Otherwise small blocks travel to every rank, which adds them up; of large ones each rank
adds up its part only, and the parts are gathered, which moves no more than an all-reduce does. Measured: see
docs/decisions/0007-canonical.md.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from fabricfn.flat.buckets import LARGE, complete, join, plan, split
from fabricfn.flat.hosting import over_the_host
from fabricfn.flat.wire import Group, as_bytes, exchanged, gathered

T = TypeVar("T")

FEW = 4
"""Up to so many ranks swapping whole sums is not slower than adding them up in parts."""

Block = tuple[int, int]
"""(first leaf, number of leaves)."""
Stack = list[tuple[Block, T]]
"""Neighbouring blocks from left to right and the sum of each, none of which can be joined yet."""
Layout = Sequence[Sequence[Block]]
"""The blocks of each rank."""


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


@over_the_host
@torch.no_grad()
def sum_in_tree(stack: Stack[list[torch.Tensor]], count: int, group: Group) -> list[torch.Tensor]:
    """The sum of the leaves of all ranks, the same bits on every rank and for every number of ranks.

    Every rank must call it. See [Note: three ways].

    Args:
        stack: this rank's blocks, each a list of tensors; consumed. One rank gets its tensors back.
        count: the number of leaves of each rank, the same on all; not 0.
        group: the ranks.
    """
    if group is None:
        return fold(stack, add_lists)
    size = group.size()
    layout = [blocks_of(rank * count, count) for rank in range(size)]
    halves = size & (size - 1) == 0 and count & (count - 1) == 0
    first = stack[0][1]
    results: list[torch.Tensor | None] = [None] * len(first)
    for places in plan(first):
        shapes = [first[place].shape for place in places]
        blocks = [join([tensors[place] for place in places]) for _, tensors in stack]
        large = blocks[0].nbytes > LARGE
        if halves and (size <= FEW or not large):
            total = exchanged_by_halves(blocks[0], group)
        elif large:
            total = summed_in_parts(blocks, layout, group)
        else:
            total = summed_everywhere(blocks, layout, group)
        split(total, shapes, places, results)
    stack.clear()
    return complete(results)


def exchanged_by_halves(buffer: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[n], one block of the same size a rank -> [n]; the number of ranks is a power of two."""
    rank, distance = group.rank(), 1
    while buffer.numel() and distance < group.size():
        peer, other = rank ^ distance, torch.empty_like(buffer)
        sends = dist.P2POp(dist.isend, as_bytes(buffer), group=group, group_peer=peer)
        receives = dist.P2POp(dist.irecv, as_bytes(other), group=group, group_peer=peer)
        for work in dist.batch_isend_irecv([sends, receives]):
            work.wait()
        buffer = torch.add(buffer, other) if rank < peer else torch.add(other, buffer)
        distance *= 2
    return buffer


def summed_everywhere(blocks: list[torch.Tensor], layout: Layout, group: dist.ProcessGroup) -> torch.Tensor:
    """[n] a block -> [n]."""
    rows = blocks[0].new_zeros((max(map(len, layout)), blocks[0].numel()))
    torch.stack(blocks, out=rows[: len(blocks)])
    # a copy: alone in its bucket it would be a view that keeps the memory of all ranks' blocks
    return summed(gathered(rows.view(-1), group).view(len(layout), *rows.shape), layout).clone()


def summed_in_parts(blocks: list[torch.Tensor], layout: Layout, group: dist.ProcessGroup) -> torch.Tensor:
    """[n] a block -> [n]."""
    size, depth, numel = len(layout), max(map(len, layout)), blocks[0].numel()
    width = -(-numel // size)
    rows = blocks[0].new_zeros((size, depth, width))
    for rank in range(size):
        for row, block in zip(rows[rank], blocks, strict=False):
            part = block[rank * width : (rank + 1) * width]
            row[: part.numel()] = part
    mine = summed(exchanged(rows.view(size, -1), group).view(rows.shape), layout)
    return gathered(mine, group).view(-1)[:numel]


def summed(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
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
