"""Random keys: explicit seeds that are folded, never a hidden global state.

A key is one 64-bit number. `fold_in(key, step)` gives the key of a step, `split(key, n)` gives n independent ones. The
names and the idea are JAX's (https://docs.jax.dev/en/latest/jax.random.html); the mixing is BLAKE2b.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Generator

import torch

from fabricfn.errors import ConfigurationError


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A source of randomness: plain data, 64 bits. The same key gives the same numbers, always and everywhere."""

    bits: int
    """0 .. 2**64 - 1."""

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A new `torch.Generator` on `device`, seeded by this key."""
        return torch.Generator(device).manual_seed(self.seed)

    @property
    def seed(self) -> int:
        """The key as torch's generators take it: a signed 64-bit integer."""
        return self.bits - (1 << 63)


def _mix(*numbers: int) -> int:
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def key(seed: int) -> Key:
    """The key of a seed. Not collective.

    Args:
        seed: any integer.

    Returns:
        A `Key`; the same one on every rank and every machine.

    Example:
        >>> from fabricfn import key
        >>> key(0) == key(0), key(0) == key(1)
        (True, False)
    """
    return Key(_mix(seed))


def check_key(key: object) -> None:
    """Raise `ConfigurationError` for anything else: a seed, a tensor that was meant to be an argument."""
    if type(key) is not Key:
        raise ConfigurationError(
            f"a random key is wanted, found {type(key).__name__}. Make one of a seed: ff.fold_in(ff.key(seed), step)."
        )


def fold_in(key: Key, data: int) -> Key:
    """The key for a number under a key. Not collective.

    Args:
        key: where the new key comes from; it stays as it is.
        data: any integer: a step, an epoch, an index, a rank.

    Returns:
        A `Key`, a function of `key` and `data` alone.

    Example:
        >>> from fabricfn import fold_in, key
        >>> fold_in(key(0), 3) == fold_in(key(0), 4)
        False
    """
    check_key(key)
    return Key(_mix(key.bits, data))


def split(key: Key, num: int = 2) -> tuple[Key, ...]:
    """Several independent keys, made of one. Not collective.

    Args:
        key: where the new keys come from; it stays as it is. Key i is `fold_in(key, i)`.
        num: how many.

    Returns:
        A tuple of `num` keys.

    Example:
        >>> from fabricfn import key, split
        >>> left, right = split(key(0))
        >>> left == right
        False
    """
    return tuple(fold_in(key, index) for index in range(num))


@contextlib.contextmanager
def seeded(key: Key, device: torch.device) -> Generator[None]:
    """Within the block the default generators of the CPU and of `device` start from `key`; then they are as before.

    Handling the generators' own state costs 2 us, `torch.manual_seed` 140 us (measured). Threads share the default
    generator, so randomness under threads-as-ranks is not reproducible.
    """
    check_key(key)
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(key.seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
