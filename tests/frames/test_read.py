"""Frames of published files, from memory and of constrained atoms: values untouched, defects named."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from forcetune.errors import ForcetuneWarning, InputError
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import describe_keys, frames_from_atoms, read_frames
from structures import calculated, labelled, text_frame, water

RMD17 = [
    *("aspirin", "azobenzene", "benzene", "ethanol", "malonaldehyde"),
    *("naphthalene", "paracetamol", "salicylic", "toluene", "uracil"),
]


# ---- published files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("molecule", RMD17)
def test_rmd17(molecule: str, reference_data: Path) -> None:
    result = read_frames(reference_data / "rmd17" / molecule / "train.xyz", require=("energy", "forces"))
    assert len(result) == 100
    assert result.keys == LabelKeys("REF_energy", "REF_forces", None)
    assert all(frame.energy is not None and frame.energy < -1000 for frame in result.frames)
    assert all(frame.forces is not None and frame.forces.shape == (len(frame), 3) for frame in result.frames)
    assert {frame.pbc.all() for frame in result.frames} == {np.True_}
    np.testing.assert_array_equal(result.frames[0].cell, 20 * np.eye(3))
    assert len({tuple(frame.numbers) for frame in result.frames}) == 1


def test_values_are_those_of_the_file(reference_data: Path) -> None:
    path = reference_data / "rmd17" / "aspirin" / "train.xyz"
    with path.open() as stream:
        lines = [next(stream) for _ in range(23)]
    frame = read_frames(path).frames[0]
    rows = [line.split() for line in lines[2:]]
    assert frame.energy == float(lines[1].split("REF_energy=")[1].split()[0])
    np.testing.assert_array_equal(frame.positions, np.array([row[1:4] for row in rows], dtype=float))
    assert frame.forces is not None
    np.testing.assert_array_equal(frame.forces, np.array([row[4:7] for row in rows], dtype=float))
    assert read_frames(path).elements == (1, 6, 8)
    assert str(frame.origin) == f"{path}, frame 0"


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("acac/train_300K.xyz", 500),
        ("acac/train_600K.xyz", 500),
        ("acac/test_MD_600K.xyz", 650),
        ("3bpa/train_300K.xyz", 500),
        ("3bpa/train_mixedT.xyz", 500),
    ],
)
def test_acac_and_3bpa(file: str, count: int, reference_data: Path) -> None:
    """Their keys are ``energy`` and ``forces``, which ASE moves into a calculator."""
    result = read_frames(reference_data / file, require=("energy", "forces"))
    assert len(result) == count
    assert result.keys == LabelKeys("energy", "forces", None)
    assert not any(frame.pbc.any() for frame in result.frames)
    assert all(frame.forces is not None for frame in result.frames)


@pytest.mark.parametrize("file", ["acac/test_dihedral.xyz", "acac/test_H_transfer.xyz"])
def test_energies_alone_are_enough_unless_forces_are_asked_for(file: str, reference_data: Path) -> None:
    result = read_frames(reference_data / file)
    assert result.keys == LabelKeys("energy", None, None)
    assert describe_keys(result) == "energy from 'energy', no forces, no stress"
    with pytest.raises(InputError, match="no forces found under the usual keys") as caught:
        read_frames(reference_data / file, require=("energy", "forces"), name="test data")
    assert "test data" in str(caught.value)
    assert "Set forces_key" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "elements"), [("acac/isolated_atoms.xyz", (1, 6, 8)), ("3bpa/iso_atoms.xyz", (1, 6, 7, 8))]
)
def test_isolated_atoms_need_no_forces(file: str, elements: tuple[int, ...], reference_data: Path) -> None:
    result = read_frames(reference_data / file, require=("energy", "forces"))
    assert result.elements == elements
    assert all(frame.forces is None for frame in result.frames)


def test_molecules_and_their_isolated_atoms_together(reference_data: Path) -> None:
    acac = reference_data / "acac"
    result = read_frames([acac / "isolated_atoms.xyz", acac / "train_300K.xyz"], require=("energy", "forces"))
    assert len(result) == 503
    assert result.keys == LabelKeys("energy", "forces", None)
    assert result.frames[3].origin.index == 0
    assert result.files == (str(acac / "isolated_atoms.xyz"), str(acac / "train_300K.xyz"))


# ---- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_force_that_is_not_finite_is_named(bad: str, tmp_path: Path) -> None:
    good = text_frame("energy=-1")
    path = tmp_path / "a.xyz"
    path.write_text(good + good + good.replace("4 5 6", f"4 {bad} 6"))
    with pytest.raises(InputError) as caught:
        read_frames(path)
    assert f"{path}, frame 2: the forces of atom 1 under 'forces' is {bad}" in str(caught.value)


def test_an_energy_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("REF_energy=-1") + text_frame("REF_energy=NaN"))
    with pytest.raises(InputError, match="frame 1: the energy under 'REF_energy' is nan"):
        read_frames(path)


def test_a_position_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("energy=-1").replace("H 0 0 1", "H 0 nan 1"))
    with pytest.raises(InputError, match="frame 0: the position of atom 1 is not finite"):
        read_frames(path)


def test_an_energy_that_is_a_word_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("REF_energy=converged"))
    with pytest.raises(InputError, match="frame 0: the energy under 'REF_energy' is not a number but 'converged'"):
        read_frames(path)


def test_an_energy_per_atom_is_not_a_total_energy() -> None:
    atoms = water()
    atoms.info["REF_energy"] = np.array([1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="should be one number but has 3"):
        frames_from_atoms([atoms])


def test_an_energy_written_as_a_list_of_one_is_taken() -> None:
    atoms = water()
    atoms.info["REF_energy"] = np.array([-3.0])
    assert frames_from_atoms([atoms]).frames[0].energy == -3.0


def test_flat_forces_are_taken_and_wrong_shapes_named() -> None:
    atoms = water()
    atoms.info |= {"REF_energy": -1.0, "REF_forces": np.arange(9.0)}
    forces = frames_from_atoms([atoms]).frames[0].forces
    assert forces is not None
    np.testing.assert_array_equal(forces, np.arange(9.0).reshape(3, 3))
    atoms.info["REF_forces"] = np.arange(6.0)
    with pytest.raises(InputError, match=r"should have shape \(3, 3\) but have \(6,\)"):
        frames_from_atoms([atoms])


def test_frames_do_not_share_memory_with_the_structures() -> None:
    atoms = labelled()
    frame = frames_from_atoms([atoms]).frames[0]
    before = frame.positions.copy()
    atoms.positions += 1.0
    atoms.arrays["REF_forces"] += 1.0
    np.testing.assert_array_equal(frame.positions, before)
    assert frame.forces is not None
    assert not np.array_equal(frame.forces, atoms.arrays["REF_forces"])


def test_an_atom_without_an_element() -> None:
    atoms = Atoms("OX", positions=np.eye(3)[:2], info={"energy": -1.0})
    with pytest.raises(InputError, match=r"<atoms>, frame 0: atom 1 has no element"):
        frames_from_atoms([atoms])


# ---- constraints ------------------------------------------------------------------------------------------


def test_constrained_atoms_keep_their_forces_in_extxyz(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(
        "2\nProperties=species:S:1:pos:R:3:move_mask:L:1:forces:R:3 energy=-1\nO 0 0 0 F 1 2 3\nH 0 0 1 T 4 5 6\n"
    )
    atoms = ase.io.read(path)
    assert isinstance(atoms, Atoms)
    np.testing.assert_array_equal(atoms.get_forces()[0], 0)  # the trap: ASE's own answer
    forces = read_frames(path).frames[0].forces
    assert forces is not None
    np.testing.assert_array_equal(forces, [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize("file", ["a.traj", "a.db", "a.json"])
def test_constrained_atoms_keep_their_forces_in_binary_files(file: str, tmp_path: Path) -> None:
    atoms = calculated(constrained=True)
    assert atoms.calc is not None
    true_forces = atoms.calc.results["forces"]
    ase.io.write(tmp_path / file, atoms)
    result = read_frames(tmp_path / file)
    assert result.keys.forces == "calculator"
    assert result.frames[0].forces is not None
    np.testing.assert_allclose(result.frames[0].forces, true_forces, rtol=0, atol=1e-12)
    assert np.abs(result.frames[0].forces[:2]).min() > 0


def test_constrained_atoms_keep_their_forces_in_memory() -> None:
    atoms = calculated(constrained=True)
    assert atoms.calc is not None
    forces = frames_from_atoms([atoms]).frames[0].forces
    assert forces is not None
    np.testing.assert_array_equal(forces, atoms.calc.results["forces"])


# ---- structures in memory ---------------------------------------------------------------------------------


def test_results_of_a_calculator() -> None:
    """What the readers of VASP, CP2K, … outputs give."""
    result = frames_from_atoms([calculated(i, stress=np.arange(6.0)) for i in range(2)], require=("energy", "forces"))
    assert result.keys == LabelKeys("calculator", "calculator", "calculator")
    assert result.files == ("<atoms>",)
    assert str(result.frames[1].origin) == "<atoms>, frame 1"


def test_results_of_a_structure_that_moved_are_not_taken() -> None:
    atoms = calculated()
    atoms.positions[0] += 0.1
    with pytest.raises(InputError, match="the results of the calculator belong to another structure"):
        frames_from_atoms([atoms])


def test_results_of_one_calculator_for_all_belong_to_the_last() -> None:
    calculator = EMT()
    frames = []
    for seed in range(2):
        atoms = water(seed)
        atoms.calc = calculator
        atoms.get_potential_energy()
        frames.append(atoms)
    with pytest.raises(InputError, match="frame 0 has no energy under 'calculator'"):
        frames_from_atoms(frames)


def test_nothing_is_calculated() -> None:
    class Refuses(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, *args: object, **kwargs: object) -> None:
            pytest.fail("calculated")

    atoms = water()
    atoms.calc = Refuses()
    with pytest.raises(InputError, match="no energy found"):
        frames_from_atoms([atoms])


def test_labels_in_info_go_before_the_calculator() -> None:
    atoms = calculated()
    atoms.info["REF_energy"] = -99.0
    with pytest.warns(ForcetuneWarning, match="'calculator' with other values ignored"):
        result = frames_from_atoms([atoms])
    assert result.keys.energy == "REF_energy"
    assert result.frames[0].energy == -99.0
    assert frames_from_atoms([atoms], energy_key="calculator").frames[0].energy == -14.0


def test_no_structures() -> None:
    with pytest.raises(InputError, match="the list of structures is empty"):
        frames_from_atoms([])


def test_the_hash_in_memory_follows_the_content() -> None:
    first = frames_from_atoms([labelled(0), labelled(1)])
    assert first.sha256 == frames_from_atoms([labelled(0), labelled(1)]).sha256
    changed = labelled(1)
    changed.info["REF_energy"] += 1e-9
    assert first.sha256 != frames_from_atoms([labelled(0), changed]).sha256
