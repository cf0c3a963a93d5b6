"""Who reads a checkpoint: a few threads, no more than a rank has cores; reading and checking let go of the GIL."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fabricfn.checkpoint.storage.objects import REQUESTS
from fabricfn.world import World, threads_each

READERS = 4
FEW_BYTES = 8 << 20
"""Below this, threads cost more than they save."""

Item = TypeVar("Item")
Value = TypeVar("Value")


def by_readers(
    world: World, work: Callable[[Item], Value], items: Collection[Item], nbytes: int, remote: bool = False
) -> list[Value]:
    """The work on each item, in their order; where all the cores have a rank of their own, on the calling thread.

    Args:
        world: how many ranks share this machine.
        work: reads one item.
        items: what is to be read.
        nbytes: what they hold together.
        remote: the bytes come over a network, and most of the time is waiting.
    """
    count = REQUESTS if remote else min(READERS, threads_each(world.local_world_size))
    if count == 1 or (nbytes < FEW_BYTES and not remote):
        return list(map(work, items))
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, items))
