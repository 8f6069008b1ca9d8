"""Power laws with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from forcetune.errors import InputError
from forcetune.evaluation.power_law import fit_power_law

SIZES = [10, 20, 50, 100]


def test_an_exact_power_law_is_recovered() -> None:
    law = fit_power_law(SIZES, [300.0 * n**-0.5 for n in SIZES])
    assert law.prefactor == pytest.approx(300.0, rel=1e-10)
    assert law.exponent == pytest.approx(0.5, rel=1e-10)
    needed = law.needed(15.0)
    assert (needed.frames, needed.low, needed.high) == (pytest.approx(400.0),) * 3
    assert not needed.extrapolated
    assert law.needed(3.0).frames == pytest.approx(10_000.0)
    assert law.needed(3.0).extrapolated
    np.testing.assert_allclose(law.at(np.array([25.0])), [60.0])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    sizes, inside, reached = SIZES * 3, 0, 0
    for seed in range(200):
        errors = 200.0 * np.array(sizes) ** -0.4 * np.exp(0.1 * random.normal(size=len(sizes)))
        law = fit_power_law(sizes, errors.tolist(), seed=seed)
        inside += law.exponent_interval[0] <= 0.4 <= law.exponent_interval[1]
        needed = law.needed(20.0)
        assert needed.low is not None
        reached += needed.low <= (200.0 / 20.0) ** 2.5 and (needed.high is None or needed.high >= 10**2.5)
    assert 0.86 <= inside / 200 <= 0.99
    assert 0.86 <= reached / 200 <= 0.99


def test_errors_that_do_not_fall_reach_no_target() -> None:
    needed = fit_power_law(SIZES, [50.0, 51.0, 53.0, 55.0]).needed(20.0)
    assert needed.frames is None
    assert needed.high is None
    assert needed.extrapolated


def test_what_cannot_be_fitted_is_refused() -> None:
    for frames, errors in (([10, 20], [1.0, 2.0]), ([10, 10, 10], [1.0, 2.0, 3.0])):
        with pytest.raises(InputError, match="two sizes and three runs"):
            fit_power_law(frames, errors)
    with pytest.raises(InputError, match="positive"):
        fit_power_law(SIZES, [1.0, 0.0, 1.0, 1.0])
    with pytest.raises(InputError, match="positive"):
        fit_power_law(SIZES, [4.0, 3.0, 2.0, 1.0]).needed(0.0)
