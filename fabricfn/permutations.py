"""Random permutations of 0 .. n-1 that are computed place by place: shuffling a billion samples needs no list.

[Note: permutation] The numbers are written as two digits of base ceil(sqrt(n)) and go through a Feistel network with
addition modulo the base, as in Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002,
https://eprint.iacr.org/2001/012), method "generalized Feistel"; what falls outside 0 .. n-1 goes through it again
("cycle walking": less than one in ten does for n > 500). The round function is the finaliser of SplitMix64 (Steele,
Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). Integers only, so that every machine and
every version of a library gives the same order.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fabricfn.random import Key, fold_in

NUM_ROUNDS = 16
"""Four are enough for large n (Luby and Rackoff 1988); with 8, neighbours at n = 16 are measurably not uniform."""
MIN_BASE = 4
"""Two digits of base 4 at least: on smaller squares a Feistel network reaches too few permutations."""
HALF = np.uint64(32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Permutation:
    """One permutation of 0 .. num - 1, as plain data."""

    num: int
    """How many numbers are permuted, 1 .. 2**63 - 1."""
    base: int
    """The base of the two digits; base**2 >= num."""
    round_keys: tuple[int, ...]
    """One 64-bit number per round."""


def make_permutation(num: int, key: Key) -> Permutation:
    """The permutation of 0 .. num - 1 that belongs to `key`."""
    base = max(MIN_BASE, math.isqrt(num - 1) + 1)
    return Permutation(num=num, base=base, round_keys=tuple(fold_in(key, i).bits for i in range(NUM_ROUNDS)))


def permuted(permutation: Permutation, places: NDArray[Any]) -> NDArray[np.int64]:
    """The numbers at `places` of the permuted sequence.

    Args:
        permutation: which permutation.
        places: integers 0 .. num - 1, of any shape but ().

    Returns:
        int64, of the shape of `places`.

    Example:
        >>> shuffle = make_permutation(10, Key(1))
        >>> sorted(permuted(shuffle, np.arange(10)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> permuted(shuffle, np.array([3])) == permuted(shuffle, np.arange(10))[3]
        array([ True])
    """
    values = _enciphered(permutation, places.astype(np.uint64))
    outside = values >= permutation.num
    while outside.any():
        values[outside] = _enciphered(permutation, values[outside])
        outside = values >= permutation.num
    return values.astype(np.int64)


def _enciphered(permutation: Permutation, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    base = np.uint64(permutation.base)
    right, left = np.divmod(values, base)
    for key in permutation.round_keys:
        digit = right + np.uint64(key)
        digit *= np.uint64(0xBF58476D1CE4E5B9)
        digit ^= digit >> HALF
        digit *= np.uint64(0x94D049BB133111EB)
        # The upper half scaled to 0 .. base - 1: uniform to 2**-32, and without a division.
        digit >>= HALF
        digit *= base
        digit >>= HALF
        digit += left
        # Modulo the base: below it, the subtraction wraps around to a huge number.
        left, right = right, np.minimum(digit, digit - base)
    right *= base
    right += left
    return right
