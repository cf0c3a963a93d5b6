"""torch's default dtype for a while. It is one for all threads, and ranks may be threads."""

import contextlib
import threading
from collections.abc import Generator

import torch

_LOCK = threading.Lock()
_INSIDE: list[int] = []
"""The threads that are inside, each as often as it has entered."""
_OUTSIDE = [torch.float32]
"""What the first of them found."""


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None) -> Generator[None]:
    """New floating tensors have this dtype; None leaves it as it is.

    Of several threads that are inside at a time the last one to leave restores what the first one found: if each
    restored what it had found, the dtype of one of them could stay for ever.
    """
    me = threading.get_ident()
    with _LOCK:
        before = torch.get_default_dtype()
        if not _INSIDE:
            _OUTSIDE[0] = before
        _INSIDE.append(me)
        torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.remove(me)
            if not _INSIDE:
                torch.set_default_dtype(_OUTSIDE[0])
            elif me in _INSIDE:
                torch.set_default_dtype(before)
