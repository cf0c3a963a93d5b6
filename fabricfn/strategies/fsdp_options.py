"""What `fsdp` can be told beside its units: each option checked, and brought to torch's FSDPModule."""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from fabricfn.engine import Frame
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.strategies.shards import Shards
from fabricfn.strategies.units import Units
from fabricfn.strategy import Gradients
from fabricfn.world import World

Parameters = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None
"""Patterns of names, or a predicate `(name, parameter) -> bool`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """The options of `fsdp` that say how a net is cut over one axis of ranks; see there."""

    units: Units = "auto"
    reshard_after_forward: bool | int = True
    gather_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    gradient_divide_factor: float | None = None
    prefetch: int = 0
    ignored_params: Parameters = None


def check(cutting: Cutting) -> None:
    """Raise `ConfigurationError` where an option has no meaning."""
    reshard: Any = cutting.reshard_after_forward
    factor: Any = cutting.gradient_divide_factor
    prefetch: Any = cutting.prefetch
    ignored: Any = cutting.ignored_params
    if type(reshard) not in (bool, int) or (type(reshard) is int and reshard < 1):
        raise ConfigurationError(
            f"reshard_after_forward={reshard!r} must be True, False, or a whole number of ranks that keep a unit"
            " together, which divides their number."
        )
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise ConfigurationError(
            f"gradient_divide_factor={factor!r} must be a positive number, by which the sum of the ranks' gradients is"
            " divided; None is the number of ranks, which makes it the mean."
        )
    if type(prefetch) is not int or prefetch < 0:
        raise ConfigurationError(f"prefetch={prefetch!r} must be a whole number of units, at least 0.")
    named: list[Any] = [*ignored] if type(ignored) in (list, tuple) else [ignored]
    if not (ignored is None or callable(ignored) or all(isinstance(pattern, str) for pattern in named)):
        raise ConfigurationError(
            f'ignored_params={ignored!r} must be a pattern of names ("embed.*"), a list of them, or a predicate'
            " (name, parameter) -> bool."
        )


def check_reshard(reshard: bool | int, size: int) -> None:
    """Raise `ConfigurationError` unless a unit can be kept by so many ranks together."""
    if type(reshard) is int and size % reshard:
        raise ConfigurationError(
            f"reshard_after_forward={reshard} must divide the {size} ranks over which parameters are cut. Write True,"
            " False, or a divisor."
        )


def kept_whole(net: nn.Module, ignored: Parameters) -> set[nn.Parameter]:
    """The parameters that every rank holds whole: the scalars, and those that the user chose.

    Raises:
        ConfigurationError: a pattern fits no parameter.
    """
    named = dict(net.named_parameters())
    whole = {slot for slot in named.values() if slot.dim() == 0}
    if callable(ignored):
        return whole | {slot for name, slot in named.items() if ignored(name, slot)}
    for pattern in (ignored,) if isinstance(ignored, str) else ignored or ():
        found = fnmatch.filter(named, pattern)
        if not found:
            raise ConfigurationError(
                f"ignored_params: no parameter fits {pattern!r}; there are {', '.join([*named][:8])}"
                f"{', ...' if len(named) > 8 else ''}."
            )
        whole |= {named[name] for name in found}
    return whole


def offload_policy(cpu_offload: bool, device: torch.device) -> OffloadPolicy:
    """Where shards live. Memory is pinned where there is a device to copy to: without one torch raises."""
    return CPUOffloadPolicy(pin_memory=device.type != "cpu") if cpu_offload else OffloadPolicy()


def refuse_alone(cpu_offload: bool, device: torch.device) -> None:
    """Raise `CapabilityError` where one rank asks for offloading, which would silently not happen."""
    if cpu_offload and device.type != "cpu":
        raise CapabilityError(
            f"fsdp(cpu_offload=True) keeps parts of parameters on the CPU, but one rank has no parts: all would stay on"
            f' {device}. Start several ranks (devices=2), or write strategy="deepspeed_stage_3_offload".'
        )


def settle(box: Any, units: Sequence[str], device: torch.device, factor: float | None, prefetch: int) -> None:
    """The options that are methods of a module that is sharded already."""
    parts = [box.net.get_submodule(name) for name in units]
    if factor is not None:
        for part in (box, *parts):
            part.set_gradient_divide_factor(float(factor))
            part.set_force_sum_reduction_for_comms(device.type != "cuda")  # only NCCL multiplies before it adds
    if prefetch:
        box.set_modules_to_forward_prefetch(parts[:prefetch])
        for i, part in enumerate(parts):
            part.set_modules_to_forward_prefetch(parts[i + 1 : i + 1 + prefetch])
            part.set_modules_to_backward_prefetch(parts[max(0, i - prefetch) : i][::-1])


def divided(gradients: Gradients, factor: float | None) -> Gradients:
    """`gradients` of a strategy that divides by `factor`; what ranks hold whole comes as a mean and is put right."""
    if factor is None:
        return gradients

    def summed(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
        taken = gradients(frames, world, allow_unused=allow_unused)
        for frame, grads in zip(frames, taken, strict=True):
            params = frame.handle.params if isinstance(frame.handle, Shards) else [None] * len(grads)
            grads[:] = [
                grad if grad is None or param is not None else grad * (world.world_size / factor)
                for grad, param in zip(grads, params, strict=True)
            ]
        return taken

    return summed
