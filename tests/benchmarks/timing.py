"""How all of this is measured: contenders take turns in one process; medians are compared; a twin shows the noise."""

import random
import statistics
import time
from collections.abc import Callable

import torch

Contenders = dict[str, Callable[[], object]]
IN_A_ROW = 10
"""Short steps between two looks at the clock: in a loop a step comes after its like. After eight others it finds cold
caches (4 layers: 0.52 of the loop by hand in place of 0.48), and nobody waits for a GPU after each."""


def clock_of(device: str) -> Callable[[], float]:
    """Wall time, once all that a GPU was given is done."""

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now if device == "cuda" else time.perf_counter


def interleaved(
    contenders: Contenders,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    warmup: int = 10,
    between: Callable[[], object] = lambda: None,
    again: bool = False,
    in_a_row: int = 1,
) -> dict[str, float]:
    """The median seconds of each contender, for one of so many calls in a row.

    In every round each contender has its turn, in a shuffled order (the same on all ranks), so that whatever slows the
    machine for a while slows all of them, and nobody always runs after the same neighbour. `between` runs before each
    turn, unmeasured. With `again` each contender is called once more before, unmeasured: it finds the free memory as
    its own kind left it. The host of a virtual machine supplies pages that were not in use for some seconds again, one
    by one as they are written to, which made the same copy of 384 MiB into the page cache take 0.1 to 0.9 s.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(0)
    names = list(contenders)
    for index in range(warmup + rounds):
        order.shuffle(names)
        for name in names:
            call = contenders[name]
            between()
            if again:
                call()
                between()
            start = clock()
            for _ in range(in_a_row):
                call()
            elapsed = clock() - start
            if index >= warmup:
                times[name].append(elapsed / in_a_row)
    return {name: statistics.median(values) for name, values in times.items()}
