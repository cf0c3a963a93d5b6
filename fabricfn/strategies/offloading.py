"""What a forward pass keeps for the backward pass, in the memory of the CPU instead of the device.

As `torch.autograd.graph.save_on_cpu`, which takes parameters along, too, and loses strides, and with them the last bits
of products.
"""

from typing import Any

import torch
from torch import nn

from fabricfn.sharding import local_of

SMALL = 2**10
"""Bytes below which a tensor stays: the way would cost more."""


def offloaded(module: nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
    """The context in which the forward pass of a module keeps its activations in the memory of the CPU.

    Parameters stay where they are, and so does what is small, sparse, or one number in many places.
    """

    def pack(tensor: torch.Tensor) -> Any:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.nbytes < SMALL:
            return tensor
        storage = tensor.untyped_storage()
        # asked anew each time: fsdp has other tensors in these places while a unit computes
        at_home = {local_of(slot).untyped_storage()._cdata for slot in module.parameters()}
        if storage.nbytes() < tensor.nbytes or storage._cdata in at_home:
            return tensor
        pinned = tensor.is_cuda  # then the copies wait in the line of the kernels, and nobody for them
        away = torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=pinned)
        return away, tensor.device, tensor.stride()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def unpack(kept: Any) -> torch.Tensor:
    """The tensor on its device, with the strides that it had."""
    if isinstance(kept, torch.Tensor):
        return kept
    away, device, strides = kept
    if away.stride() == strides:
        return away.to(device, non_blocking=away.is_pinned())
    return torch.empty_strided(away.shape, strides, dtype=away.dtype, device=device).copy_(away)
