"""CKA: by its definition, and on matrices whose similarity is known."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_detour.analysis.cka import debiased_cka, linear_cka
from megatron_detour.errors import DetourError

SIZES = [(40, 7, 7), (40, 7, 90), (12, 200, 150), (500, 64, 32)]  # by features and by examples


def defined(x, y):
    """tr(KL) / sqrt(tr(KK) tr(LL)), with the centering matrix written out."""
    center = np.eye(len(x)) - 1 / len(x)
    k, l = center @ x @ x.T @ center, center @ y @ y.T @ center  # noqa: E741
    return np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))


def unbiased_hsic(x, y):
    """Song et al. (2012), equation 5, over matrices without their diagonals."""
    n, k, l = len(x), x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    ones = np.ones(n)
    whole = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return (whole - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3))


def draw(n, *widths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(n, width)) + generator.normal(size=width) for width in widths]


@pytest.mark.parametrize(("n", "d1", "d2"), SIZES)
def test_it_is_the_definition(n, d1, d2):
    x, y = draw(n, d1, d2)
    y[:, :5] += 2 * x[:, :5]
    assert linear_cka(x, y) == pytest.approx(defined(x, y), abs=1e-10)
    debiased = unbiased_hsic(x, y) / np.sqrt(unbiased_hsic(x, x) * unbiased_hsic(y, y))
    assert debiased_cka(x, y) == pytest.approx(debiased, abs=1e-10)


@pytest.mark.parametrize("cka", [linear_cka, debiased_cka])
def test_rotation_scale_and_shift_do_not_matter(cka):
    x, y = draw(60, 20, 20)
    rotation = np.linalg.qr(y[:20])[0]
    assert cka(x, 3e-9 * x @ rotation + 5) == pytest.approx(1, abs=1e-10)
    assert cka(1e200 * x, x) == pytest.approx(1, abs=1e-10)
    assert cka(x, y) == pytest.approx(cka(y @ rotation, x), abs=1e-12)


def test_few_examples_bias_it_and_not_the_debiased_estimator():
    """Independent features of 100 directions: the docstring's formula says 0.5 for 100 examples, 0.048 for 2,000."""
    for n, expected in ((100, 0.5), (2000, 100 / 2100)):
        pairs = [draw(n, 100, 100, seed=seed) for seed in range(8)]
        assert np.mean([linear_cka(x, y) for x, y in pairs]) == pytest.approx(expected, abs=0.02)
        assert np.mean([debiased_cka(x, y) for x, y in pairs]) == pytest.approx(0, abs=0.02)


def test_a_share_of_common_directions_is_found():
    """Half of each representation's variance is common: CKA is a quarter of tr(KK) of the common part, 0.5 of all."""
    common, own, other = draw(4000, 10, 10, 10)
    x, y = np.hstack([common, own]), np.hstack([common, other])
    assert debiased_cka(x, y) == pytest.approx(0.5, abs=0.02)


def test_single_precision_is_converted():
    """A large common offset, as of deep layers, would leave nothing of the variance in single precision."""
    x, y = (each.astype(np.float32) for each in draw(50, 8, 8))
    assert linear_cka(x, y) == pytest.approx(defined(x.astype(np.float64), y.astype(np.float64)), abs=1e-12)
    assert linear_cka(1e-30 * x, x) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("cka", [linear_cka, debiased_cka])
def test_what_has_no_similarity_is_refused(cka):
    x, y = draw(30, 4, 4)
    for bad, why in (
        (np.full((30, 4), 0.1), "the same for all examples"),
        (y[:20], "of the same examples"),
        (y[:, 0], "of the same examples"),
        (np.where(y > 2, np.inf, y), "not finite"),
        (np.where(y > 2, np.nan, y), "not finite"),
    ):
        with pytest.raises(DetourError, match=why):
            cka(x, bad)
    with pytest.raises(DetourError, match="at least"):
        cka(x[:1], y[:1])
