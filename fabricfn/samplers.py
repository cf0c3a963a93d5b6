"""A user's own sampler as a global order: gone through whole, at the start of an epoch, the same on every rank.

[Note: samplers] What a sampler or a batch sampler yields in one pass is the global order of that epoch, whatever it is:
weighted, with repetitions, a part of the data, sorted by length. Before the pass it is told the epoch (`set_epoch`,
where it has that), and the random generators that it may draw from (the global ones, and those in its attributes)
start from (seed, epoch) and, for its own ones, from the state in which the user handed them over. So the order is a
function of (seed, epoch), and the generators are put back afterwards. No sample is read.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from fabricfn.errors import DataError
from fabricfn.order import stream
from fabricfn.random import fold_in
from fabricfn.seeding import GLOBAL, borrowed, fingerprint, generators_in

MAX_PASSES = 100
"""A sampler that yields more than so many times the data set in one pass is taken for an endless one."""
NESTED = ("sampler", "batch_sampler")


class Ordering:
    """A user's sampler, and what is known of it from the time of set-up."""

    def __init__(self, sampler: Any, dataset: object, argument: str) -> None:
        self.sampler = sampler
        self.name = f"{argument}={type(sampler).__name__}"
        self.limit = MAX_PASSES * max(length_of(sampler), length_of(dataset), 0)
        self.own = [(one, fingerprint(one)) for one in generators_in(sampler).values()]

    def draw(self, seed: int, epoch: int) -> list[Any]:
        """What the sampler yields in that epoch.

        Raises:
            DataError: it yields nothing, or does not end.
        """
        if self.limit <= 0:
            raise DataError(
                f"{self.name} has no length, nor has the dataset, so fabricfn cannot tell whether it ever ends. Give"
                " it __len__; or let it share out the data over the ranks by itself: ff.setup_dataloader(rt, loader,"
                " shard=False)."
            )
        key = stream(seed, epoch, "sampler")
        keys = [(one, fold_in(key, place)) for place, one in enumerate(GLOBAL)]
        keys += [(one, fold_in(key, state)) for one, state in self.own]
        tell_epoch(self.sampler, epoch)
        with borrowed(keys):
            found: Iterator[Any] = iter(self.sampler)
            order = list(itertools.islice(found, self.limit + 1))
        if not 0 < len(order) <= self.limit:
            raise DataError(
                f"{self.name} yielded {'nothing' if not order else f'more than {self.limit} items'} in epoch {epoch};"
                " it must yield the order of one epoch and end. An endless sampler shares out the data over the ranks"
                " by itself: ff.setup_dataloader(rt, loader, shard=False)."
            )
        return order


def tell_epoch(sampler: object, epoch: int) -> None:
    """Call `set_epoch` of a sampler and of those it wraps, where they have that."""
    told: list[object] = []
    waiting = [sampler]
    while waiting:
        one = waiting.pop()
        if one is None or any(one is other for other in told):
            continue
        told.append(one)
        set_epoch = getattr(one, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        waiting += [getattr(one, name, None) for name in NESTED]


def length_of(thing: Any) -> int:
    """`len(thing)`; -1 where it has none."""
    try:
        return len(thing)
    except (TypeError, NotImplementedError, AttributeError, ValueError):  # a __len__ that does not know it yet
        return -1


def order_digest(order: Iterable[Any]) -> str:
    """Equal for equal orders, in every process."""
    items = list(order)
    if all(type(item) is int for item in items):
        data = np.array(items, dtype=np.int64).tobytes() if fits_64(items) else repr(items).encode()
    else:
        data = "\n".join(map(_text, items)).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def fits_64(items: Sequence[int]) -> bool:
    """Whether all of them are 64-bit integers."""
    return not items or (min(items) >= -(1 << 63) and max(items) < 1 << 63)


def _text(item: Any) -> str:
    """What must be equal on all ranks about an index; an object without a text of its own counts by its type."""
    if isinstance(item, list | tuple):
        return f"[{','.join(map(_text, cast('Iterable[Any]', item)))}]"
    text = repr(item)
    return type(item).__qualname__ if " at 0x" in text else text


def rows_of(batch: Any, name: str) -> list[Any]:
    """The indices of a batch, as a list.

    Raises:
        DataError: it is no sequence of indices.
    """
    if isinstance(batch, str) or not isinstance(batch, Iterable):
        raise DataError(f"{name} must yield lists of indices, but a {type(batch).__name__} came. Yield [index, ...].")
    return list(cast("Iterable[Any]", batch))
