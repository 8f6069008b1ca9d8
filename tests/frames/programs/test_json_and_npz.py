"""JSON of mlearn, maml and FitSNAP, archives of sGDML and rMD17: units, signs, order of components."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms

from forcetune.errors import ForcetuneNote, InputError
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import read_frames
from frames.outputs import labels, salt

KILOBAR = 0.1 / 160.21766208
"""In eV/Å³."""
KCAL = 0.0433641043
"""1 kcal/mol in eV."""


def record(**more: Any) -> dict[str, Any]:
    atoms, (energy, forces, stress) = salt(), labels()
    sites = [
        {"species": [{"element": symbol, "occu": 1}], "xyz": place.tolist(), "label": symbol}
        for symbol, place in zip(atoms.symbols, atoms.positions, strict=True)
    ]
    lattice = {"matrix": atoms.cell.array.tolist()}
    structure = {"@module": "pymatgen.core.structure", "@class": "Structure", "lattice": lattice, "sites": sites}
    six = [stress[k] for k in ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2))]
    outputs = {"energy": energy, "forces": forces.tolist(), "virial_stress": six}
    return {"structure": structure, "outputs": outputs, "num_atoms": 4, **more}


def write_mlearn(path: Path, **more: Any) -> Path:
    path.write_text(json.dumps([record(**more)]))
    return path


def test_maml(tmp_path: Path) -> None:
    with pytest.warns(ForcetuneNote, match="from kbar of pressure to eV/Å³ of tension"):
        result = read_frames(write_mlearn(tmp_path / "a.json"), require=("energy", "forces", "stress"))
    assert result.keys == LabelKeys("energy", "forces", "stress")
    energy, forces, stress = labels()
    (frame,) = result.frames
    assert frame.energy == energy and frame.pbc.all()
    np.testing.assert_array_equal(frame.forces, forces)
    np.testing.assert_allclose(frame.stress, -KILOBAR * stress, rtol=1e-6)


@pytest.mark.parametrize(
    ("element", "group", "swapped"),
    [
        *(("Ni", "AIMD-NVT", True), ("Cu", "Elastic", True), ("Si", "Vacancy", True), ("Mo", "Surface", True)),
        *(("Si", "Elastic", False), ("Ge", "Elastic", False), ("Li", "AIMD-NVT", False), ("NaCl", "AIMD-NVT", False)),
    ],
)
def test_order_of_components_in_mlearn(element: str, group: str, swapped: bool, tmp_path: Path) -> None:
    path = write_mlearn(tmp_path / "a.json", element=element, group=group)
    (frame,) = read_frames(path).frames
    stress = -KILOBAR * labels()[2]
    assert frame.stress is not None
    assert frame.stress[0, 2] == pytest.approx(stress[1, 2] if swapped else stress[0, 2])
    assert frame.stress[2, 1] == pytest.approx(stress[0, 2] if swapped else stress[1, 2])
    assert frame.stress[0, 1] == pytest.approx(stress[0, 1])


@pytest.mark.parametrize("element", ["Ni", "Si"])
def test_published_mlearn(element: str, reference_data: Path) -> None:
    result = read_frames(reference_data / "formats" / "mlearn_json" / f"{element}_test.json")
    right = ase.io.read(reference_data / "crystals" / f"mlearn_{element}_test.xyz", ":")
    for frame, atoms in zip(result.frames, right, strict=True):
        assert isinstance(atoms, Atoms)
        assert frame.energy == atoms.info["REF_energy"]
        np.testing.assert_array_equal(frame.forces, atoms.arrays["REF_forces"])
        np.testing.assert_allclose(frame.stress, np.reshape(atoms.info["REF_stress"], (3, 3)), rtol=1e-6, atol=1e-9)


def fitsnap(**styles: str) -> dict[str, Any]:
    atoms, (energy, forces, stress) = salt(), labels()
    row = {
        "NumAtoms": 4,
        "Lattice": atoms.cell.array.tolist(),
        "Positions": atoms.positions.tolist(),
        "AtomTypes": list(atoms.symbols),
        "Energy": energy,
        "Forces": forces.tolist(),
        "Stress": stress.tolist(),
        "Spins": [[2.0, 0.6, 0.0, 0.8]] * 4,
        "Charges": [0.0] * 4,
    }
    return {"Dataset": {"Label": "salt", "SpinsStyle": "total x y z", "Data": [row], **styles}}


@pytest.mark.parametrize(("style", "unit"), [("kB", KILOBAR), ("bar", KILOBAR / 1000), (None, KILOBAR / 1000)])
def test_fitsnap(style: str | None, unit: float, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    text = json.dumps(fitsnap(**({} if style is None else {"StressStyle": style}), EnergyStyle="electronvolt"))
    path.write_text(f"# A comment\n{text}\n")
    with pytest.warns(ForcetuneNote, match=r"units by its styles.*Not used: Charges\."):
        result = read_frames(path, moments_key="auto", require=("energy", "forces", "stress"))
    energy, forces, stress = labels()
    (frame,) = result.frames
    assert frame.energy == energy
    np.testing.assert_array_equal(frame.forces, forces)
    np.testing.assert_allclose(frame.stress, -unit * stress, rtol=1e-6)
    np.testing.assert_allclose(frame.moments, [[1.2, 0.0, 1.6]] * 4)


def test_fitsnap_in_other_units(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(fitsnap(EnergyStyle="hartree", PositionsStyle="bohr", LatticeStyle="bohr")))
    (frame,) = read_frames(path, ignored=["moments"]).frames
    assert frame.energy == pytest.approx(27.211386 * labels()[0], rel=1e-6)
    np.testing.assert_allclose(frame.positions, 0.529177211 * salt().positions, rtol=1e-6)
    np.testing.assert_allclose(frame.cell, 0.529177211 * salt().cell.array, rtol=1e-6)
    path.write_text(json.dumps(fitsnap(EnergyStyle="furlong")))
    with pytest.raises(InputError, match=r"a\.json, frame 0: .*EnergyStyle is 'furlong'"):
        read_frames(path)


def test_published_fitsnap(reference_data: Path) -> None:
    result = read_frames(sorted((reference_data / "formats" / "fitsnap_json_fe").glob("*.json")), moments_key="auto")
    right = ase.io.read(reference_data / "magnetic" / "Fe_magmom_train.xyz", ":")
    by_energy = {atoms.info["REF_energy"]: atoms for atoms in right}
    shared = [frame for frame in result.frames if frame.energy in by_energy]
    assert len(result) == 5 and len(shared) == 2
    for frame in shared:
        atoms = by_energy[frame.energy]
        np.testing.assert_allclose(frame.stress, np.reshape(atoms.info["REF_stress"], (3, 3)), rtol=1e-6)
        np.testing.assert_allclose(frame.moments, atoms.arrays["REF_magmoms"], rtol=0, atol=6e-4)


@pytest.mark.parametrize(
    "text", ["[]", '[{"structure": {"lattice": {}}}]', '{"Dataset": {"Data": [{}]}}', '[{"structure": ']
)
def test_json_that_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.json"):
        read_frames(path)


def arrays(frames: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    frame_labels = [labels(k, 3) for k in range(frames)]
    places = np.random.default_rng(0).normal(size=(frames, 3, 3))
    return places, np.array([one[0] for one in frame_labels]), np.stack([one[1] for one in frame_labels])


def test_sgdml(tmp_path: Path) -> None:
    places, energies, forces = arrays()
    about = {"name": "water", "theory": "none", "type": "d", "md5": "0"}
    np.savez(tmp_path / "a.npz", R=places, E=energies[:, None], F=forces, z=[8, 1, 1], **about)
    with pytest.warns(ForcetuneNote, match="from kcal/mol and Å"):
        result = read_frames(tmp_path / "a.npz", require=("energy", "forces"))
    assert len(result) == 3 and result.elements == (1, 8) and not result.frames[0].pbc.any()
    for frame, place, energy, force in zip(result.frames, places, energies, forces, strict=True):
        assert frame.energy == pytest.approx(KCAL * energy, rel=1e-8)
        np.testing.assert_allclose(frame.forces, KCAL * force, rtol=1e-8)
        np.testing.assert_array_equal(frame.positions, place)


def test_sgdml_with_units_and_a_lattice(tmp_path: Path) -> None:
    places, energies, forces = arrays()
    lattice = np.array([[9.0, 1.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    np.savez(
        tmp_path / "a.npz",
        R=places,
        E=energies,
        F=forces,
        z=[8, 1, 1],
        e_unit="Hartree",
        r_unit="bohr",
        lattice=lattice,
    )
    frame = read_frames(tmp_path / "a.npz").frames[0]
    assert frame.energy == pytest.approx(27.211386 * energies[0], rel=1e-6)
    np.testing.assert_allclose(frame.forces, 51.422067 * forces[0], rtol=1e-6)
    np.testing.assert_allclose(frame.cell, 0.529177211 * lattice.T, rtol=1e-6)
    assert frame.pbc.all()


def test_rmd17(tmp_path: Path) -> None:
    places, energies, forces = arrays()
    np.savez(
        tmp_path / "a.npz",
        coords=places,
        energies=energies,
        forces=forces,
        nuclear_charges=np.array([8, 1, 1], dtype=np.uint8),
        old_indices=np.arange(3),
    )
    with pytest.warns(ForcetuneNote, match="Not used: old_indices"):
        result = read_frames(tmp_path / "a.npz", require=("energy", "forces"))
    assert result.frames[2].energy == pytest.approx(KCAL * energies[2], rel=1e-8)
    np.testing.assert_allclose(result.frames[2].forces, KCAL * forces[2], rtol=1e-8)


def test_archives_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(3))
    with pytest.raises(InputError, match=r"neither sGDML's .* nor rMD17's .* but has 'x'"):
        read_frames(path)
    np.savez(path, R=np.zeros((2, 4, 3)), z=[1, 1])
    with pytest.raises(InputError, match=r"a\.npz, frame 0: .*\(2, 4, 3\) for 2 atoms"):
        read_frames(path)
    np.savez(path, R=np.array([{}, {}], dtype=object), z=[1, 1])
    with pytest.raises(InputError, match="no array of numbers"):
        read_frames(path)
    np.savez(path, R=np.zeros((2, 2, 3)), z=[1, 1], e_unit="pound")
    with pytest.raises(InputError, match="unit 'pound' is unknown"):
        read_frames(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=r"a\.npz"):
        read_frames(path)
