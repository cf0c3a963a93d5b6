"""Random generators that are not ours: those of torch, numpy and Python, global ones and a user's own.

[Note: seeding of workers] A worker of a DataLoader draws augmentations from its global generators. They are seeded
anew for every batch, from (seed, epoch, place of the batch in the global order): so the same run gives the same
augmentations with any number of workers, with persistent ones, and after a stop in the middle of an epoch. Neither
dataset nor collate function is touched: the list of indices that travels to the worker brings the seed along.
"""

import contextlib
import hashlib
import pickle
import random
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import get_worker_info

from fabricfn.random import Key, fold_in

GLOBAL: tuple[Any, ...] = (torch.default_generator, np.random, random)
"""The generators that every part of a process shares; the two modules have the methods of their classes."""
BORROWING = threading.Lock()
"""Held while the generators of this process are borrowed: ranks may be threads of one process."""


def get_state(generator: Any) -> Any:
    """The state of a generator of any of the three libraries."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if generator is np.random or isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Put a generator back to `state`, which `get_state` returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, torch.Generator) or generator is np.random or hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.setstate(state)


def seed_by(generator: Any, key: Key) -> None:
    """Start a generator of any of the three libraries from a key."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(key.seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(key.bits).state
    elif generator is np.random or isinstance(generator, np.random.RandomState):
        generator.seed([key.bits & 0xFFFFFFFF, key.bits >> 32])
    else:
        generator.seed(key.bits)


def seed_all(key: Key) -> None:
    """Start the global generators from a key, each from a seed of its own."""
    for place, generator in enumerate(GLOBAL):
        seed_by(generator, fold_in(key, place))


def fingerprint(generator: Any) -> int:
    """A number that is equal for generators in the same state, in every process."""
    state = get_state(generator)
    data = state.numpy().tobytes() if isinstance(state, torch.Tensor) else pickle.dumps(state)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@contextlib.contextmanager
def borrowed(keys: Iterable[tuple[Any, Key]]) -> Generator[None]:
    """Within the block these generators start from these keys; then they are as before."""
    pairs = list(keys)
    with BORROWING:
        states = [get_state(generator) for generator, _ in pairs]
        try:
            for generator, key in pairs:
                seed_by(generator, key)
            yield
        finally:
            for (generator, _), state in zip(pairs, states, strict=True):
                set_state(generator, state)


def generators_in(thing: object) -> dict[int, Any]:
    """The random generators that an object holds in its attributes, and in those of the objects that it wraps there.

    Returns:
        id -> generator, in the order in which they are met, which is the same on all ranks.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()
    waiting: list[object] = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            found[id(one)] = one
        elif one is thing or isinstance(one, torch.utils.data.Sampler):
            waiting.extend(cast("Mapping[str, object]", getattr(cast(object, one), "__dict__", {})).values())
    return found


class Seeded(list[Any]):
    """The indices of one batch. Going through them in a worker first seeds its global generators."""

    __slots__ = ("bits",)

    def __init__(self, indices: Iterable[Any], bits: int) -> None:
        super().__init__(indices)
        self.bits = bits

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            seed_all(Key(self.bits))
        return super().__iter__()

    # The default goes through the list, in the process that sends it.
    def __reduce__(self) -> tuple[Any, ...]:
        return Seeded, (self[:], self.bits)
