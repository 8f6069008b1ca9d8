"""What was forgotten: distance from the base, dimers, dynamics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import write

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.config import DataConfig
from forcetune.deployment import forgetting
from forcetune.deployment.forgetting import DISTANCES, measure_forgetting
from forcetune.frames.dataset import Dataset, read_dataset
from systems import backbone, crystal, perturb, write_labelled


def dataset(tmp_path: Path) -> Dataset:
    return read_dataset(DataConfig(train=[str(write_labelled(tmp_path / "a.xyz", 8))], valid=3))


def test_nothing_is_forgotten_by_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    model = backbone(elements=(1, 6, 8))
    attach(model, method("elora"))
    own = model.reference_energies
    # other reference energies are no forgetting
    model.set_reference_energies({z: energy + 100.0 for z, energy in own.items()})
    measured = measure_forgetting(model, dataset(tmp_path))
    assert (measured.distance.source, measured.distance.n_frames) == ("molecules", forgetting.MOST_MOLECULES)
    assert measured.distance.energy_mev_per_atom < 1e-6 and measured.distance.forces_mev_per_ang == 0
    assert [dimer.pair for dimer in measured.dimers] == ["H–H", "H–C", "H–O", "C–C", "C–O", "O–O"]
    for dimer in measured.dimers:
        assert dimer.base_wall_ev == pytest.approx(dimer.tuned_wall_ev, abs=1e-9)
        assert dimer.base_hole_ang == dimer.tuned_hole_ang
    assert measured.stability.picoseconds > 0 and measured.stability.failure is None
    assert measured.warnings == ()
    assert model.reference_energies == {z: energy + 100.0 for z, energy in own.items()}


def test_an_adapter_that_changes_much_is_far_from_its_base(tmp_path: Path) -> None:
    model = backbone(elements=(1, 6, 8))
    perturb(attach(model, method("elora")), 0.3)
    measured = measure_forgetting(model, dataset(tmp_path))
    assert measured.distance.energy_mev_per_atom > 1 and measured.distance.forces_mev_per_ang > 1


def test_a_hole_is_where_atoms_attract_at_short_distance() -> None:
    forces = np.zeros((len(DISTANCES), 2, 3))
    forces[:, 1, 2] = 5.0
    assert forgetting._hole(forces, 2.0) is None
    forces[3, 1, 2] = -1.0
    assert forgetting._hole(forces, 2.0) == pytest.approx(2.0 * DISTANCES[3])
    forces[3, 1, 2], forces[-1, 1, 2] = 5.0, -1.0  # a bond is no hole
    assert forgetting._hole(forces, 2.0) is None


def test_holes_of_the_base_are_told_and_not_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(elements=(1, 6, 8))
    attach(model, method("elora"))
    holes = iter([1.0, None, None, 1.2] + 8 * [None])
    monkeypatch.setattr(forgetting, "_hole", lambda *_: next(holes))
    measured = measure_forgetting(model, dataset(tmp_path))
    assert [(d.base_hole_ang, d.tuned_hole_ang) for d in measured.dimers[:2]] == [(1.0, None), (None, 1.2)]
    assert measured.dimers[0].tuned_barrier_ev is None and measured.dimers[1].tuned_barrier_ev is not None
    assert len(measured.warnings) == 1 and measured.warnings[0].startswith(
        "H–C: the tuned model pulls the atoms together"
    )


def test_materials_are_shaken(tmp_path: Path) -> None:
    structures = []
    for seed in range(6):
        atoms = crystal((14, 8), seed)
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = -1.0, np.zeros((8, 3))
        structures.append(atoms)
    write(tmp_path / "a.xyz", structures, format="extxyz")
    model = backbone(elements=(8, 14))
    attach(model, method("readout"))
    measured = measure_forgetting(model, read_dataset(DataConfig(train=[str(tmp_path / "a.xyz")], valid=2)))
    assert (measured.distance.source, measured.distance.n_frames) == ("shaken validation frames", 2)


def test_dynamics_that_break_down_are_a_warning(tmp_path: Path) -> None:
    model = backbone(elements=(1, 6, 8))
    adapter = attach(model, method("full"))
    data = dataset(tmp_path)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(torch.nan)
    stability = forgetting._stability(model, data.valid.frames[0])
    assert stability.failure is not None and "broke down" in stability.failure


@pytest.mark.forgetting
def test_every_report_has_it_and_it_can_be_switched_off(tmp_path: Path) -> None:
    frames = write_labelled(tmp_path / "a.xyz", 8)
    options = {"valid": 3, "epochs": 1}
    run = forcetune.fit(frames, model=backbone(), method="readout", out=tmp_path / "on", **options)
    assert run.results["forgetting"]["distance"]["source"] == "molecules"
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "What was forgotten" in page and "H–O" in page
    off = {"output.forgetting": False}
    run = forcetune.fit(frames, model=backbone(), method="readout", out=tmp_path / "off", settings=off, **options)
    assert "forgetting" not in run.results
    assert "What was forgotten" not in (run.folder / "report.html").read_text(encoding="utf-8")
