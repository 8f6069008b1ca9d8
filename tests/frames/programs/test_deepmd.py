"""Folders of DeePMD-kit wherever data are named, and what is refused in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms

from forcetune.errors import ForcetuneNote, ForcetuneWarning, InputError
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import read_frames
from forcetune.frames.sources import content_hash
from forcetune.frames.store.streaming import stream_frames
from frames.formats import assert_same
from frames.outputs import labels, salt
from terminal import Command


def write_system(folder: Path, frames: int = 5, *, sets: int = 2, text: bool = False, **more: Any) -> Path:
    """Salt with labels of :func:`frames.outputs.labels`, its stress standing for the virial in eV."""
    folder.mkdir(parents=True)
    (folder / "type.raw").write_text("0\n0\n1\n1\n")
    (folder / "type_map.raw").write_text("Na\nCl\n")
    frame_labels = [labels(k) for k in range(frames)]
    arrays = {
        "coord": np.stack([salt(k).positions.ravel() for k in range(frames)]),
        "box": np.stack([salt(k).cell.array.ravel() for k in range(frames)]),
        "energy": np.array([one[0] for one in frame_labels]),
        "force": np.stack([one[1].ravel() for one in frame_labels]),
        "virial": np.stack([one[2].ravel() for one in frame_labels]),
        **more,
    }
    for number, rows in enumerate(np.array_split(np.arange(frames), sets)):
        place = folder if text else folder / f"set.{number:03d}"
        place.mkdir(exist_ok=True)
        for name, array in arrays.items():
            if text:
                np.savetxt(place / f"{name}.raw", array[rows])
            else:
                np.save(place / f"{name}.npy", array[rows])
    return folder


def test_numbers(tmp_path: Path) -> None:
    path = write_system(tmp_path / "salt", dipole=np.zeros((5, 3)))
    with pytest.warns(ForcetuneNote, match=r"stress = −virial / volume.*Not used: dipole\.npy\."):
        result = read_frames(path, require=("energy", "forces", "stress"))
    assert len(result) == 5 and result.files == (str(path),)
    for index, frame in enumerate(result.frames):
        energy, forces, virial = labels(index)
        assert frame.energy == energy
        np.testing.assert_array_equal(frame.forces, forces)
        np.testing.assert_allclose(frame.stress, -virial / salt().get_volume(), rtol=1e-12)
        np.testing.assert_array_equal(frame.positions, salt(index).positions)
        assert frame.pbc.all() and str(frame.origin) == f"{path}, frame {index}"


def test_text_is_the_same(tmp_path: Path) -> None:
    one = read_frames(write_system(tmp_path / "npy")).frames
    two = read_frames(write_system(tmp_path / "raw", sets=1, text=True)).frames
    for ours, theirs in zip(one, two, strict=True):
        assert_same(ours, theirs)


def test_spins_are_moments_with_forces_of_their_own(tmp_path: Path) -> None:
    spins, forces = np.random.default_rng(0).normal(size=(2, 5, 12))
    path = write_system(tmp_path / "salt", spin=spins, force_mag=forces)
    with pytest.warns(ForcetuneNote, match=r"force_mag\.npy as magnetic forces"):
        result = read_frames(path, moments_key="auto", magforces_key="auto")
    np.testing.assert_array_equal(result.frames[3].moments, spins[3].reshape(4, 3))
    np.testing.assert_array_equal(result.frames[3].magforces, forces[3].reshape(4, 3))
    with pytest.warns(ForcetuneWarning, match="'force_mag' is not read: no key asks for it"):
        assert read_frames(path, moments_key="auto").frames[3].magforces is None


def test_mixed_frames_of_any_composition(tmp_path: Path) -> None:
    path = write_system(tmp_path / "mixed", sets=1, real_atom_types=np.array([[0, 1, 1, -1]] * 4 + [[1, 1, 0, 0]]))
    frames = read_frames(path).frames
    assert [frame.numbers.tolist() for frame in frames] == [[11, 17, 17]] * 4 + [[17, 17, 11, 11]]
    np.testing.assert_array_equal(frames[0].forces, labels(0)[1][:3])


def test_molecules(tmp_path: Path) -> None:
    path = write_system(tmp_path / "salt")
    (path / "nopbc").touch()
    frame = read_frames(path).frames[0]
    assert not frame.pbc.any() and frame.stress is None and not frame.cell.any()


def test_where_a_folder_is_named(tmp_path: Path) -> None:
    """A system, one of its sets, the folder above several, and a pattern."""
    first, second = write_system(tmp_path / "data" / "a"), write_system(tmp_path / "data" / "b", 3)
    assert len(read_frames(first / "set.001")) == 2
    both = read_frames(tmp_path / "data")
    assert len(both) == 8 and both.files == (str(first), str(second))
    for pattern in ("data/*", "data/**", "*/[ab]"):
        assert read_frames(str(tmp_path / pattern)).sha256 == both.sha256
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder, not a file, and none of deepmd data"):
        read_frames(first.parent.parent / "empty")


def test_the_hash_follows_every_array(tmp_path: Path) -> None:
    path = write_system(tmp_path / "salt")
    before = content_hash(path)
    np.save(path / "set.000" / "energy.npy", np.zeros(3))
    assert content_hash(path) != before


def test_streamed_frames_are_the_same(tmp_path: Path) -> None:
    path = write_system(tmp_path / "salt", 7)
    asked = LabelKeys("auto", "auto", "auto", "none", "none")
    stored = stream_frames([str(path)], asked, ("energy",), "data", folder=tmp_path / "store", workers=0)
    ours = read_frames(path)
    assert stored.sha256 == ours.sha256 and stored.keys == ours.keys
    for one, other in zip(stored.frames, ours.frames, strict=True):
        assert_same(one, other)
        assert one.origin == other.origin


def spoil(path: Path, how: str) -> None:
    if how == "names":
        (path / "type_map.raw").unlink()
    elif how == "few names":
        (path / "type_map.raw").write_text("Na\n")
    elif how == "element":
        (path / "type_map.raw").write_text("Na Qq\n")
    elif how == "types":
        (path / "type.raw").write_text("0 0 one 1")
    elif how == "atoms":
        (path / "type.raw").write_text("0 0 1")
    elif how == "cells":
        (path / "set.000" / "box.npy").unlink()
    elif how == "short":
        np.save(path / "set.001" / "force.npy", np.zeros((1, 12)))
    elif how == "objects":
        np.save(path / "set.000" / "energy.npy", np.array([{}, 1, 2], dtype=object))
    else:
        (path / "set.000" / "coord.npy").write_bytes((path / "set.000" / "coord.npy").read_bytes()[:200])


SPOILT = {
    "names": r"salt: deepmd without type_map\.raw numbers the types.*0 to 1, and none of them.*--type-map",
    "few names": r"1 \(Na\) of them has a name",
    "element": "an atom has the name 'Qq', which is no element",
    "types": r"type\.raw: should have the type of each atom as a number",
    "atoms": r"set\.000: coord has the shape \(3, 12\), but coord and type\.raw announce 3 frames of 3 atoms",
    "cells": r"set\.000: has no cells \(box\.npy\)",
    "short": r"set\.001: force has the shape \(1, 12\)",
    "objects": r"energy\.npy: cannot be read",
    "cut": r"coord\.npy: cannot be read",
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_refused(how: str, tmp_path: Path) -> None:
    path = write_system(tmp_path / "salt")
    spoil(path, how)
    with pytest.raises(InputError, match=SPOILT[how]):
        read_frames(path)


def test_names_of_types_by_option(tmp_path: Path) -> None:
    path = write_system(tmp_path / "salt")
    spoil(path, "names")
    assert read_frames(path, type_map=["Na", "Cl"]).elements == (11, 17)


def molecules(folder: Path, frames: int = 6) -> Path:
    """Water in a box as a system, with energies and forces of no meaning."""
    rng = np.random.default_rng(1)
    places = np.array([[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]]) + 5
    forces = rng.normal(size=(frames, 3, 3))
    (folder / "set.000").mkdir(parents=True)
    (folder / "type.raw").write_text("1 0 0")
    (folder / "type_map.raw").write_text("H O")
    for name, array in {
        "coord": (places + rng.normal(0, 0.05, (frames, 3, 3))).reshape(frames, 9),
        "box": np.tile(10 * np.eye(3).ravel(), (frames, 1)),
        "energy": -138 + rng.normal(0, 0.01, frames),
        "force": (forces - forces.mean(axis=1, keepdims=True)).reshape(frames, 9),
    }.items():
        np.save(folder / "set.000" / f"{name}.npy", array)
    return folder


def test_at_the_command_line(tmp_path: Path, command: Command) -> None:
    """Training, validation and test data, evaluation and the doctor take folders."""
    train, other = molecules(tmp_path / "train"), molecules(tmp_path / "other", 2)
    run = tmp_path / "run"
    settings = ("--set", "data.doctor=off", "--epochs", 1, "--method", "readout", "--out", run)
    code, _, said = command("fit", train, "--valid", other, "--test", other, "--model", "mini", *settings)
    assert code == 0, said
    assert f"note: {train}, a folder of DeePMD-kit: energies in eV" in said
    assert f"train: 6 frames, energy from 'energy', forces from 'forces' ({train})" in said
    for arguments in (("evaluate", "mini", train, "--json"), ("doctor", train, "--test", other, "--json")):
        code, out, said = command(*arguments)
        assert code in (0, 2) and out.startswith("{") and "error:" not in said


def test_published_systems(reference_data: Path) -> None:
    formats = reference_data / "formats"
    keys = {"moments_key": "auto", "magforces_key": "auto"}
    result = read_frames(formats / "deepmd_nio_spin", **keys, require=("energy", "forces"))
    assert len(result) == 60 and result.elements == (8, 28) and result.keys.moments == "magmoms"
    published = ase.io.read(reference_data / "magnetic" / "NiO_spin_train.xyz", ":")
    by_energy = {round(atoms.info["REF_energy"], 6): atoms for atoms in published}
    for frame in result.frames:
        assert frame.energy is not None
        atoms = by_energy[round(frame.energy, 6)]
        assert isinstance(atoms, Atoms)
        np.testing.assert_allclose(frame.moments, atoms.arrays["REF_magmoms"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(frame.magforces, atoms.arrays["REF_magforces"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(frame.forces, atoms.arrays["REF_forces"], rtol=0, atol=1e-6)
    water = read_frames(formats / "deepmd_water_dplr", require=("energy", "forces", "stress"))
    first = ase.io.read(reference_data / "water" / "water_dplr_stress_all.xyz", "0")
    assert isinstance(first, Atoms)
    stress = np.array(first.info["REF_stress"] if "REF_stress" in first.info else first.get_stress(voigt=False))
    np.testing.assert_allclose(water.frames[0].stress, stress.reshape(3, 3), rtol=1e-5, atol=1e-8)


def test_the_reported_case(case_files: Path) -> None:
    result = read_frames(case_files / "deepmd_npy", require=("energy", "forces"))
    assert len(result) == 16 and result.elements == (1, 6, 8)


def test_as_dpdata_reads_it(tmp_path: Path, reference_data: Path) -> None:
    dpdata = pytest.importorskip("dpdata")
    for path in (write_system(tmp_path / "salt"), reference_data / "formats" / "deepmd_water_dplr"):
        theirs = dpdata.LabeledSystem(str(path), fmt="deepmd/npy").data
        ours = read_frames(path).frames
        np.testing.assert_array_equal([frame.energy for frame in ours], theirs["energies"].ravel())
        np.testing.assert_array_equal([frame.forces for frame in ours], theirs["forces"])
        volumes = np.abs(np.linalg.det(theirs["cells"]))[:, None, None]
        np.testing.assert_allclose([frame.stress for frame in ours], -theirs["virials"] / volumes, rtol=1e-5)
