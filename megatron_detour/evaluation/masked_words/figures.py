"""Masked-word figures from sums per document, with bootstrap intervals over documents.

Words of one document are correlated, so documents are resampled, and figures are ratios of the resampled documents'
sums. All models share the same resamples, so their differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

SUMS = ("words", "bytes", "tokens", "unknown", "right", "loss")  # per document; loss in nats
SHARE = 0.95
FEWEST_DOCUMENTS = (
    20  # percentile intervals of fewer are too narrow: with 5 documents they miss in 15% of cases, not 5%
)
ROUNDING = 1e-12
Figure = Callable[[np.ndarray], np.ndarray]

# Each takes sums [..., 6] in the order of SUMS.
FIGURES: dict[str, Figure] = {
    "perplexity": lambda sums: np.exp(sums[..., 5] / sums[..., 0]),  # per word
    "bits_per_byte": lambda sums: sums[..., 5] / math.log(2) / sums[..., 1],
    "accuracy": lambda sums: sums[..., 4] / sums[..., 0],
}
# How a model's figure is compared with the first model's.
CHANGES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "perplexity": lambda other, first: other / first,
    "bits_per_byte": lambda other, first: other - first,
    "accuracy": lambda other, first: other - first,
}


@lru_cache(maxsize=8)
def draws(documents: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each document occurs in each resample, float64 [resamples, documents]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(documents, np.full(documents, 1 / documents), resamples).astype(np.float64)


def measured(sums: Mapping[str, Sequence[float]], drawn: np.ndarray) -> dict[str, Any]:
    """Return totals, and each figure with its 95% interval; sums: per key of SUMS a list with a number per document."""
    table = _table(sums)
    counts = {name: int(table[:, at].sum()) for at, name in enumerate(SUMS[:4])}
    with np.errstate(invalid="ignore"):
        figures = {
            name: _interval(figure(table.sum(0)), figure(drawn @ table), len(table)) for name, figure in FIGURES.items()
        }
    return counts | figures


def compared(
    other: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]], drawn: np.ndarray
) -> dict[str, Any]:
    """Compare a model with the first: the ratio of perplexities, and differences of the other figures."""
    tables = [_table(other), _table(first)]
    figures = {}
    for name, figure in FIGURES.items():
        total = CHANGES[name](*(figure(table.sum(0)) for table in tables))
        with np.errstate(invalid="ignore"):
            figures[name] = _interval(
                total, CHANGES[name](*(figure(drawn @ table) for table in tables)), len(tables[0])
            )
    return figures


def _table(sums: Mapping[str, Sequence[float]]) -> np.ndarray:
    return np.array([sums[name] for name in SUMS], dtype=np.float64).T


def _interval(value: np.ndarray, resampled: np.ndarray, documents: int) -> dict[str, float | None]:
    """Return the value and percentiles, None for few or identical documents. Resamples without a word (possible for
    rare words) are NaN and ignored."""
    tail = 100 * (1 - SHARE) / 2
    low, high = np.nanpercentile(resampled, [tail, 100 - tail])
    if documents < FEWEST_DOCUMENTS or high - low <= ROUNDING * abs(high):
        low = high = None
    return {"value": float(value), "low": low, "high": high}
