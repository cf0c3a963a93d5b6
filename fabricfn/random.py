"""Random keys: explicit seeds that are folded, never a hidden global state.

A key is one 64-bit number. `fold_in(key, step)` gives the key of a step, `split(key, n)` gives n independent ones. The
names and the idea are JAX's (https://docs.jax.dev/en/latest/jax.random.html); the mixing is BLAKE2b.
"""

import dataclasses
import hashlib
import sys
from importlib import import_module
from typing import Any, cast

import torch

from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.tracing import Unknown, tracing

CPU = torch.device("cpu")
SIGN = 1 << 63


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A source of randomness: plain data, 64 bits. The same key gives the same numbers, always and everywhere."""

    bits: int
    """0 .. 2**64 - 1. In a step that is traced, what stands for them: `folded(data)`, `enter()`, `leave()`."""

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A new `torch.Generator` on `device`, seeded by this key."""
        return torch.Generator(device).manual_seed(self.seed)

    @property
    def seed(self) -> int:
        """The key as torch's generators take it: 0 .. 2**64 - 1. (A negative one costs them twice the time.)"""
        return self.bits ^ SIGN


def _mix(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _under(bits: Any, data: Any) -> Any:
    if type(bits) is not int:
        return bits.folded(data)
    return cast("Any", data).under(bits) if isinstance(data, Unknown) else _mix(b"%d,%d" % (bits, data))


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
    return Key(_mix(b"%d" % seed))


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
    return Key(_under(key.bits, data))


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


class seeded:
    """Within the block the default generators of the CPU and of `device` start from `key`; then they are as before.

    With `index` they start from `fold_in(key, index)`, without making that key. The generators are asked themselves:
    3 us alone, about 10 within a step (measured), where `torch.manual_seed`, which visits every kind of device, takes
    130 and 230. Threads share the default generator: under threads-as-ranks randomness is not reproducible.
    """

    # A class with slots: contextlib.contextmanager would add as much again as the generators cost.
    __slots__ = ("_other", "_other_state", "_seed", "_state")

    def __init__(self, key: Key, device: torch.device, index: int | None = None) -> None:
        check_key(key)
        bits = key.bits if index is None else _under(key.bits, index)
        self._seed: Any = bits ^ SIGN if type(bits) is int else bits
        self._other = None if device == CPU else device_generator(device)

    def __enter__(self) -> None:
        if tracing():
            self._enter_traced()
            return
        self._state = torch.default_generator.get_state()
        if self._other is not None:
            self._other_state = self._other.get_state()
            self._other.manual_seed(self._seed)
        torch.default_generator.manual_seed(self._seed)

    def _enter_traced(self) -> None:
        if type(self._seed) is int:
            raise CapabilityError(
                "a compiled step takes its random key as an argument, or folds opt.step into it: this one would give"
                " the same numbers in every step. Write rng=ff.fold_in(key, opt.step), or step(model, ..., rng)."
            )
        self._seed.enter()

    def __exit__(self, *_: object) -> None:
        if type(self._seed) is not int:
            self._seed.leave()
            return
        torch.default_generator.set_state(self._state)
        if self._other is not None:
            self._other.set_state(self._other_state)


class XlaGenerator:
    """The random numbers of an XLA device as a generator: its state is one number, which each graph moves on."""

    def __init__(self, device: torch.device) -> None:
        self.device = str(device)
        self.model: Any = import_module("torch_xla.core.xla_model")

    def get_state(self) -> Any:
        """The number."""
        return self.model.get_rng_state(self.device)

    def set_state(self, state: Any) -> None:
        """Go on from there."""
        self.model.set_rng_state(state, self.device)

    def manual_seed(self, seed: int) -> None:
        """Start from a seed of 64 bits."""
        self.set_state(seed)


def device_generator(device: torch.device) -> torch.Generator:
    """The generator that random layers on a device draw from; the current device's where `device` has no index.

    Initialises an accelerator when nothing did so before.
    """
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    if device.type == "xla" and "torch_xla" in sys.modules:
        return cast("torch.Generator", XlaGenerator(device))
    module: Any = getattr(torch, device.type, None)
    if device.type in ("cuda", "xpu", "mtia"):
        module.init()  # before that they have no generators
    generators: Any = getattr(module, "default_generators", None)  # a back end from outside torch may have none
    if generators is None:
        raise CapabilityError(
            f"random keys do not reach the generator of {device}: torch.{device.type}.default_generators is missing."
            " Leave rng= out there and seed with ff.seed_everything(seed)."
        )
    index = cast("int | None", device.index)
    return generators[module.current_device() if index is None else index]
