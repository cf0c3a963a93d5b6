"""Buckets: which tensors of a list travel together in one flat buffer, and how they get in and out of it.

[Note: buckets] The latency of one collective is that of many kilobytes, so 200 tensors of 64 floats cost what one of
12800 costs, plus two copies. Above `LARGE` bytes the copies cost more than the latency, and a single tensor would only
pay for them.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch._utils import _flatten_dense_tensors  # pyright: ignore[reportUnknownVariableType]

Tensors = Sequence[torch.Tensor]

LARGE = 1 << 20
"""Bytes above which a tensor travels alone."""
FULL = 1 << 25
"""Bytes at which a buffer is closed and the next one begun, so that the copies stay small beside the data."""


def plan(tensors: Tensors, nbytes: Sequence[int] | None = None) -> list[list[int]]:
    """Places of the tensors that travel together: one dtype and device, small, in order."""
    closed: list[list[int]] = []
    current: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for place, tensor in enumerate(tensors):
        size = tensor.nbytes if nbytes is None else nbytes[place]
        key = (tensor.dtype, tensor.device)
        bucket, filled = current.get(key, (None, 0))
        if size > LARGE:
            closed.append([place])
        elif bucket is None or filled + size > FULL:
            current[key] = ([place], size)
            closed.append(current[key][0])
        else:
            bucket.append(place)
            current[key] = (bucket, filled + size)
    return closed


def join(tensors: Tensors) -> torch.Tensor:
    """One dimension, memory of its own."""
    if len(tensors) == 1:
        return tensors[0].detach().clone(memory_format=torch.contiguous_format).view(-1)
    return cast(torch.Tensor, _flatten_dense_tensors(tensors))


def join_rows(tensors: Tensors, size: int) -> torch.Tensor:
    """[size, n], memory of its own: the `size` parts of every tensor along its first dimension, side by side."""
    if len(tensors) == 1:
        return tensors[0].detach().clone(memory_format=torch.contiguous_format).view(size, tensors[0].numel() // size)
    return torch.cat([tensor.detach().reshape(size, tensor.numel() // size) for tensor in tensors], dim=1)


def split(
    buffer: torch.Tensor, shapes: Sequence[torch.Size], places: Sequence[int], results: list[torch.Tensor | None]
) -> None:
    """Cut the last dimension of the buffer into tensors of these shapes, each with memory of its own."""
    if len(places) == 1:
        results[places[0]] = buffer.view(shapes[0])
        return
    rows = buffer.shape[0] if buffer.dim() == 2 else 1
    sizes = [shape.numel() // rows for shape in shapes]
    # copies: views would share one version counter (an in-place change of one would break graphs over the others),
    # and keep, or save to disk, the memory of all
    pieces = cast("list[torch.Tensor]", torch.split_with_sizes_copy(buffer, sizes, dim=-1))
    for place, piece, shape in zip(places, pieces, shapes, strict=True):
        results[place] = piece if piece.shape == shape else piece.view(shape)


def complete(results: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """The results, now that there is one in every place."""
    present = [result for result in results if result is not None]
    assert len(present) == len(results)
    return present
