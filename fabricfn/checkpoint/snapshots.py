"""A copy of what a rank writes, in host memory that is kept from save to save: fresh pages cost several copies."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64
"""A multiple of the size of every element."""


def snapshot(arrays: Sequence[Any], buffer: torch.Tensor | None) -> tuple[list[Any], torch.Tensor]:
    """Copies of tensors and numpy arrays, as numpy arrays of bytes; finished when this returns.

    Args:
        arrays: tensors of any device and stride, numpy arrays and numbers, None for nothing.
        buffer: what an earlier call returned; nothing uses it any more. It is taken if it is large enough.

    Returns:
        the copies, and the memory that they are in: pinned when some of the tensors were on a CUDA device.
    """
    sizes = [0 if array is None else int(array.nbytes) for array in arrays]
    padded = (math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes)
    starts = list(itertools.accumulate(padded, initial=0))
    devices = {array.device for array in arrays if isinstance(array, torch.Tensor) and array.is_cuda}
    # a buffer that was made in inference mode could not be filled outside of it
    with torch.inference_mode(False), torch.no_grad():
        if buffer is None or buffer.numel() < starts[-1] or (devices and not buffer.is_pinned()):
            del buffer  # before there is another one
            buffer = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=bool(devices))
        memory = buffer.numpy()
        copies = [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        for array, start, copy in zip(arrays, starts, copies, strict=False):
            if isinstance(array, torch.Tensor):
                _copy(array, buffer[start : start + copy.nbytes])
            elif array is not None:
                np.copyto(copy.view(array.dtype).reshape(array.shape), array)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
    return copies, buffer


def _copy(tensor: torch.Tensor, into: torch.Tensor) -> None:
    tensor = tensor.detach()
    if tensor.element_size() == 1:  # any bits, and dtypes for which torch has no copy
        tensor = tensor.view(torch.uint8)
    into.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=tensor.is_cuda)
