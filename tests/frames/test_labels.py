"""Labels are read under the right key, and one choice holds for all frames."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from forcetune.errors import ForcetuneWarning, InputError
from forcetune.frames.frame import LabelKeys
from forcetune.frames.labels import CANDIDATES
from forcetune.frames.read import describe_keys, frames_from_atoms, read_frames
from structures import calculated, labelled, text_frame, water, write

# ---- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy_key", [key for key in CANDIDATES["energy"] if key != "calculator"])
def test_every_usual_energy_key_is_found_in_files(energy_key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame(f"{energy_key}=-1.5"))
    result = read_frames(path)
    assert result.keys.energy == energy_key
    assert result.frames[0].energy == -1.5


@pytest.mark.parametrize("forces_key", [key for key in CANDIDATES["forces"] if key != "calculator"])
def test_every_usual_forces_key_is_found_in_files(forces_key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("energy=-1").replace("forces:R", f"{forces_key}:R"))
    result = read_frames(path, require=("energy", "forces"))
    assert result.keys.forces == forces_key
    assert result.frames[0].forces is not None
    np.testing.assert_array_equal(result.frames[0].forces, [[1, 2, 3], [4, 5, 6]])


def test_a_reference_key_goes_before_a_plain_one_and_the_other_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("energy=-1 REF_energy=-2"))
    with pytest.warns(ForcetuneWarning, match="energy taken from 'REF_energy'; 'energy' with other values ignored"):
        result = read_frames(path)
    assert result.frames[0].energy == -2
    assert read_frames(path, energy_key="energy").frames[0].energy == -1


def test_the_same_values_under_two_keys_are_no_news(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("energy=-1 REF_energy=-1"))
    assert read_frames(path).keys.energy == "REF_energy"


def test_free_energy_is_the_last_resort(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("energy=-1 free_energy=-1"))
    assert read_frames(path).keys.energy == "energy"


def test_explicit_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", *(labelled(i, energy_key="E_ccsd", forces_key="F_ccsd") for i in range(3)))
    result = read_frames(path, energy_key="E_ccsd", forces_key="F_ccsd", require=("energy", "forces"))
    assert result.keys == LabelKeys("E_ccsd", "F_ccsd", None)
    assert [frame.energy for frame in result.frames] == [-14, -15, -16]
    assert describe_keys(result) == "energy from 'E_ccsd', forces from 'F_ccsd', no stress"


def test_none_leaves_a_label_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", labelled())
    assert read_frames(path, forces_key="none").keys == LabelKeys("REF_energy", None, None)
    with pytest.raises(InputError, match="forces_key is 'none', but forces labels are needed"):
        read_frames(path, forces_key="none", require=("energy", "forces"))


def test_a_missing_energy_lists_the_keys_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", labelled(energy_key="E_ccsd", forces_key="F_ccsd"))
    with pytest.raises(InputError, match="no energy found under the usual keys") as caught:
        read_frames(path)
    assert str(path) in str(caught.value)
    assert "'E_ccsd', 'F_ccsd'" in str(caught.value)
    assert "Set energy_key" in str(caught.value)


def test_a_wrong_explicit_key_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", labelled())
    with pytest.raises(
        InputError, match="no frame has energy under 'E'; the keys there are 'REF_energy', 'REF_forces'"
    ):
        read_frames(path, energy_key="E")


def test_no_labels_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", water())
    with pytest.raises(InputError, match="there are no labels at all"):
        read_frames(path)


def test_one_frame_without_energy_is_named(tmp_path: Path) -> None:
    frames = [labelled(i) for i in range(4)]
    del frames[2].info["REF_energy"]
    path = write(tmp_path / "a.xyz", *frames)
    with pytest.raises(InputError) as caught:
        read_frames(path)
    assert f"{path}, frame 2 has no energy under 'REF_energy' (1 of 4 frames lack it)" in str(caught.value)


def test_one_frame_without_forces(tmp_path: Path) -> None:
    frames = [labelled(i) for i in range(4)]
    del frames[1].arrays["REF_forces"]
    path = write(tmp_path / "a.xyz", *frames)
    with pytest.raises(InputError, match="frame 1 has no forces under 'REF_forces'"):
        read_frames(path, require=("energy", "forces"))
    with pytest.warns(ForcetuneWarning, match=r"1 of 4 frames have no forces under 'REF_forces', first .*frame 1"):
        result = read_frames(path)
    assert [frame.forces is None for frame in result.frames] == [False, True, False, False]


def test_one_key_holds_for_all_files(tmp_path: Path) -> None:
    """Energies of two codes must not be mixed because their keys happen to differ."""
    first = write(tmp_path / "a.xyz", labelled(0))
    second = write(tmp_path / "b.xyz", labelled(1, energy_key="dft_energy", forces_key="REF_forces"))
    with pytest.raises(InputError, match=r"b\.xyz, frame 0 has no energy under 'REF_energy'") as caught:
        read_frames([first, second])
    assert "'dft_energy'" in str(caught.value)


# ---- stress -----------------------------------------------------------------------------------------------

VOIGT = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # xx, yy, zz, yz, xz, xy
MATRIX = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])


@pytest.mark.parametrize("value", [VOIGT, MATRIX, MATRIX.ravel()])
@pytest.mark.parametrize("key", ["stress", "REF_stress"])
def test_stress_in_every_shape(key: str, value: np.ndarray, tmp_path: Path) -> None:
    atoms = water(cell=5.0)
    atoms.info |= {"REF_energy": -1.0, key: value}
    for result in (frames_from_atoms([atoms]), read_frames(write(tmp_path / "a.xyz", atoms))):
        assert result.keys.stress == key
        assert result.frames[0].stress is not None
        np.testing.assert_allclose(result.frames[0].stress, MATRIX, rtol=0, atol=1e-12)


def test_stress_of_a_calculator_is_in_ase_order() -> None:
    atoms = calculated(stress=VOIGT)
    frame = frames_from_atoms([atoms]).frames[0]
    assert frame.stress is not None
    np.testing.assert_array_equal(frame.stress, MATRIX)
    np.testing.assert_array_equal(frame.stress, atoms.get_stress(voigt=False))


@pytest.mark.parametrize("key", ["virial", "virials", "REF_virial", "REF_virials", "dft_virial"])
@pytest.mark.parametrize("value", [VOIGT, MATRIX, MATRIX.ravel()])
def test_virial_becomes_stress_with_the_opposite_sign(key: str, value: np.ndarray, tmp_path: Path) -> None:
    atoms = water(cell=5.0)
    atoms.info |= {"REF_energy": -1.0, key: value}
    results = [frames_from_atoms([atoms])]
    if key != "virial" or value.size == 9:  # ASE reads the key virial in nine numbers only
        results.append(read_frames(write(tmp_path / "a.xyz", atoms)))
    for frames in results:
        assert frames.keys.stress == key
        assert frames.frames[0].stress is not None
        np.testing.assert_allclose(frames.frames[0].stress, -MATRIX / (5 * 6 * 7), rtol=1e-12)


def test_the_sign_of_the_stress_is_that_of_the_energy_under_strain() -> None:
    """Physics: stress = dE/dε / V, so a stretched crystal pulls (positive) and a squeezed one pushes."""
    for scale, sign in ((1.03, 1), (0.97, -1)):
        atoms = Atoms("Cu", cell=3.61 * scale * (np.ones((3, 3)) - np.eye(3)) / 2, pbc=True) * (2, 2, 2)
        atoms.calc = EMT()
        atoms.get_potential_energy()
        atoms.get_stress()
        stress = frames_from_atoms([atoms]).frames[0].stress
        assert stress is not None
        assert (np.sign(np.diag(stress)) == sign).all()


def test_a_virial_without_a_cell_is_told() -> None:
    atoms = water()
    atoms.info |= {"REF_energy": -1.0, "virial": VOIGT}
    with pytest.raises(InputError, match="cannot become a stress because the cell has no volume"):
        frames_from_atoms([atoms])
    assert frames_from_atoms([atoms], stress_key="none").frames[0].stress is None


def test_a_stress_of_wrong_shape_is_told() -> None:
    atoms = water(cell=5.0)
    atoms.info |= {"REF_energy": -1.0, "REF_stress": np.ones(3)}
    with pytest.raises(InputError, match=r"should be 6 or 9 numbers but has shape \(3,\)"):
        frames_from_atoms([atoms])


def test_molecules_need_no_stress_where_crystals_have_one() -> None:
    crystal = calculated(stress=VOIGT)
    molecule = water()
    molecule.calc = SinglePointCalculator(molecule, energy=-1.0, forces=np.zeros((3, 3)))
    result = frames_from_atoms([crystal, molecule], require=("energy", "stress"))
    assert [frame.stress is None for frame in result.frames] == [False, True]
    with pytest.raises(InputError, match="frame 1 has no stress"):
        frames_from_atoms([crystal, calculated()], require=("energy", "stress"))


def test_reading_leaves_the_structures_alone_and_says_nothing() -> None:
    atoms = calculated(constrained=True)
    before = atoms.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames_from_atoms([atoms])
    assert atoms == before
    assert len(atoms.constraints) == 1


def test_an_unknown_label_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="not among"):
        frames_from_atoms([labelled()], require=("dipole",))
