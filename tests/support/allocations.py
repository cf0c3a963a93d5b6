"""What a function allocates, in bytes.

Counted by torch's profiler, which hears of every allocation of this thread from the allocator itself: also of what an
operation needs for itself and drops, of what C++ alone makes (gradients, FSDP's buffers), and of when memory is let go.
A dispatch mode would see results of operations only, and the process's own size is rounded, shared and late.
"""

import gc
import itertools

from torch.autograd.profiler import profile


def allocations(fn):
    """(result, the bytes of each allocation, those of what was let go being negative)."""
    gc.disable()  # what waits for the collector counts as held
    try:
        with profile(profile_memory=True) as profiler:
            result = fn()
    finally:
        gc.enable()
    found = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]


def peak(sizes):
    return max(itertools.accumulate(sizes), default=0)


def made(sizes):
    return sum(size for size in sizes if size > 0)
