"""Figures of masked words from sums of documents, with intervals by resampling documents.

Words of one document have much in common, so the document is what is drawn, with replacement, and figures are ratios of
the drawn documents' sums. The same draws for all models make their differences paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

SUMS = ("words", "bytes", "tokens", "unknown", "right", "loss")  # of a document; loss in nats
SHARE = 0.95
FEWEST_DOCUMENTS = 20  # percentiles of fewer are too narrow: of 5 they miss in 15% of cases where 5% are meant
ROUNDING = 1e-12
Figure = Callable[[np.ndarray], np.ndarray]

# Each takes sums [..., 6] in the order of SUMS.
FIGURES: dict[str, Figure] = {
    "perplexity": lambda sums: np.exp(sums[..., 5] / sums[..., 0]),  # a word
    "bits_per_byte": lambda sums: sums[..., 5] / math.log(2) / sums[..., 1],
    "accuracy": lambda sums: sums[..., 4] / sums[..., 0],
}
# How a figure of another model is set against the first one's.
CHANGES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "perplexity": lambda other, first: other / first,
    "bits_per_byte": lambda other, first: other - first,
    "accuracy": lambda other, first: other - first,
}


@lru_cache(maxsize=8)
def draws(documents: int, resamples: int, seed: int) -> np.ndarray:
    """How often each document is in each resample, float64 [resamples, documents]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(documents, np.full(documents, 1 / documents), resamples).astype(np.float64)


def measured(sums: Mapping[str, Sequence[float]], drawn: np.ndarray) -> dict[str, Any]:
    """Totals, and each figure with the interval of 95%; sums: a list a key of SUMS, one number a document."""
    table = _table(sums)
    counts = {name: int(table[:, at].sum()) for at, name in enumerate(SUMS[:4])}
    with np.errstate(invalid="ignore"):
        found = {
            name: _interval(figure(table.sum(0)), figure(drawn @ table), len(table)) for name, figure in FIGURES.items()
        }
    return counts | found


def compared(
    other: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]], drawn: np.ndarray
) -> dict[str, Any]:
    """What a model's figures are against the first model's: the ratio of perplexities, differences of the others."""
    tables = [_table(other), _table(first)]
    found = {}
    for name, figure in FIGURES.items():
        total = CHANGES[name](*(figure(table.sum(0)) for table in tables))
        with np.errstate(invalid="ignore"):
            found[name] = _interval(total, CHANGES[name](*(figure(drawn @ table) for table in tables)), len(tables[0]))
    return found


def _table(sums: Mapping[str, Sequence[float]]) -> np.ndarray:
    return np.array([sums[name] for name in SUMS], dtype=np.float64).T


def _interval(value: np.ndarray, resampled: np.ndarray, documents: int) -> dict[str, float | None]:
    """Percentiles, None of few documents or of those that are all alike; a resample without a word, as few documents
    have of rare ones, says nothing."""
    tail = 100 * (1 - SHARE) / 2
    low, high = np.nanpercentile(resampled, [tail, 100 - tail])
    if documents < FEWEST_DOCUMENTS or high - low <= ROUNDING * abs(high):
        low = high = None
    return {"value": float(value), "low": low, "high": high}
