"""Files of many frames in every format that is streamed."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import h5py
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator


def with_results(atoms: Atoms) -> Atoms:
    """The labels of :func:`systems.labelled` as results of a calculator."""
    moved = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    forces = atoms.arrays.get("REF_forces")
    moved.calc = SinglePointCalculator(moved, energy=atoms.info["REF_energy"], forces=forces)
    return moved


def write_xyz(path: Path, frames: Sequence[Atoms]) -> Path:
    ase.io.write(path, list(frames), format="extxyz")
    return path


def write_archive(path: Path, frames: Sequence[Atoms]) -> Path:
    """Files of seven frames each in a ZIP, beside others."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("read me.txt", "no frames")
        for start in range(0, len(frames), 7):
            text = io.StringIO()
            ase.io.write(text, list(frames[start : start + 7]), format="extxyz")
            # some end in blank lines, some in none
            archive.writestr(f"sets/{start:04}.extxyz", text.getvalue().rstrip("\n") + "\n" * (start % 3))
        archive.writestr("__MACOSX/sets/._0000.extxyz", "nonsense")
    return path


def write_database(path: Path, frames: Sequence[Atoms]) -> Path:
    """An ASE database of the kind that the ending names."""
    with ase.db.connect(path) as database:
        for atoms in frames:
            database.write(with_results(atoms))
    return path


def write_trajectory(path: Path, frames: Sequence[Atoms]) -> Path:
    ase.io.write(path, [with_results(atoms) for atoms in frames])
    return path


def write_hdf5(path: Path, frames: Sequence[Atoms], batch: int = 50, **more: Any) -> Path:
    """The layout of mace's prepared data; ``more`` properties are the same for all frames."""
    with h5py.File(path, "w") as file:
        for index, atoms in enumerate(frames):
            group = file.require_group(f"config_batch_{index // batch}").create_group(f"config_{index % batch}")
            group["atomic_numbers"], group["positions"] = atoms.numbers, atoms.positions
            group["cell"], group["pbc"] = atoms.cell.array, atoms.pbc
            group["weight"], group["config_type"] = 1.0, "Default"
            properties = {"energy": atoms.info["REF_energy"], "forces": atoms.arrays.get("REF_forces", "None"), **more}
            for name, value in properties.items():
                group[f"properties/{name}"] = value
                group[f"property_weights/{name}"] = 1.0
    return path


FORMATS: dict[str, Callable[[Path, Sequence[Atoms]], Path]] = {
    "a.xyz": write_xyz,
    "a.xyz.gz": write_xyz,
    "a.extxyz.zip": write_archive,
    "a.db": write_database,
    "a.json": write_database,
    "a.aselmdb": write_database,
    "a.traj": write_trajectory,
    "a.h5": write_hdf5,
}


def assert_same(one: Any, other: Any) -> None:
    """Two frames agree in every bit but their file."""
    for name in type(one).__dataclass_fields__:
        ours, theirs = getattr(one, name), getattr(other, name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and np.array_equal(ours, theirs), name
        elif name != "origin":
            assert ours == theirs, name
