"""Random numbers by counter: a number's bits mixed until nothing of it shows. No state, any of them at once.

SplitMix64's finaliser (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # odd, its bits irregular: multiples of it are far apart modulo 2**64
WORD = (1 << 64) - 1


def mix(values: np.ndarray) -> np.ndarray:
    """Maps uint64 values one to one onto uint64 values that look drawn; `values` is overwritten with them."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def streams(seed: int, purpose: int, numbers: np.ndarray) -> np.ndarray:
    """Where the draws of each of `numbers`, int64 [n], begin: uint64 [n]. Draw i of stream s is mix(s + i * GOLDEN)."""
    salt = mix(np.array([(seed * GOLDEN + purpose) & WORD], dtype=np.uint64))
    return mix(mix(numbers.astype(np.uint64) + np.uint64(GOLDEN)) ^ salt)
