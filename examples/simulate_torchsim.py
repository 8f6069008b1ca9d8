"""Many molecules at once in torch-sim, each with its own energy and forces in one batch.

python examples/simulate_torchsim.py [MODEL] [STEPS] [MOLECULES]
"""

import sys

import numpy as np
import torch_sim
from ase.build import molecule

from forcetune.torchsim import ForcetuneModel

name = sys.argv[1] if len(sys.argv) > 1 else "mini"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
count = int(sys.argv[3]) if len(sys.argv) > 3 else 8

molecules = [molecule(("CH3CH2OH", "C6H6", "CH3CHO")[index % 3]) for index in range(count)]
for index, atoms in enumerate(molecules):
    atoms.rattle(0.02, seed=index)

model = ForcetuneModel(name)
# the name of version 0.3, and that of later ones
langevin = torch_sim.nvt_langevin if hasattr(torch_sim, "nvt_langevin") else torch_sim.Integrator.nvt_langevin
state = torch_sim.integrate(
    system=molecules, model=model, integrator=langevin, n_steps=steps, temperature=300, timestep=0.0005
)
energy = np.asarray(state.energy)
print(f"{count} molecules, {steps} steps: energies from {energy.min():.3f} to {energy.max():.3f} eV")
