"""Scale, conformal quantiles and coverage, against closed forms and on synthetic errors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from forcetune.errors import InputError
from forcetune.uncertainty.calibration import (
    Calibration,
    Deviations,
    conformal_quantile,
    fit_scale,
    log_likelihood,
    measure_reliability,
    rank_correlation,
)


def synthetic(n: int, scale: float, seed: int) -> Deviations:
    """Normal errors whose true deviations are ``scale`` times those that are claimed."""
    random = np.random.default_rng(seed)
    deviations = np.exp(random.normal(size=n))
    return Deviations(scale * deviations * random.normal(size=n), deviations, np.arange(n))


def test_the_scale_is_the_closed_form_and_the_best() -> None:
    errors, deviations = np.array([1.0, -2.0, np.nan, 4.0]), np.array([1.0, 1.0, 5.0, 2.0])
    assert fit_scale(errors, deviations) == pytest.approx(np.sqrt((1 + 4 + 4) / 3), rel=1e-14)
    best, known = fit_scale(errors, deviations), np.isfinite(errors)

    def likelihood(scale: float) -> float:
        return float(stats.norm.logpdf(errors[known], scale=scale * deviations[known]).mean())

    assert likelihood(best) > max(likelihood(0.99 * best), likelihood(1.01 * best))
    constant = 0.5 * np.log(2 * np.pi) + 0.5
    assert log_likelihood(errors, deviations) == pytest.approx(likelihood(best) + constant, rel=1e-12)
    with pytest.raises(InputError, match="lack this label"):
        fit_scale(np.array([np.nan]), np.array([1.0]))


def test_coverage_of_normal_errors() -> None:
    calibration = Calibration.fit(synthetic(4000, 3.0, 0))
    assert calibration.scale == pytest.approx(3.0, rel=0.03)
    reliability = measure_reliability(synthetic(20_000, 3.0, 1), calibration)
    assert reliability is not None
    for row in reliability.coverage:
        assert row.after == pytest.approx(row.level, abs=0.02)
        assert row.conformal == pytest.approx(row.level, abs=0.02)
        expected = 2 * stats.norm.cdf(stats.norm.ppf((1 + row.level) / 2) / 3) - 1
        assert row.before == pytest.approx(expected, abs=0.02)
    assert reliability.ratio == pytest.approx(1.0, rel=0.1)
    assert reliability.correlation is not None
    assert reliability.correlation > 0.4


def test_coverage_of_lengths_of_vectors() -> None:
    random = np.random.default_rng(4)
    errors = np.linalg.norm(random.normal(size=(20_000, 3)), axis=1)
    measured = Deviations(errors, np.full(20_000, np.sqrt(3.0)), np.arange(20_000), degrees=3)
    reliability = measure_reliability(measured, Calibration.fit(measured))
    assert reliability is not None
    for row in reliability.coverage:
        assert row.before == pytest.approx(row.level, abs=0.01)
        assert row.after == pytest.approx(row.level, abs=0.01)


def test_the_conformal_quantile_is_the_one_of_finite_samples() -> None:
    scores = np.array([5.0, 1.0, 3.0, 2.0, 4.0, 9.0, 8.0, 7.0, 6.0])
    frames = np.arange(9)
    # ⌈10 · level⌉-th smallest of nine
    assert conformal_quantile(scores, frames, 0.5) == 5.0
    assert conformal_quantile(scores, frames, 0.51) == 6.0
    assert conformal_quantile(scores, frames, 0.8) == 8.0
    assert conformal_quantile(scores, frames, 0.9) == 9.0
    assert conformal_quantile(scores, frames, 0.95) is None, "nine frames can promise no more than 90 %"
    assert conformal_quantile(np.full(3, np.nan), np.arange(3), 0.5) is None
    nineteen = np.arange(1.0, 20.0)
    assert conformal_quantile(nineteen, np.arange(19), 0.95) == 19.0


def test_components_of_a_frame_share_its_weight() -> None:
    # three frames of 1, 2 and 3 scores: weights 1/4, 1/8 and 1/12 of the whole
    scores = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    frames = np.array([0, 1, 1, 2, 2, 2])
    assert conformal_quantile(scores, frames, 0.25) == 1.0
    assert conformal_quantile(scores, frames, 0.26) == 2.0
    assert conformal_quantile(scores, frames, 0.5) == 3.0
    assert conformal_quantile(scores, frames, 0.75) == 6.0
    assert conformal_quantile(scores, frames, 0.76) is None


def test_conformal_coverage_holds_whatever_the_errors_are_and_however_they_hang_together() -> None:
    """Errors of one frame share a factor with a heavy tail; the mean over calibration sets is at least the level."""
    random = np.random.default_rng(7)

    def draw(frames: int) -> tuple[np.ndarray, np.ndarray]:
        factor = np.abs(random.standard_t(2, size=(frames, 1)))
        return np.abs(factor * random.standard_cauchy(size=(frames, 6))).ravel(), np.repeat(np.arange(frames), 6)

    for level in (0.5, 0.8):
        shares = []
        for _ in range(400):
            limit = conformal_quantile(*draw(20), level)
            assert limit is not None
            shares.append(np.mean(draw(20)[0] <= limit))
        assert level - 0.015 <= np.mean(shares) <= level + 0.06


def test_rank_correlation_is_spearmans() -> None:
    first, second = np.array([1.0, 2.0, 2.0, 5.0, np.nan]), np.array([2.0, 1.0, 4.0, 8.0, 3.0])
    expected = stats.spearmanr(first[:4], second[:4]).statistic
    assert rank_correlation(first, second) == pytest.approx(expected, rel=1e-12)
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None
