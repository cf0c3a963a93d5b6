"""Whether a step is being traced: `compile_step` runs it once with tensors that have shapes and no numbers.

[Note: traced] What a traced step computes becomes a graph, so nothing may depend on a number in it: no question to a
tensor, no message to another rank but by an operation of the graph. The few places where the eager way needs either
ask `tracing()`, none of them for each parameter.
"""

import torch

_mode_of = torch._C._get_dispatch_mode
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def tracing() -> bool:
    """Whether this thread writes down operations instead of computing (60 ns)."""
    return _mode_of(_PROXY) is not None
