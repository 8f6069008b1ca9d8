"""The slope of predicted over reference forces: what it is for models whose softness is known, and where it is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

import forcetune
from forcetune.evaluation.metrics import Predictions
from forcetune.evaluation.softening import force_slope, measure_softening
from systems import crystal, frames_of, write_model

CRYSTALS = frames_of(*(crystal(seed=seed) for seed in range(3)))
MOLECULE = frames_of(Atoms("H2O", [(0, 0, 0), (0, 0, 1), (0, 1, 0)]))


def predictions(factor: float, noise: float = 0.0) -> Predictions:
    """Of three crystals and a molecule: forces are the labels times a factor, those of the molecule opposite."""
    generator = np.random.default_rng(1)
    atoms = np.array([len(frame) for frame in (*CRYSTALS, *MOLECULE)])
    labels = generator.standard_normal((atoms.sum(), 3))
    forces = factor * labels + noise * generator.standard_normal(labels.shape)
    forces[-3:] *= -1
    zeros = np.zeros(len(atoms))
    return Predictions(np.ones(atoms.sum(), int), atoms, zeros, zeros, forces, labels, None, None)


def test_the_slope_is_the_factor_between_forces_and_labels_of_periodic_frames() -> None:
    softening = measure_softening([*CRYSTALS, *MOLECULE], predictions(0.8), predictions(1.1))
    assert softening is not None and softening.n_frames == 3
    assert (softening.base, softening.base_large) == (pytest.approx(0.8), pytest.approx(0.8))
    assert (softening.tuned, softening.tuned_large) == (pytest.approx(1.1), pytest.approx(1.1))


def test_large_forces_are_those_of_the_tenth_of_the_atoms_with_the_largest_labels() -> None:
    """A model that is soft only where forces are large."""
    after = predictions(1.0)
    lengths = np.linalg.norm(after.forces_label, axis=1)
    lengths[-3:] = 0
    largest = np.argsort(lengths)[-3:]  # of 24 atoms in crystals
    after.forces[largest] *= 0.5
    softening = measure_softening([*CRYSTALS, *MOLECULE], predictions(1.0), after)
    assert softening is not None
    assert softening.tuned_large == pytest.approx(0.5) and 0.5 < softening.tuned < 1.0


def test_noise_of_the_predictions_leaves_the_slope_and_missing_labels_do_not_count() -> None:
    generator = np.random.default_rng(3)
    labels = generator.standard_normal((20_000, 3))
    assert force_slope(0.9 * labels + generator.standard_normal(labels.shape), labels) == pytest.approx(0.9, abs=0.02)
    before, after = predictions(1.0), predictions(0.7)
    for one in (before, after):
        one.forces_label[0, 1] = np.nan
    softening = measure_softening([*CRYSTALS, *MOLECULE], before, after)
    assert softening is not None and softening.tuned == pytest.approx(0.7)


def test_nothing_is_said_of_molecules_and_of_forces_that_are_zero() -> None:
    flat = predictions(1.0)
    only_molecule = replace(
        flat,
        atoms=flat.atoms[-1:],
        numbers=flat.numbers[-3:],
        forces=flat.forces[-3:],
        forces_label=flat.forces_label[-3:],
    )
    assert measure_softening(MOLECULE, only_molecule, only_molecule) is None
    flat.forces_label[:] = 0
    assert measure_softening([*CRYSTALS, *MOLECULE], flat, flat) is None


def test_a_run_on_crystals_says_it_in_its_results_and_its_report(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    structures = []
    for seed in range(8):
        atoms = crystal((1, 6, 8), seed=seed)
        atoms.info["REF_energy"] = float(generator.standard_normal())
        atoms.arrays["REF_forces"] = generator.standard_normal((len(atoms), 3))
        structures.append(atoms)
    write(tmp_path / "train.xyz", structures[:5], format="extxyz")
    write(tmp_path / "test.xyz", structures[5:], format="extxyz")
    run = forcetune.fit(
        tmp_path / "train.xyz",
        model=write_model(tmp_path / "small.model"),
        method="readout",
        valid=2,
        test=tmp_path / "test.xyz",
        epochs=1,
        out=tmp_path / "run",
        settings={"data.doctor": "off"},
    )
    softening = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))["softening"]
    assert set(softening) == {"valid", "test"} and softening["test"]["n_frames"] == 3
    arrays = np.load(run.folder / "predictions.npz")
    for when, name in (("before", "base"), ("after", "tuned")):
        forces, labels = arrays[f"test/{when}/forces"], arrays["test/reference/forces"]
        assert softening["test"][name] == pytest.approx(float((forces * labels).sum() / (labels**2).sum()))
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "Softening" in page and f"{softening['test']['tuned']:.3f}" in page
