"""The frames of a run: splits, isolated atoms, several tests, keys that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ase import Atoms
from ase.io import write

from forcetune.config import DataConfig
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.frames.dataset import read_dataset
from systems import labelled, write_labelled


def config(train: Path, **options: Any) -> DataConfig:
    return DataConfig.model_validate({"train": [str(train)]} | options)


def isolated(z: str) -> Atoms:
    atoms = Atoms(z)
    atoms.info["REF_energy"] = -1.0
    return atoms


def test_isolated_atoms_are_references_and_not_examples(tmp_path: Path) -> None:
    write(tmp_path / "a.xyz", [isolated("H"), *labelled(10), isolated("O")], format="extxyz")
    dataset = read_dataset(config(tmp_path / "a.xyz", valid=3))
    assert (len(dataset.train.frames), len(dataset.valid.frames), len(dataset.isolated)) == (7, 3, 2)
    assert dataset.elements == (1, 6, 8)
    write(tmp_path / "b.xyz", [isolated("H")], format="extxyz")
    with pytest.raises(InputError, match="isolated atoms only; give frames to train on"):
        read_dataset(config(tmp_path / "b.xyz"))
    with pytest.raises(InputError, match="isolated atoms only; give frames to validate on"):
        read_dataset(config(tmp_path / "a.xyz", valid=[str(tmp_path / "b.xyz")]))


def test_tests_are_named_by_their_files(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "a.xyz")
    (tmp_path / "b").mkdir()
    files = [
        write_labelled(tmp_path / name, 3, seed) for seed, name in enumerate(["t300.xyz", "t600.xyz", "b/t300.xyz"])
    ]
    one = read_dataset(config(train, test=[str(files[0])]))
    assert list(one.splits) == ["train", "valid", "test"]
    several = read_dataset(config(train, test=[str(file) for file in files]))
    assert list(several.tests) == ["test t300 1", "test t600", "test t300 3"]


def test_energies_alone_are_enough_for_a_test_but_not_for_training(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "a.xyz")
    frames = labelled(4, seed=3)
    for atoms in frames:
        del atoms.arrays["REF_forces"]
    write(tmp_path / "dihedral.xyz", frames, format="extxyz")
    dataset = read_dataset(config(train, test=[str(tmp_path / "dihedral.xyz")]))
    assert dataset.tests["test"].keys.forces is None
    with pytest.raises(InputError, match="no forces found"):
        read_dataset(config(tmp_path / "dihedral.xyz"))
    assert read_dataset(config(tmp_path / "dihedral.xyz", valid=1, forces_key="none")).train.keys.forces is None


def test_other_keys_in_other_files_are_told(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "a.xyz")
    frames = labelled(4, seed=3)
    for atoms in frames:
        atoms.info["dft_energy"] = atoms.info.pop("REF_energy")
    write(tmp_path / "b.xyz", frames, format="extxyz")
    with pytest.warns(
        ForcetuneWarning, match="energy from 'dft_energy', but the training data have it under 'REF_energy'"
    ):
        read_dataset(config(train, test=[str(tmp_path / "b.xyz")]))


def test_published_few_shot_split(reference_data: Path) -> None:
    import numpy as np

    dataset = read_dataset(config(reference_data / "rmd17" / "aspirin" / "train.xyz", valid=0.5))
    order = list(range(100))
    np.random.default_rng(123).shuffle(order)
    assert [frame.origin.index for frame in dataset.train.frames] == order[:50]
    assert [frame.origin.index for frame in dataset.valid.frames] == order[50:]
