"""Frames of the spin–lattice model: without spins for a foundation model, with spins for the magnetic task.

    python -m recipes.spin_lattice.data --out FOLDER

``lattice_train.xyz`` and ``lattice_valid.xyz`` have energies, forces and stress of the lattice alone. ``train.xyz``,
``valid.xyz`` and ``test.xyz`` have the whole energy, moments (``REF_magmoms``, μB) and the directions along which they
were held (``REF_spins``): strained and shaken cells of 16 atoms, ferromagnetic or antiferromagnetic with spins tilted
at random, or random altogether. Two kinds of state are kept for the end and never trained on: ``order.xyz``, the
perfect ferromagnet and antiferromagnet at several volumes, and ``spirals.xyz``, spin spirals along [001].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk

from recipes.spin_lattice.hamiltonian import LATTICE_CONSTANT, solve

COUNTS = {"lattice_train": 240, "lattice_valid": 40, "train": 160, "valid": 40, "test": 100}
LONGEST = 8
"""Cubic cells along a spiral."""


def cell(repeat: tuple[int, int, int], scale: float = 1.0) -> Atoms:
    """Perfect bcc iron, cubic cells."""
    atoms = bulk("Fe", "bcc", a=scale * LATTICE_CONSTANT, cubic=True) * repeat
    atoms.set_initial_magnetic_moments(None)  # which ASE gives to iron
    return atoms


def shaken(random: np.random.Generator) -> Atoms:
    """16 atoms, strained by up to 3 % and displaced by 0.02 to 0.12 Å."""
    atoms = cell((2, 2, 2))
    strain = random.uniform(-0.03, 0.03, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.positions += random.uniform(0.02, 0.12) * random.standard_normal(atoms.positions.shape)
    return atoms


def sublattice(atoms: Atoms) -> np.ndarray:
    """1 at corners and −1 at centres of the cubic cells; atoms alternate."""
    return np.where(np.arange(len(atoms)) % 2 == 0, 1.0, -1.0)


def directions(atoms: Atoms, kind: str, random: np.random.Generator) -> np.ndarray:
    """(atoms, 3) unit vectors: ``ferro`` or ``antiferro``, each spin tilted at random, or ``random``."""
    tilt = random.standard_normal((len(atoms), 3))
    axis = random.standard_normal(3)
    axis /= np.linalg.norm(axis)
    order = {"ferro": np.ones(len(atoms)), "antiferro": sublattice(atoms), "random": np.zeros(len(atoms))}[kind]
    vectors = order[:, None] * axis + (1.0 if kind == "random" else random.uniform(0.1, 0.8)) * tilt
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def spiral(turns: int) -> tuple[Atoms, np.ndarray]:
    """A chain of cells along z, and spins that turn ``turns`` times in the plane across it over its length."""
    atoms = cell((1, 1, LONGEST))
    angle = 2 * np.pi * turns * atoms.positions[:, 2] / atoms.cell.array[2, 2]
    return atoms, np.stack((np.cos(angle), np.sin(angle), 0 * angle), axis=1)


def labelled(atoms: Atoms, spins: np.ndarray | None) -> Atoms:
    """With the labels of the spin–lattice model."""
    state = solve(atoms, spins)
    atoms.info["REF_energy"] = state.energy
    atoms.info["REF_stress"] = state.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    atoms.arrays["REF_forces"] = state.forces
    if spins is not None:
        atoms.arrays["REF_magmoms"] = state.moments
        atoms.arrays["REF_spins"] = spins
    return atoms


def make(folder: Path, counts: dict[str, int] | None = None) -> None:
    """Write every set into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, count) in enumerate((counts or COUNTS).items()):
        random = np.random.default_rng((7, index))
        frames = []
        for number in range(count):
            atoms = shaken(random)
            kind = ("ferro", "antiferro", "random")[number % 3]
            frames.append(labelled(atoms, None if name.startswith("lattice") else directions(atoms, kind, random)))
        ase.io.write(folder / f"{name}.xyz", frames, format="extxyz")
    frames = []
    for scale in (0.98, 0.99, 1.0, 1.01, 1.02):
        for order in (np.ones, lambda n: np.where(np.arange(n) % 2 == 0, 1.0, -1.0)):
            atoms = cell((2, 2, 2), scale)
            spins = np.zeros((len(atoms), 3))
            spins[:, 2] = order(len(atoms))
            frames.append(labelled(atoms, spins))
    ase.io.write(folder / "order.xyz", frames, format="extxyz")
    frames = [labelled(*spiral(turns)) for turns in range(LONGEST + 1)]
    ase.io.write(folder / "spirals.xyz", frames, format="extxyz")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    make(parser.parse_args().out)
