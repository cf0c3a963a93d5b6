"""While a run is under way, operations on tensors that are cut go by our rules.

In torch that is a switch of the process, and ranks may be threads of one process: so runs are counted. The rules of
losses stay on, since a graph may outlive its run (`ff.apply`); those of random numbers hold for equal generators only.
"""

import contextlib
import threading
from collections.abc import Generator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fabricfn.strategies import tensor_losses, tensor_random

RULES: dict[Any, Any] = {
    operation: torch.no_grad()(rule) for operation, rule in (tensor_losses.RULES | tensor_random.RULES).items()
}
_handlers: Any = DTensor._op_dispatcher  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType]


class _Switch:
    lock = threading.Lock()
    running = 0


@contextlib.contextmanager
def rules_of_ours() -> Generator[None]:
    """Within it, [Note: losses of parts] and [Note: numbers of parts] hold."""
    with _Switch.lock:
        _Switch.running += 1
        if _Switch.running == 1:
            _handlers._custom_op_handlers.update(RULES)
    try:
        yield
    finally:
        with _Switch.lock:
            _Switch.running -= 1
            if _Switch.running == 0:
                for operation in tensor_random.RULES:
                    _handlers._custom_op_handlers.pop(operation, None)
