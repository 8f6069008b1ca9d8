"""Models and structures that every simulation program is compared with the ASE calculator for."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary

import forcetune
from sevennet_models import RECIPES, perturb, write_checkpoint

METALS = replace(RECIPES["parity, fully connected"], species=("Ni", "Cu"))


def tuned_mini(folder: Path, method: str = "mmea", seed: int = 5) -> Path:
    """The folder of an adapter on ``mini`` that does not merge, with some random values."""
    backbone = forcetune.load("mini", elements=[1, 6, 8])
    perturb(forcetune.attach(backbone, forcetune.method(method)), scale=0.02, seed=seed)
    forcetune.save_adapter(backbone, folder)
    return folder


def metal_model(folder: Path) -> Path:
    """A small SevenNet of nickel and copper with random weights."""
    return write_checkpoint(folder / "metal.pth", METALS)


def ethanol(seed: int = 1) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.03, seed=seed)
    return atoms


def water_box(repeat: int = 2, seed: int = 2) -> Atoms:
    """Water molecules on a lattice at the density of the liquid, turned at random."""
    rng = np.random.default_rng(seed)
    box = Atoms(cell=3 * [3.1 * repeat], pbc=True)
    for place in np.ndindex(*3 * [repeat]):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.standard_normal(3))
        one.positions += 3.1 * (np.array(place) + 0.5)
        box += one
    return box


def skewed_water(seed: int = 2) -> Atoms:
    """The same in a triclinic cell."""
    atoms = water_box(2, seed)
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0, 0], [0.15, 1.02, 0], [-0.1, 0.2, 1.05]]), scale_atoms=True)
    return atoms


def alloy(repeat: tuple[int, int, int] = (2, 2, 1), seed: int = 3) -> Atoms:
    """Nickel and copper on a rattled lattice."""
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True) * repeat
    atoms.numbers[::3] = 28
    atoms.rattle(0.05, seed=seed)
    return atoms


def with_velocities(atoms: Atoms, temperature: float = 200.0, seed: int = 4) -> Atoms:
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=np.random.default_rng(seed))
    Stationary(atoms)
    return atoms


def total_energy_drift(energies: np.ndarray, timestep: float, n_atoms: int) -> float:
    """Slope of the total energy, meV/atom/ps, for a time step in fs."""
    time = np.arange(len(energies)) * timestep / 1000
    return float(np.polyfit(time, energies, 1)[0]) * 1000 / n_atoms


def published_metal_model() -> str:
    """The name of a published model of metals, whose file comes with the wheel of sevenn; skips without."""
    if importlib.util.find_spec("sevenn") is None:
        pytest.skip("sevennet-0 is compared where sevenn's wheel is (pip install --no-deps sevenn)")
    return "sevennet-0"
