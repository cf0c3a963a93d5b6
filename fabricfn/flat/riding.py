"""Small tensors that ride along with another message: words that every rank gathers anyway.

The latency of a message of 512 bytes is that of 32, so a loss that is reduced, or a count that is gathered, costs one
message instead of two.
"""

import torch

from fabricfn.flat.buckets import Tensors, complete, join, plan, split
from fabricfn.flat.wire import COMBINE, Group, as_bytes, divide, floats_for_means

ROOM = 60
"""Words of 64 bits."""
LEAVES = 16
"""As many tensors ride along; to pack more costs what is won."""
_WORD = 16
"""Bytes of which each buffer takes a multiple, so that the next one begins where its numbers may begin."""


def loaded(tensors: Tensors) -> torch.Tensor | None:
    """The tensors as [ROOM] words; None where they are too many or too large, or lie on an accelerator."""
    if len(tensors) > LEAVES or any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    if sum(-(-tensor.nbytes // _WORD) for tensor in tensors) * _WORD > ROOM * 8:
        return None
    words = torch.zeros(ROOM, dtype=torch.int64)
    room, begin = as_bytes(words), 0
    for places in plan(tensors):
        buffer = as_bytes(join([tensors[place] for place in places]))
        room[begin : begin + buffer.numel()] = buffer
        begin += -(-buffer.numel() // _WORD) * _WORD
    return words


@torch.no_grad()
def unloaded(rows: torch.Tensor, tensors: Tensors) -> list[torch.Tensor]:
    """[size, ROOM] words, and this rank's tensors -> the ranks' tensors stacked: [*s] becomes [size, *s]."""
    results: list[torch.Tensor | None] = [None] * len(tensors)
    size, begin = rows.shape[0], 0
    room = as_bytes(rows)
    for places in plan(tensors):
        part = [tensors[place] for place in places]
        nbytes = sum(tensor.nbytes for tensor in part)
        buffer = room[:, begin : begin + nbytes].contiguous().view(part[0].dtype)
        split(buffer, [torch.Size((size, *tensor.shape)) for tensor in part], places, results)
        begin += -(-nbytes // _WORD) * _WORD
    return complete(results)


@torch.no_grad()
def combined(rows: Tensors, group: Group, op: str) -> list[torch.Tensor]:
    """[size, *s] -> [*s]: the reduction, in the order of the ranks; the same bits on every rank."""
    results: list[torch.Tensor] = []
    for row in floats_for_means(rows, op):
        divide(row, group, op, early=True)
        results.append(COMBINE["sum" if op == "mean" else op](row))
        divide(results[-1], group, op, early=False)
    return results
