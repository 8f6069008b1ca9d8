"""Several adapters on one base: exactly their mean and spread, and refused where the bases differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import forcetune
from forcetune.deployment.ensemble import average_predictions, calibration, load_ensemble, spread
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from systems import labelled, write_labelled, write_model
from terminal import Command

METHODS = ("mmea", "elora", "readout")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three short fits of different methods and seeds on one base."""
    folder = tmp_path_factory.mktemp("runs")
    model, data = write_model(folder / "base.model"), write_labelled(folder / "train.xyz")
    folders = []
    for seed, method in enumerate(METHODS):
        settings = {"training.seed": seed, "output.forgetting": False}
        run = forcetune.fit(data, model=model, method=method, valid=4, epochs=2, out=folder / method, settings=settings)
        folders.append(run.folder)
    return folders


def test_mean_and_spread_are_those_of_the_members_one_by_one(runs: list[Path]) -> None:
    atoms = labelled(1, seed=5)[0]
    alone = []
    for run in runs:
        single = atoms.copy()
        single.calc = forcetune.calculator(run)
        alone.append((single.get_potential_energy(), single.get_forces()))
    energies, forces = np.array([one for one, _ in alone]), np.array([one for _, one in alone])
    assert np.ptp(energies) > 1e-4
    for calculator in (
        forcetune.calculator(adapter=runs),
        forcetune.calculator(runs[0], adapter=runs[1:]),
        forcetune.calculator(runs[0].parent / "base.model", adapter=[run / "adapter" for run in runs]),
    ):
        atoms.calc = calculator
        for _ in range(2):
            atoms.calc.reset()
            assert atoms.get_potential_energy() == pytest.approx(energies.mean(), abs=1e-10)
            np.testing.assert_allclose(atoms.get_forces(), forces.mean(axis=0), rtol=0, atol=1e-10)
            assert atoms.calc.results["energy_std"] == pytest.approx(energies.std(ddof=1), abs=1e-10)
            np.testing.assert_allclose(atoms.calc.results["forces_std"], forces.std(axis=0, ddof=1), rtol=0, atol=1e-10)


def test_evaluation_tells_errors_of_the_mean_and_calibration(runs: list[Path], command: Command) -> None:
    data = runs[0].parent / "train.xyz"
    arguments = ("evaluate", runs[0], data, "--ensemble", runs[1], "--ensemble", runs[2])
    code, out, _ = command(*arguments, "--json")
    assert code == 0
    content = json.loads(out)
    ensemble = load_ensemble(runs)
    frames = forcetune.frames.read.read_frames(data).frames
    members = ensemble.predict(build_graphs(ensemble.backbone, frames))
    mean = average_predictions(members)
    assert content["forces_mae_mev_per_ang"] == pytest.approx(mean.errors().forces_mae_mev_per_ang, rel=1e-9)
    assert len(content["ensemble"]["members"]) == 3
    std = spread([member.forces for member in members])
    assert content["ensemble"]["forces"]["mean_std"] == pytest.approx(1e3 * std.mean(), rel=1e-9)
    within = (np.abs(mean.forces - mean.forces_label) <= std).mean()
    assert content["ensemble"]["forces"]["within_1"] == pytest.approx(within)
    code, out, _ = command(*arguments)
    assert code == 0 and "spread of 3 adapters" in out


def test_a_comparison_stands_for_its_runs_and_baselines_are_refused_for_use(runs: list[Path], tmp_path: Path) -> None:
    for run in runs[:2]:
        (tmp_path / run.name).symlink_to(run)
    (tmp_path / "comparison.json").write_text("{}", encoding="utf-8")
    assert [folder.parent.name for folder, *_ in load_ensemble([tmp_path]).members] == ["elora", "mmea"]
    base, data = runs[0].parent / "base.model", runs[0].parent / "train.xyz"
    options = {"output.forgetting": False}
    crude = forcetune.fit(
        data, model=base, method="adapter", valid=4, epochs=1, out=tmp_path / "crude", settings=options
    )
    with pytest.raises(InputError, match="breaks rotational symmetry"):
        forcetune.calculator(adapter=[runs[0], crude.folder])


def test_calibration_of_errors_drawn_from_the_spread() -> None:
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 2.0, 20_000)
    figures = calibration(std, std * rng.standard_normal(20_000))
    assert figures is not None and figures.correlation is not None
    assert figures.ratio == pytest.approx(1, abs=0.02)
    assert (figures.within_1, figures.within_2) == (pytest.approx(0.683, abs=0.01), pytest.approx(0.954, abs=0.01))
    assert 0.2 < figures.correlation < 0.6
    assert calibration(std, np.full(20_000, np.nan)) is None


def test_members_have_one_base(runs: list[Path], tmp_path: Path, command: Command) -> None:
    other = write_model(tmp_path / "other.model", hidden_irreps="8x0e")
    data = runs[0].parent / "train.xyz"
    stranger = forcetune.fit(data, model=other, method="readout", valid=4, epochs=1, out=tmp_path / "other").folder
    with pytest.raises(InputError, match=r"an ensemble needs one base.*base and other.*fingerprint"):
        forcetune.calculator(adapter=[runs[0], stranger])
    code, _, err = command("evaluate", runs[0], data, "--ensemble", stranger)
    assert code == 2 and "needs one base" in err
    with pytest.raises(InputError, match="at least two"):
        load_ensemble([runs[0], runs[0] / "adapter"])
    with pytest.raises(InputError, match="holds no adapter"):
        load_ensemble([runs[0], tmp_path])
