"""A keyed permutation of range(N), which shuffles without storing a list.

A Feistel network (Luby and Rackoff 1988) with cycle-walking (Black and Rogaway 2002), whose rounds are keyed by BLAKE2b.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

ROUNDS = 6

U64 = npt.NDArray[np.uint64]


def permute(values: U64, size: int, key: bytes) -> U64:
    """The images of `values` (each below `size`) under the permutation of range(size) that `key` names; vectorised.

    A balanced Feistel network over the next even number of bits; images beyond `size` are permuted again.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    subkeys = np.frombuffer(blake2b(key, digest_size=8 * ROUNDS).digest(), "<u8")

    def encipher(plain: U64) -> U64:
        left, right = plain >> half, plain & mask
        for subkey in subkeys:
            mixed = (right + subkey) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(0xD6E8FEB86659FD93)
            mixed ^= mixed >> np.uint64(29)
            left, right = right, left ^ (mixed & mask)
        return (left << half) | right

    images = encipher(values)
    outside = np.flatnonzero(images >= size)
    while outside.size:
        images[outside] = encipher(images[outside])
        outside = outside[images[outside] >= size]
    return images
