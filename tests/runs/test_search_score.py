"""What a search for options compares."""

from __future__ import annotations

import pytest

from forcetune.config import LossConfig
from forcetune.evaluation.metrics import Errors
from forcetune.runs.search import score

ERRORS = Errors(
    n_frames=4,
    energy_mae_mev=1.0,
    energy_mae_mev_per_atom=0.1,
    energy_rmse_mev=20.0,
    energy_rmse_mev_per_atom=2.0,
    forces_mae_mev_per_ang=1.0,
    forces_rmse_mev_per_ang=30.0,
    stress_mae_mev_per_ang3=0.1,
    stress_rmse_mev_per_ang3=0.5,
)


@pytest.mark.parametrize(
    ("loss", "magnetic", "weight"),
    [
        ({"forces": 100.0}, False, 1e4),
        ({"forces": 100.0, "form": "huber"}, False, 1e3),
        ({"forces": 100.0}, True, 1.0),
        ({"forces": 100.0, "stress": 7.0}, False, 7.0),
        ({"forces": 100.0, "stress": 0.0}, False, 0.0),
    ],
)
def test_stress_counts_in_the_score(loss: dict[str, float], magnetic: bool, weight: float) -> None:
    expected = 1.0 * 0.02**2 + 100.0 * 0.03**2 + weight * 0.0005**2
    assert score(ERRORS, LossConfig.model_validate(loss), magnetic) == pytest.approx(expected, rel=1e-12)
