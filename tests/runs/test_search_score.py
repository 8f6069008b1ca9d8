"""Where a search for options starts, and what it compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forcetune.adapters.methods import build_method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.config import LossConfig, load_config
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Errors
from forcetune.runs import search
from forcetune.runs.method_defaults import with_run_defaults
from forcetune.runs.search import default_options, score
from sevennet_models import BATTERY, write_checkpoint
from systems import write_model

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
        ({"forces": 100.0, "stress": 7.0, "stress_per_atom": True}, False, 1e4),
        ({"forces": 100.0, "stress": 0.0, "stress_per_atom": True}, False, 0.0),
    ],
)
def test_stress_counts_in_the_score(loss: dict[str, float], magnetic: bool, weight: float) -> None:
    expected = 1.0 * 0.02**2 + 100.0 * 0.03**2 + weight * 0.0005**2
    assert score(ERRORS, LossConfig.model_validate(loss), magnetic) == pytest.approx(expected, rel=1e-12)


def test_a_magnetic_search_has_the_loss_of_a_magnetic_run() -> None:
    given = {"data": {"train": ["a.xyz"]}, "magnetism": {"layer": "spin"}, "model": {"model": "mini"}}
    config = load_config(given=given)
    assert default_options(config)["training.loss.forces"] == 1.0
    loss = with_run_defaults(config).training.loss
    assert (loss.forces, loss.moments, loss.form, loss.energy_per_atom) == (1.0, 1.0, "huber", True)


@pytest.mark.parametrize(
    ("loss", "weight"),
    [({"moments": 1.0}, 1.0), ({"moments": 1.0, "magforces": 5.0}, 5.0), ({"moments": 2.0, "magforces": 0.0}, 0.0)],
)
def test_moments_and_magnetic_forces_count_in_the_score(loss: dict[str, float], weight: float) -> None:
    magnetic = replace(ERRORS, moment_rmse_mub=0.1, magforce_rmse_mev=4.0)
    weights = LossConfig.model_validate({"forces": 1.0, **loss})
    expected = 0.02**2 + 0.03**2 + 0.0005**2 + loss["moments"] * 0.1**2 + weight * 0.004**2
    assert score(magnetic, weights, magnetic=True) == pytest.approx(expected, rel=1e-12)


def test_a_search_starts_from_the_learning_rate_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run without a search does: SevenNet has learning rates of its own for elora and mmea."""

    def start(model: Path | str, method: str, optimizer: str | None = "adam", **training: Any) -> dict[str, float]:
        training["optimizer"] = optimizer
        given = {"data": {"train": ["-"]}, "model": {"model": str(model)}, "method": {"name": method}}
        return default_options(load_config(given=given | {"training": training}))

    sevennet = write_checkpoint(tmp_path / "s.pth", next(iter(BATTERY.values())))
    assert start(sevennet, "elora")["training.learning_rate"] == 2e-3
    assert start(sevennet, "elora", optimizer=None)["training.learning_rate"] == 5e-3  # SOAP's, on every base
    assert start(sevennet, "full", optimizer=None)["training.learning_rate"] == 2e-2
    assert start(sevennet, "readout")["training.learning_rate"] == 5e-3
    assert "training.learning_rate" not in start(sevennet, "elora", learning_rate=0.01)
    mace = write_model(tmp_path / "m.model")
    assert start(mace, "elora") == {"training.learning_rate": 5e-3, "method.rank": 16, "training.loss.forces": 1000.0}
    monkeypatch.setattr(MaceBackbone, "learning_rates", {"elora": 0.00125})
    assert start(mace, "elora")["training.learning_rate"] == 0.00125
    assert start("mini", "readout")["training.learning_rate"] == 5e-3
    with pytest.raises(InputError, match="no such file"):
        start(tmp_path / "missing.model", "elora")


def test_trials_of_another_default_optimizer_are_of_another_search(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(given={"data": {"train": ["-"]}, "method": {"name": "elora"}})
    today = search._digest(config, {})
    monkeypatch.setattr(search, "build_method", lambda asked: replace(build_method(asked), optimizer="adam"))
    assert search._digest(config, {}) != today
