"""Whether a step is being traced: `compile_step` runs it once with tensors that have shapes and no numbers.

[Note: traced] What a traced step computes becomes a graph, so nothing may depend on a number in it: no question to a
tensor, no message to another rank but by an operation of the graph. The few places where the eager way needs either
ask `tracing()`, none of them for each parameter.
"""

from collections.abc import Callable
from typing import Any

import torch

_mode_of = torch._C._get_dispatch_mode
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def tracing() -> bool:
    """Whether this thread writes down operations instead of computing (60 ns)."""
    return _mode_of(_PROXY) is not None


class Unknown:
    """What stands in a traced step for a number that only the host knows, at every call: [Note: hosted]."""

    __slots__ = ()


def refuse_later(refused: torch.Tensor, error: Callable[[], Exception]) -> None:
    """For a question that a traced step cannot ask: where this number is true the host raises the error afterwards."""
    mode: Any = _mode_of(_PROXY)
    mode.tracer.refusals.append((refused, error))


def times(tensor: torch.Tensor, number: Any) -> torch.Tensor:
    """A tensor times a number that may be one of a graph; as with Python's numbers, the dtype stays."""
    if not isinstance(number, torch.Tensor):
        return tensor * number
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * number).to(tensor.dtype)
