"""The ASE calculator of base and adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.fd import calculate_numerical_forces
from ase.io import read
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

import forcetune
from forcetune.adapters.attach import adapter_of
from forcetune.errors import InputError
from systems import cluster, crystal, labelled, write_labelled, write_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> forcetune.Run:
    """A short fit with gates and low-rank parts."""
    folder = tmp_path_factory.mktemp("run")
    model = write_model(folder / "base.model")
    data = write_labelled(folder / "train.xyz")
    write_labelled(folder / "test.xyz", seed=9)
    return forcetune.fit(data, model=model, valid=0.25, test=folder / "test.xyz", epochs=3, out=folder / "run")


def test_numbers_are_those_of_the_training(run: forcetune.Run) -> None:
    stored = np.load(run.folder / "predictions.npz")
    base = run.folder.parent / "base.model"
    atoms = read(run.folder.parent / "test.xyz", ":")
    for calculator in (
        forcetune.calculator(run.folder),
        forcetune.calculator(base, adapter=run.adapter),
        forcetune.calculator(base, adapter=run.folder),
        forcetune.calculator(run.adapter),
    ):
        for index in (0, 7):
            atoms[index].calc = calculator
            energy = atoms[index].get_potential_energy() / len(atoms[index])
            assert energy == pytest.approx(stored["test/after/energy_per_atom"][index], rel=1e-13)
            expected = stored["test/after/forces"].reshape(12, -1, 3)[index]
            np.testing.assert_allclose(atoms[index].get_forces(), expected, rtol=0, atol=1e-11)


def test_loaded_backbone_works_too_and_is_not_folded(run: forcetune.Run) -> None:
    numbers = run.backbone.elements
    backbone = forcetune.load(run.folder.parent / "base.model", elements=numbers)
    atoms = labelled(1)[0]
    atoms.calc = forcetune.calculator(backbone, adapter=run.folder)
    energy = atoms.get_potential_energy()
    assert adapter_of(backbone) is not None
    forcetune.detach(backbone)
    atoms.calc = forcetune.calculator(run.folder)
    assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-13)


def test_periodic_stress_and_numerical_forces(run: forcetune.Run) -> None:
    atoms = crystal((1, 6, 8))
    atoms.calc = forcetune.calculator(run.folder)
    stress = atoms.get_stress(voigt=False)
    assert stress == pytest.approx(stress.T)
    numerical = calculate_numerical_forces(atoms, eps=1e-4, iatoms=[1, 5])
    np.testing.assert_allclose(atoms.get_forces()[[1, 5]], numerical, rtol=0, atol=1e-6)
    strained = []
    for sign in (1, -1):
        bent = atoms.copy()
        strain = np.eye(3)
        strain[2, 2] += sign * 1e-4
        bent.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        bent.calc = atoms.calc
        strained.append(bent.get_potential_energy())
    slope = (strained[0] - strained[1]) / 2e-4 / atoms.get_volume()
    assert stress[2, 2] == pytest.approx(slope, rel=1e-5)
    assert atoms.calc.results["stress"].shape == (6,)


def test_relaxation_and_constant_energy_dynamics(run: forcetune.Run) -> None:
    atoms = labelled(1)[0]
    atoms.calc = forcetune.calculator(run.folder)
    start = np.abs(atoms.get_forces()).max()
    BFGS(atoms, logfile=None).run(fmax=0.5 * start, steps=40)
    assert np.abs(atoms.get_forces()).max() < start
    MaxwellBoltzmannDistribution(atoms, temperature_K=50, rng=np.random.default_rng(0))
    before = atoms.get_total_energy()
    VelocityVerlet(atoms, 0.2 * units.fs).run(30)
    assert atoms.get_total_energy() == pytest.approx(before, abs=2e-3)


def test_float32_is_near(run: forcetune.Run) -> None:
    atoms = labelled(1)[0]
    atoms.calc = forcetune.calculator(run.folder)
    exact = atoms.get_forces()
    atoms.calc = forcetune.calculator(run.folder, dtype="float32")
    assert np.abs(atoms.get_forces() - exact).max() < 1e-4 * np.abs(exact).max()


def test_unusable_things_are_refused(run: forcetune.Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no adapter_config\.json"):
        forcetune.calculator(run.folder.parent / "base.model", adapter=tmp_path)
    atoms = Atoms("Si")
    atoms.calc = forcetune.calculator(run.folder)
    with pytest.raises(InputError, match="Si"):
        atoms.get_potential_energy()
    atoms = cluster((1, 6))
    atoms.pbc = True
    atoms.calc = forcetune.calculator(run.folder)
    with pytest.raises(InputError, match="cell"):
        atoms.get_potential_energy()
