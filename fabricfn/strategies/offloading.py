"""What a forward pass keeps for the backward pass, in the memory of the CPU instead of the device.

As `torch.autograd.graph.save_on_cpu`, which takes parameters along, too, and loses strides, and with them the last bits
of products.
"""

from typing import Any

import torch
from torch import nn

from fabricfn.sharding import local_of

SMALL = 2**10
"""Bytes below which a copy stays on the device: the way would cost more."""


def offloaded(module: nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
    """The context in which the forward pass of a module keeps its activations in the memory of the CPU.

    Parameters stay where they are, and so does what is sparse, or one number in many places.
    """

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or stays(tensor, module):
            return tensor, None, tensor._version
        small = tensor.nbytes < SMALL
        home = tensor.device if small else torch.device("cpu")
        pinned = tensor.is_cuda and not small  # then copies wait in the line of the kernels
        away = torch.empty_like(tensor, device=home, pin_memory=pinned).copy_(tensor, non_blocking=pinned)
        return away, tensor.device, tensor.stride()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def stays(tensor: torch.Tensor, module: nn.Module) -> bool:
    """Whether it is there anyway, or a copy of it would be larger."""
    storage = tensor.untyped_storage()
    if storage.nbytes() < tensor.nbytes:
        return True
    # asked anew each time: fsdp has other tensors in these places while a unit computes
    return any(local_of(slot).untyped_storage()._cdata == storage._cdata for slot in module.parameters())


def unpack(kept: tuple[torch.Tensor, Any, Any]) -> torch.Tensor:
    """The tensor on its device, with the strides that it had.

    Raises:
        RuntimeError: one that stayed was changed; autograd does not look at versions where there are hooks.
    """
    tensor, device, known = kept
    if device is None:
        if tensor._version != known:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a"
                f" tensor of shape {tuple(tensor.shape)} in a module whose activations are offloaded."
            )
        return tensor
    if tensor.stride() == known:
        return tensor.to(device, non_blocking=tensor.is_pinned())
    return torch.empty_strided(tensor.shape, known, dtype=tensor.dtype, device=device).copy_(tensor)
