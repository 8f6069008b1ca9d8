"""Dynamics in ASE that stop where the potential is not to be trusted.

    python examples/simulate_ase.py [MODEL] [STEPS]

MODEL is a run folder, a model's name or file; by default the foundation model in the package.
"""

import sys

import ase.io
import numpy as np
from ase import units
from ase.md.langevin import Langevin

import forcetune

model = sys.argv[1] if len(sys.argv) > 1 else "mini"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200

atoms = ase.io.read(forcetune.demo_file("test"), index=0)
# an atom whose surroundings are five times as far from all training frames as is usual ends the simulation
atoms.calc = forcetune.watch(forcetune.calculator(model), frames=forcetune.demo_file("train"), novelty=5.0)
dynamics = Langevin(
    atoms, 0.5 * units.fs, temperature_K=300, friction=0.02 / units.fs, rng=np.random.default_rng(0), fixcm=False
)
novelty = []
dynamics.attach(lambda: novelty.append(atoms.calc.results["novelty"].max()), interval=10)
dynamics.run(steps)
print(f"{steps} steps, {atoms.get_temperature():.0f} K, {atoms.get_potential_energy():.3f} eV")
print(f"novelty of surroundings: at most {max(novelty):.1f}, 1 is usual among the training frames")
