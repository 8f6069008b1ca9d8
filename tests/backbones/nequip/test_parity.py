"""NequIP models against nequip itself: energies, forces, stress and every gradient, in float64.

``pytest -m slow tests/backbones/nequip`` runs every recipe of every version. nequip runs in a process of its own
(``nequip_oracle.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

from forcetune.backbones.nequip.backbone import NequIPBackbone
from forcetune.backbones.nequip.content import EMBEDDING, SCALES, SHIFTS, network_name
from forcetune.backbones.nequip.reading import is_package
from forcetune.backbones.registry import library_of_file
from forcetune.deployment.calculator import build_frame
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from nequip_models import NEWEST, RECIPES, backbone_of
from nequip_oracle import NequIPs, Request
from sevennet_models import structures
from sevennet_oracle import Results
from systems import cluster, crystal

EXACT = 1e-10
VOIGT = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)
CASES = [(version, name) for name, recipe in RECIPES.items() for version in recipe.versions]
QUICK = [(NEWEST, name) for name in RECIPES]
SINGLE = "single precision"


def marked(cases: Sequence[tuple[str, str]]) -> list[object]:
    return [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=" ".join(case)) for case in cases]


def batch_of(backbone: NequIPBackbone, atoms: Atoms) -> Batch:
    return collate(build_graphs(backbone, [build_frame(atoms)]))


def compare(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Within a share of the largest number, or of 1 where all are smaller."""
    assert np.abs(actual - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max()))


def assert_parity(backbone: NequIPBackbone, results: Results, systems: Sequence[Atoms], tolerance: float) -> None:
    """Energies (eV), forces (eV/Å) and stress (eV/Å³) of all structures with elements that the backbone knows."""
    compared = 0
    for index, atoms in enumerate(systems):
        if not set(atoms.numbers) <= set(backbone.elements):
            continue
        prediction = backbone.predict(batch_of(backbone, atoms), stress=True).detached()
        compare(prediction.energy.numpy(), results[f"{index}/energy"].reshape(1), tolerance)
        compare(prediction.forces.double().numpy(), results[f"{index}/forces"], tolerance)
        if atoms.pbc.all():
            assert prediction.stress is not None
            compare(prediction.stress[0].double().numpy()[VOIGT], results[f"{index}/stress"], tolerance)
        compared += 1
    assert compared


def gradients(backbone: NequIPBackbone, systems: Sequence[Atoms]) -> dict[str, Tensor]:
    """Of the oracle's loss: 10⁻³ E² + Σ F² + Σ σ² (six numbers, where periodic), summed over the structures."""
    parameters = dict(backbone.model.named_parameters())
    loss = torch.zeros((), dtype=torch.float64)
    for atoms in systems:
        prediction = backbone.predict(batch_of(backbone, atoms), stress=True, create_graph=True)
        loss = loss + 1e-3 * prediction.energy.square().sum() + prediction.forces.square().sum()
        if atoms.pbc.all():
            assert prediction.stress is not None
            loss = loss + prediction.stress[0][VOIGT].square().sum()
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, values, strict=True))


def assert_equal_gradients(backbone: NequIPBackbone, results: Results, systems: Sequence[Atoms]) -> None:
    """Each parameter's gradient is nequip's; scales and shifts are not trained here."""
    expected = {network_name(key[5:]): torch.from_numpy(results[key]) for key in results if key.startswith("grad/")}
    actual = gradients(backbone, systems)
    assert set(expected) - set(actual) <= {SHIFTS, SCALES}
    table = list(backbone.content.architecture.elements)
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in actual.items():
        wanted = expected[name]
        wanted = wanted[[table.index(z) for z in backbone.elements]] if name == EMBEDDING else wanted
        scale = max(float(wanted.abs().max()), 1e-6 * largest)
        assert float((value - wanted.view(value.shape)).abs().max()) <= EXACT * scale, name


@pytest.mark.parametrize(("version", "name"), marked(CASES))
def test_models_of_each_version_are_what_nequip_computes(nequips: NequIPs, version: str, name: str) -> None:
    # those that are asked for together are made and computed in one process
    names = [other for its, other in CASES if its == version]
    made = dict(zip(names, nequips.make(names, version), strict=True))
    requests = [Request(made[other].checkpoint, structures(RECIPES[other].symbols)) for other in names]
    results = nequips.compute("evaluate", requests, version=version, gradients=True)
    systems, expected = structures(RECIPES[name].symbols), results[names.index(name)]
    backbone = NequIPBackbone.load(made[name].checkpoint)
    exact = 2e-6 if name == SINGLE else EXACT
    assert backbone.stored_dtype == (torch.float32 if name == SINGLE else torch.float64)
    assert_parity(backbone, expected, systems, exact)
    if name != SINGLE:
        assert_equal_gradients(backbone, expected, systems)
    cut = NequIPBackbone.load(made[name].checkpoint, elements=systems[3].numbers.tolist())
    assert len(cut.elements) == 1
    assert_parity(cut, expected, systems, exact)
    assert_parity(NequIPBackbone.load(made[name].checkpoint, dtype=torch.float32), expected, systems, 1e-5)
    package = NequIPBackbone.load(made[name].package)
    assert is_package(made[name].package)
    assert package.base.fingerprint == backbone.base.fingerprint
    assert library_of_file(made[name].package) == library_of_file(made[name].checkpoint) == "nequip"
    assert "nequip" not in sys.modules


@pytest.mark.parametrize("name", ["parity", "all by hand", "cutoffs by pair and direction", "repulsion"])
def test_forces_and_stress_are_derivatives_of_the_energy(name: str) -> None:
    backbone = backbone_of(RECIPES[name])
    step = 1e-4
    for atoms in (cluster(), crystal()):
        prediction = backbone.predict(batch_of(backbone, atoms), stress=True).detached()

        def energy(moved: Atoms) -> float:
            return float(backbone.predict(batch_of(backbone, moved)).energy.detach())

        for atom, axis in ((0, 0), (3, 1), (len(atoms) - 1, 2)):
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[atom, axis] += sign * step
                energies.append(energy(moved))
            numerical = -(energies[0] - energies[1]) / (2 * step)
            assert float(prediction.forces[atom, axis]) == pytest.approx(numerical, rel=1e-6, abs=1e-7)
        if atoms.pbc.all():
            assert prediction.stress is not None
            strained = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[0, 1] = strain[1, 0] = sign * step / 2
                moved = atoms.copy()
                moved.set_cell(atoms.cell.array @ strain, scale_atoms=True)
                strained.append(energy(moved))
            numerical = (strained[0] - strained[1]) / (2 * step) / atoms.get_volume()
            assert float(prediction.stress[0, 0, 1]) == pytest.approx(numerical, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["parity", "features by order", "all by hand"])
def test_rotations_and_reflections_leave_the_energy(name: str) -> None:
    backbone = backbone_of(RECIPES[name])
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    for matrix in (rotation, -rotation):
        for atoms in (cluster(), crystal()):
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ matrix.T)
            moved.positions = atoms.positions @ matrix.T
            one, other = (backbone.predict(batch_of(backbone, each)).detached() for each in (atoms, moved))
            assert float(other.energy) == pytest.approx(float(one.energy), abs=1e-11)
            assert np.abs(other.forces.numpy() - one.forces.numpy() @ matrix.T).max() < 1e-11


def test_early_models_without_parity_know_proper_rotations_only() -> None:
    """Up to 0.15 everything was even then, so that mirror images have other energies; 0.16 changed what it means."""
    early, late = (backbone_of(RECIPES["no parity"], version=version) for version in ("0.15.0", "0.16.2"))
    assert "1e" in early.content.architecture.harmonics
    assert "1o" in late.content.architecture.harmonics
    atoms = cluster()
    mirrored = atoms.copy()
    mirrored.positions *= -1
    differences = []
    for backbone in (early, late):
        one, other = (float(backbone.predict(batch_of(backbone, each)).energy) for each in (atoms, mirrored))
        differences.append(abs(one - other))
    assert differences[0] > 1e-9
    assert differences[1] < 1e-12
