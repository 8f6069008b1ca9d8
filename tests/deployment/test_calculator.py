"""The ASE calculator of base and adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces
from ase.io import read
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from safetensors.torch import load_file, save_file

import forcetune
from forcetune.adapters.attach import get_adapter
from forcetune.deployment.calculator import build_frame
from forcetune.deployment.compiled_prediction import COMPILED_AFTER
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.evaluation.metrics import build_graphs, predict
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
    assert get_adapter(backbone) is not None
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


# ---- slabs, shares of atoms, and structures that have no energy -----------------------------------------------------


@pytest.mark.parametrize("pbc", [(True, True, False), (True, False, True), (True, False, False), (False, False, True)])
def test_stress_of_slabs_and_wires(pbc: tuple[bool, bool, bool], run: forcetune.Run) -> None:
    """As `evaluate` has it: the derivative by the strain over the volume of the whole cell."""
    atoms = crystal((1, 6, 8))
    atoms.set_cell(atoms.cell.array + np.diag([0.0 if periodic else 12.0 for periodic in pbc]))
    atoms.pbc = pbc
    atoms.calc = forcetune.calculator(run.folder)
    stress = atoms.get_stress(voigt=False)
    axis = pbc.index(True)
    strained = []
    for sign in (1, -1):
        bent = atoms.copy()
        strain = np.eye(3)
        strain[axis, axis] += sign * 1e-4
        bent.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        bent.calc = atoms.calc
        strained.append(bent.get_potential_energy())
    assert stress[axis, axis] == pytest.approx((strained[0] - strained[1]) / 2e-4 / atoms.get_volume(), rel=1e-5)
    labels = predict(run.backbone, build_graphs(run.backbone, [build_frame(atoms)]), stress=True)
    assert labels.stress is not None
    np.testing.assert_allclose(stress, labels.stress[0], rtol=0, atol=1e-10)


def test_a_slab_whose_cell_has_no_third_vector_has_no_stress(run: forcetune.Run) -> None:
    atoms = crystal((1, 6, 8))
    atoms.pbc = (True, True, False)
    atoms.cell[2] = 0
    atoms.calc = forcetune.calculator(run.folder)
    assert np.isfinite(atoms.get_potential_energy())
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


def test_the_reported_slab(case_files: Path) -> None:
    calculator = forcetune.calculator("mini")
    for atoms in read(case_files / "slab.xyz", ":"):
        expected = atoms.calc.results["stress"]
        atoms.calc = calculator
        np.testing.assert_allclose(atoms.get_stress(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_energies_of_atoms_add_up(run: forcetune.Run, dtype: str) -> None:
    calculator = forcetune.calculator(run.folder, dtype=dtype)
    pair = Atoms("CO", [[0, 0, 0], [0, 0, 40.0]])
    references = calculator.backbone.reference_energies
    for atoms in (*labelled(2), crystal((1, 6, 8)), pair):
        atoms.calc = calculator
        energies = atoms.get_potential_energies()
        assert energies.shape == (len(atoms),)
        exact = 1e-11 if dtype == "float64" else 1e-6
        assert energies.sum() == pytest.approx(atoms.get_potential_energy(), rel=exact)
    alone = Atoms("C")
    alone.calc = calculator
    assert calculator.get_potential_energies(pair)[0] == pytest.approx(alone.get_potential_energy(), rel=1e-6)
    assert references[6] != 0


def test_energies_of_recorded_predictions_add_up(run: forcetune.Run) -> None:
    atoms = labelled(1)[0]
    atoms.calc = forcetune.calculator(run.folder)
    rng = np.random.default_rng(0)
    for _ in range(COMPILED_AFTER + 5):
        atoms.positions += rng.normal(0, 1e-3, atoms.positions.shape)
        energies = atoms.get_potential_energies()
        assert energies.sum() == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    assert atoms.calc.compiled.recording is not None, atoms.calc.compiled.eager_reason
    eager = forcetune.calculator(run.folder, compile="off")
    np.testing.assert_allclose(energies, eager.get_potential_energies(atoms), rtol=0, atol=1e-10)


def _with_positions(value: float) -> Atoms:
    atoms = labelled(1)[0]
    atoms.positions[2, 1] = value
    return atoms


REFUSED = {
    "has no atoms": lambda: Atoms(),
    r"position of atom 2 \(\w+\) is not finite": lambda: _with_positions(float("nan")),
    "is not finite; in dynamics": lambda: _with_positions(float("inf")),
    "cell of the structure is not finite": lambda: Atoms("H", cell=[float("nan")] * 3, pbc=True),
    "atoms 0 and 1 are at the same place": lambda: Atoms("CO", [[0, 0, 1], [0, 0, 1]]),
    "atoms 0 and 2 are at the same place": lambda: Atoms(
        "COC", [[0, 0, 0], [1.5, 0, 0], [0, 0, 9]], cell=3 * [9], pbc=True
    ),
    "element X is unknown": lambda: Atoms("CX", [[0, 0, 0], [0, 0, 1]]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_structures_that_have_no_energy(message: str, run: forcetune.Run) -> None:
    """One sentence, and the calculator goes on working."""
    calculator = forcetune.calculator(run.folder)
    atoms = REFUSED[message]()
    atoms.calc = calculator
    for ask in (atoms.get_potential_energy, atoms.get_forces):
        with pytest.raises(InputError, match=message):
            ask()
    assert np.isfinite(calculator.get_potential_energy(labelled(1)[0]))


def test_charges_are_said_to_be_unknown(run: forcetune.Run) -> None:
    atoms = labelled(1)[0]
    atoms.calc = forcetune.calculator(run.folder)
    neutral = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    atoms.rattle(1e-9)
    with pytest.warns(ForcetuneWarning, match=r"charge of \+1, which the model ignores"):
        assert atoms.get_potential_energy() == pytest.approx(neutral, abs=1e-6)
    atoms.rattle(1e-9)
    assert np.isfinite(atoms.get_potential_energy())
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_charges()


def test_a_head_that_an_adapter_was_not_trained_on_is_refused(run: forcetune.Run) -> None:
    with pytest.raises(InputError, match=r"not on head other; leave out --head"):
        forcetune.calculator(run.folder, head="other")
    copied = run.folder.parent / "another"
    shutil.copytree(run.adapter, copied)
    tensors = load_file(copied / "adapter_model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, copied / "adapter_model.safetensors")
    both = [run.adapter, copied]
    with pytest.raises(InputError, match=r"not on head other; leave out --head"):
        forcetune.calculator(run.folder.parent / "base.model", adapter=both, head="other")
