"""Data parallel on the devices of XLA (TPU, or PJRT_DEVICE=CPU) by the package torch_xla: one rank a device.

XLA's tensors are lazy: operations are written down until `settle`. So a step is two graphs, the pass and the optimizer,
each compiled once. Decisions and traps: docs/decisions/0014-xla.md.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fabricfn.engine import Frame
from fabricfn.strategies.functional import (
    forward as run_forward,
    functional,
    gradients as take,
    mean_in as mean_over_host,
)
from fabricfn.strategies.xla_package import mean_over_replicas, settle, spans
from fabricfn.strategy import Strategy
from fabricfn.world import World


def xla() -> Strategy:
    """Replicas on the devices of XLA, by the package torch_xla (`pip install "fabricfn[xla]"`) and its torch 2.9.

    `init_runtime(strategy="xla")` means `accelerator="xla"`; the environment variable PJRT_DEVICE says which hardware
    that is. Gradients are averaged by XLA where it reaches all ranks, on TPUs that is; everything else that travels
    between ranks goes over the host, by gloo. Several TPUs are untested on hardware.

    Raises:
        CapabilityError: (from init_runtime) torch_xla is missing, or does not fit this torch.

    Example:
        >>> xla().name
        'xla'
    """
    return dataclasses.replace(functional(), name="xla", forward=forward, gradients=gradients, settle=settle)


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets; a graph of its own begins with it, so that each pass is compiled once."""
    settle()
    return run_forward(frames, fn, sync=sync, loss_fn=loss_fn)


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """The means over ranks, computed together with the loss."""
    taken = take(frames, world, allow_unused=allow_unused, mean=mean_in)
    settle()
    return taken


def mean_in(dtype: torch.dtype | None, grads: Sequence[torch.Tensor], group: Any) -> Sequence[torch.Tensor]:
    """As `functional.mean_in`, by XLA itself where it can."""
    if not spans(group.size()):
        return mean_over_host(dtype, grads, group)
    means = mean_over_replicas([grad if dtype is None else grad.to(dtype) for grad in grads])
    return [mean.to(grad.dtype) for mean, grad in zip(means, grads, strict=True)]
