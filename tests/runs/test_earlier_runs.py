"""Runs and adapters written before the networks of our own (``data/earlier/write_runs.py``) give what they gave."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

import forcetune
from forcetune.adapters.file import load_adapter
from forcetune.backbones.protocol import Backbone
from forcetune.config import load_config
from forcetune.runs.results import read_results
from terminal import Command

ARCHIVE = Path(__file__).parent / "data" / "earlier" / "runs.zip"
SYSTEMS = 5
RUNS = ("mmea", "elora", "elora-norms", "gain-and-shift", "sparse", "sparse-h", "full", "readout", "lora-spin")
EXACT = 1e-12
ELEMENTS, OF_MINI = (1, 8), 7


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def expected(earlier: Path) -> dict[str, np.ndarray]:
    with np.load(earlier / "expected.npz") as table:
        return dict(table)


def as_cut_before() -> Backbone:
    """``mini`` cut to the elements of the runs, with the digits that it had then.

    Where elements are left out, weights that fan in from all of them are scaled by √(left / all). That was done in the
    float32 of the file; today it is done in float64.
    """
    base = forcetune.load("mini", elements=ELEMENTS)
    factor = math.sqrt(len(ELEMENTS) / OF_MINI)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if "node_embedding" in name or "skip_tp" in name:
                parameter.copy_((parameter / factor).float() * factor)
    return base


def assert_equal(
    calculator: forcetune.ForcetuneCalculator, expected: dict[str, np.ndarray], name: str, tolerance: float
) -> None:
    """Each quantity of each structure within a share of its largest number."""
    for index in range(SYSTEMS):
        numbers, positions = expected[f"{index}/numbers"], expected[f"{index}/positions"]
        atoms = Atoms(numbers, positions, cell=expected[f"{index}/cell"], pbc=expected[f"{index}/pbc"])
        atoms.set_initial_magnetic_moments(expected[f"{index}/moments"])
        atoms.calc = calculator
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        if atoms.pbc.all():
            results["stress"] = atoms.get_stress()
        if name == "lora-spin":
            results["moments"] = atoms.get_magnetic_moments()
        for quantity, value in results.items():
            before = expected[f"{name}/{index}/{quantity}"]
            assert np.abs(value - before).max() <= tolerance * np.abs(before).max(), (index, quantity)


def test_the_base_is_what_it_was(expected: dict[str, np.ndarray]) -> None:
    assert_equal(forcetune.calculator("mini", dtype="float64"), expected, "base", EXACT)


@pytest.mark.parametrize("name", RUNS)
def test_adapters_give_what_they_gave(earlier: Path, expected: dict[str, np.ndarray], name: str) -> None:
    base = as_cut_before()
    load_adapter(base, earlier / name / "adapter")
    assert_equal(forcetune.calculator(base), expected, name, EXACT)


@pytest.mark.parametrize("name", RUNS)
def test_run_folders_give_what_they_gave(earlier: Path, expected: dict[str, np.ndarray], name: str) -> None:
    """To the digits that were lost when elements were left out."""
    assert_equal(forcetune.calculator(earlier / name), expected, name, 1e-6)


def test_commands_take_an_earlier_run(earlier: Path, command: Command) -> None:
    folder = earlier / "elora"
    config = load_config(folder / "config.yaml")
    results = read_results(folder, config)
    assert results.training is not None and results.training.steps == 6
    assert results.training.loss == {}
    errors = results.errors["valid"]
    assert errors is not None and errors.after is not None
    after = errors.after["forces_mae_mev_per_ang"]
    assert command("report", folder)[0] == 0
    assert f"{after:,.1f}" in (folder / "report.html").read_text(encoding="utf-8")
    assert command("merge", folder, "-o", earlier / "merged.model")[0] == 0
    merged = forcetune.calculator(earlier / "merged.model")
    atoms = Atoms("HO", [[0, 0, 0], [0, 0, 1.3]])
    energies = []
    for calculator in (merged, forcetune.calculator(folder)):
        atoms.calc = calculator
        energies.append(atoms.get_potential_energy())
    assert energies[0] == pytest.approx(energies[1], rel=1e-7)
