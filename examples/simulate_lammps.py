"""LAMMPS with a tuned potential, gates included.

    python examples/simulate_lammps.py                                            a box of water for some steps
    python examples/simulate_lammps.py MODEL SYSTEM.lmp RUN.lmp --elements O,H    your own scripts

SYSTEM.lmp is what LAMMPS needs before the potential (units metal or real, boundary, read_data or read_restart, masses),
RUN.lmp what it does with it (fixes, thermo, dump, run). Elements are those of the atom types 1, 2, …. Start it as one
process, without mpirun; OMP_NUM_THREADS says how many cores PyTorch uses.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.io.lammpsdata import write_lammps_data

from forcetune.lammps import couple, start

SYSTEM = """
units metal
atom_style atomic
boundary p p p
read_data {data}
"""
RUN = """
velocity all create 300 1
timestep 0.0005
thermo_style custom step temp pe etotal press vol
thermo 5
fix integrate all npt temp 300 300 0.05 iso 1 1 0.5
run {steps}
"""


def water_box() -> Atoms:
    """Eight molecules on a lattice, turned at random."""
    rng = np.random.default_rng(0)
    box = Atoms(cell=[6.2] * 3, pbc=True)
    for place in np.ndindex(2, 2, 2):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.standard_normal(3))
        one.positions += 3.1 * (np.array(place) + 0.5)
        box += one
    return box


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="mini")
parser.add_argument("system", nargs="?", type=Path)
parser.add_argument("run", nargs="?", type=Path)
parser.add_argument("--elements", default="O,H", help="symbols of the atom types, in their order")
parser.add_argument("--steps", type=int, default=20, help="of the box of water")
given = parser.parse_args()
if (given.system is None) != (given.run is None):
    parser.error("give both scripts, or none")

lmp = start(["-log", "none"])
with tempfile.TemporaryDirectory() as folder:
    if given.system is None:
        data = Path(folder) / "water.data"
        write_lammps_data(data, water_box(), specorder=given.elements.split(","), masses=True, atom_style="atomic")
        system, run = Path(folder) / "system.lmp", Path(folder) / "run.lmp"
        system.write_text(SYSTEM.format(data=data))
        run.write_text(RUN.format(steps=given.steps))
    else:
        system, run = given.system, given.run
    lmp.file(str(system))
    couple(lmp, given.model, elements=given.elements.split(","))
    lmp.file(str(run))
