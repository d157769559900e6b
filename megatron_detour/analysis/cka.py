"""Linear centered kernel alignment (CKA): how similar two representations of the same examples are.

Everything is computed in float64: in single precision, deep layers underflow. Inputs of lower precision are converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from megatron_detour.errors import DetourError

FEWEST = 4  # examples of the debiased estimator
Inner = Callable[[np.ndarray, np.ndarray], float]


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return tr(KL) / sqrt(tr(KK) tr(LL)) with K = X X', L = Y Y' and the columns of x [n, d1] and y [n, d2] centered.

    1 if the representations are equal up to rotation, scale and shift, 0 if no direction of one is correlated with any
    of the other (Kornblith et al., 2019). With few examples it is biased upward: for independent isotropic features it
    is about sqrt(d1 d2 / ((n + d1) (n + d2))), not 0; for n = 500 and d1 = d2 = 768 that is 0.61. The bias grows with
    the number of directions that carry the variance. `debiased_cka` has no such bias.

    Raises DetourError for other sizes, numbers that are not finite, and representations that do not vary.
    """
    x, y = _prepared(x, y, fewest=2)
    return _normalized(_inner, x, y)


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Return CKA from unbiased estimates of HSIC (Song et al., 2012): about 0 for independent x [n, d1] and y [n, d2].

    It may be below 0. Needs four examples. Raises DetourError as `linear_cka` does, and if the examples are too few to
    tell that a representation varies.
    """
    x, y = _prepared(x, y, fewest=FEWEST)
    return _normalized(_unbiased_inner, x, y)


ESTIMATORS = {"linear": linear_cka, "debiased": debiased_cka}


def _prepared(x: np.ndarray, y: np.ndarray, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both centered, in float64, scaled to norm 1: CKA does not depend on scale, but squares overflow."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise DetourError(
            f"CKA: needs representations [n, d1] and [n, d2] of the same examples, not {x.shape}, {y.shape}"
        )
    if len(x) < fewest:
        raise DetourError(f"CKA: {len(x)} examples; at least {fewest} are needed")
    return _centered(x), _centered(y)


def _centered(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max(initial=0.0)
    if not np.isfinite(largest):
        raise DetourError("CKA: a representation has numbers that are not finite; try float32 models")
    x = x / largest if largest else x
    centered = x - x.mean(0)
    norm = np.linalg.norm(centered)
    if norm <= np.finfo(np.float64).eps * x.size:  # rounding of equal rows
        raise DetourError("CKA: a representation is the same for all examples, so that no similarity is defined")
    return centered / norm


def _normalized(inner: Inner, x: np.ndarray, y: np.ndarray) -> float:
    own = inner(x, x), inner(y, y)
    if min(own) <= 0:
        raise DetourError(f"CKA: {len(x)} examples are too few for the debiased estimator; give more texts")
    return inner(x, y) / math.sqrt(own[0] * own[1])


def _inner(x: np.ndarray, y: np.ndarray) -> float:
    """Return tr(X X' Y Y') = |X' Y|^2, by features or by examples, whichever is cheaper."""
    n, d1, d2 = len(x), x.shape[1], y.shape[1]
    if d1 * d2 <= n * (d1 + d2):
        return float(np.square(x.T @ y).sum())
    return float(np.vdot(x @ x.T, y @ y.T))


def _unbiased_inner(x: np.ndarray, y: np.ndarray) -> float:
    """Return n (n - 3) times the unbiased HSIC, whose Gram matrices have a diagonal of zeros.

    Every term is that of the full matrices less the diagonals'; the rows of centered Gram matrices sum to zero.
    """
    n, k, m = len(x), np.square(x).sum(1), np.square(y).sum(1)
    trace = _inner(x, y) - k @ m
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float(trace + sums - 2 / (n - 2) * (k @ m))
