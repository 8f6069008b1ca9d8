"""Phonons of a crystal by phonopy, with forces from a tuned potential.

    python examples/phonons.py MODEL [STRUCTURE]

STRUCTURE is a file that ASE reads; without one it is copper, which MODEL then has to know.
"""

import sys

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

import forcetune

atoms = ase.io.read(sys.argv[2]) if len(sys.argv) > 2 else bulk("Cu", "fcc", a=3.6)
calculator = forcetune.calculator(sys.argv[1])
atoms.calc = calculator
BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=100)
print(
    f"relaxed: {atoms.get_potential_energy() / len(atoms):.4f} eV/atom, {atoms.get_volume() / len(atoms):.3f} Å³/atom"
)

cell = PhonopyAtoms(symbols=list(atoms.symbols), cell=atoms.cell.array, scaled_positions=atoms.get_scaled_positions())
repeats = np.ceil(8.0 / atoms.cell.lengths()).astype(int)
phonon = Phonopy(cell, supercell_matrix=np.diag(repeats))
phonon.generate_displacements(distance=0.01)
forces = []
for displaced in phonon.supercells_with_displacements:
    moved = Atoms(displaced.symbols, cell=displaced.cell, scaled_positions=displaced.scaled_positions, pbc=True)
    moved.calc = calculator
    forces.append(moved.get_forces())
phonon.forces = forces
phonon.produce_force_constants()
phonon.symmetrize_force_constants()

phonon.run_mesh([10, 10, 10])
phonon.run_thermal_properties(t_min=300, t_max=300, t_step=10)
for name, point in (("Γ", [0, 0, 0]), ("X", [0.5, 0, 0.5])):
    phonon.run_qpoints([point])
    print(name, "THz:", *(f"{frequency:.4f}" for frequency in phonon.qpoints.frequencies[0]))
print(f"heat capacity at 300 K: {phonon.thermal_properties.heat_capacity[0]:.2f} J/(K mol of cells)")
