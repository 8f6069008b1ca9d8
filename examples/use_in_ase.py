"""The tuned potential in ASE: relax a molecule, then look at the forces of the foundation model beside it.

    python examples/use_in_ase.py RUN

RUN is the folder of a fit of molecules with H, C, N, O, such as examples/own_data.py makes.
"""

import sys

import ase.io
import numpy as np
from ase.optimize import BFGS

import forcetune

run = sys.argv[1]
atoms = ase.io.read(forcetune.demo_file("test"), index=0)

atoms.calc = forcetune.calculator(run)
relaxation = BFGS(atoms, logfile=None)
relaxation.run(fmax=0.03, steps=200)
print(f"relaxed in {relaxation.nsteps} steps to {atoms.get_potential_energy():.3f} eV")

tuned = atoms.get_forces()
atoms.calc = forcetune.calculator("mini")
print(
    f"largest force there: {np.abs(tuned).max():.3f} eV/Å tuned, {np.abs(atoms.get_forces()).max():.3f} by mini alone"
)
