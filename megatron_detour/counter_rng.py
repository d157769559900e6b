"""Counter-based random numbers: stateless, so that any draw can be computed independently.

SplitMix64's finalizer (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # odd, with irregular bits: its multiples are far apart modulo 2**64
WORD = (1 << 64) - 1


def mix(values: np.ndarray) -> np.ndarray:
    """Map uint64 values one to one onto pseudorandom uint64 values, in place."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def streams(seed: int, purpose: int, numbers: np.ndarray) -> np.ndarray:
    """Return the random stream, uint64 [n], of each of `numbers`, int64 [n]. Draw i is mix(stream + i * GOLDEN)."""
    salt = mix(np.array([(seed * GOLDEN + purpose) & WORD], dtype=np.uint64))
    return mix(mix(numbers.astype(np.uint64) + np.uint64(GOLDEN)) ^ salt)
