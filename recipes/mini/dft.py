"""Density-functional energies and forces by PySCF."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.units import Bohr, Hartree
from pyscf import dft, gto, lib

from recipes.mini.sample import FloatArray, IntArray


class ConvergenceError(Exception):
    """The self-consistent field did not converge, or the forces do not add up to zero."""


@dataclass(frozen=True, slots=True)
class Level:
    """A level of theory.

    Attributes:
        functional: a name that libxc knows.
        basis: orbital basis; the auxiliary basis of the density fit is PySCF's choice for it.
        grid: PySCF's level of the integration grid, 0 (coarse) to 9.
        tolerance: change of the energy at which the field counts as converged, hartree.
    """

    functional: str = "PBE0"
    basis: str = "def2-SVP"
    grid: int = 2
    tolerance: float = 1e-9

    def __str__(self) -> str:
        return f"{self.functional}/{self.basis}"

    @property
    def record(self) -> dict[str, str | int | float]:
        """The attributes, for a file."""
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class Calculation:
    """Energy in eV, forces (atoms, 3) in eV/Å and the number of cycles of the last field."""

    energy: float
    forces: FloatArray
    cycles: int


def calculate(level: Level, numbers: IntArray, positions: FloatArray) -> Calculation:
    """Energy and analytic forces of a neutral closed-shell molecule at ``positions`` (atoms, 3), Å.

    The field converges on a coarse grid first, where a cycle costs a tenth. The gradient includes the movement of the
    integration grid, so that it is the derivative of the energy that is reported and adds up to zero.

    Raises:
        ConvergenceError: the field did not converge, or net force or torque is left.
    """
    lib.num_threads(1)  # several threads add in changing order, and the last digits would differ between runs
    atoms = [(chemical_symbols[z], tuple(place)) for z, place in zip(numbers, positions / Bohr, strict=True)]
    molecule = gto.M(atom=atoms, unit="Bohr", basis=level.basis, verbose=0)
    # PySCF composes its classes at run time, which no type checker follows
    coarse: Any = dft.RKS(molecule, xc=level.functional).density_fit()
    coarse.grids.level = 0
    coarse.conv_tol = 1e-5
    coarse.kernel()
    field: Any = dft.RKS(molecule, xc=level.functional).density_fit()
    field.with_df = coarse.with_df
    field.grids.level = level.grid
    field.conv_tol = level.tolerance
    energy = float(field.kernel(dm0=coarse.make_rdm1()))
    if not field.converged:
        raise ConvergenceError(f"the field did not converge in {field.max_cycle} cycles")
    gradient = field.nuc_grad_method()
    gradient.grid_response = True
    forces = -np.asarray(gradient.kernel(), dtype=np.float64) * (Hartree / Bohr)
    centred = positions - positions.mean(axis=0)
    left = max(np.abs(forces.sum(axis=0)).max(), np.abs(np.cross(centred, forces).sum(axis=0)).max())
    if not (np.isfinite(energy) and np.isfinite(forces).all()) or left > 0.02:
        raise ConvergenceError(f"a net force or torque of {left:.3f} eV/Å (eV) is left")
    return Calculation(energy * Hartree, forces, int(field.cycles))


def gradient_error(level: Level, numbers: IntArray, positions: FloatArray, coordinates: int = 3) -> float:
    """Largest difference of analytic forces and central differences of the energy, eV/Å, over a few coordinates."""
    forces = calculate(level, numbers, positions).forces
    step = 0.002
    worst = 0.0
    for index in np.linspace(0, positions.size - 1, coordinates).astype(int):
        atom, axis = divmod(int(index), 3)
        energies: list[float] = []
        for sign in (1.0, -1.0):
            moved = positions.copy()
            moved[atom, axis] += sign * step
            energies.append(calculate(level, numbers, moved).energy)
        worst = max(worst, abs(-(energies[0] - energies[1]) / (2 * step) - forces[atom, axis]))
    return worst
