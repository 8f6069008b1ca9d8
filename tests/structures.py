"""Small structures with labels, and files of them."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms


def water(seed: int = 0, *, cell: float | None = None) -> Atoms:
    """A distorted water molecule without labels."""
    positions = np.array([[0.0, 0.0, 0.1], [0.0, 0.8, -0.5], [0.0, -0.8, -0.5]])
    positions += 0.1 * np.random.default_rng(seed).standard_normal(positions.shape)
    box = {} if cell is None else {"cell": [cell, cell + 1, cell + 2], "pbc": True}
    return Atoms("OH2", positions=positions, **box)


def labelled(seed: int = 0, *, energy_key: str = "REF_energy", forces_key: str = "REF_forces") -> Atoms:
    """Water with an energy and forces under these keys."""
    atoms = water(seed)
    atoms.info[energy_key] = -14.0 - seed
    atoms.arrays[forces_key] = np.random.default_rng(100 + seed).standard_normal((3, 3))
    return atoms


def calculated(seed: int = 0, *, stress: np.ndarray | None = None, constrained: bool = False) -> Atoms:
    """Water with results of a calculation attached, as ASE's readers of DFT outputs leave them."""
    atoms = water(seed, cell=7.0)
    forces = np.random.default_rng(100 + seed).standard_normal((3, 3))
    atoms.calc = SinglePointCalculator(atoms, energy=-14.0 - seed, forces=forces, stress=stress)
    if constrained:
        atoms.set_constraint(FixAtoms([0, 1]))
    return atoms


def write(path: Path, *frames: Atoms) -> Path:
    """Write extended XYZ and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ase.io.write(path, list(frames), format="extxyz")
    return path


def text_frame(comment: str, rows: str = "O 0 0 0 1 2 3\nH 0 0 1 4 5 6\n", atoms: int = 2) -> str:
    """One frame of extended XYZ with forces, to write or to spoil."""
    return f"{atoms}\nProperties=species:S:1:pos:R:3:forces:R:3 {comment}\n{rows}"
