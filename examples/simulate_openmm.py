"""OpenMM with a tuned potential: a molecule alone, and the same molecule in water of a force field.

python examples/simulate_openmm.py [MODEL] [STEPS]
"""

import sys

import numpy as np
import openmm
from ase.build import molecule
from openmm import app, unit

from forcetune.openmm import create_mixed_system, create_system

model = sys.argv[1] if len(sys.argv) > 1 else "mini"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100


def simulate(system: openmm.System, positions: np.ndarray) -> str:
    """Langevin dynamics at 300 K from these positions, Å."""
    context = openmm.Context(system, openmm.LangevinMiddleIntegrator(300, 1.0, 0.0005))
    context.setPositions(0.1 * positions)
    context.setVelocitiesToTemperature(300, 1)
    context.getIntegrator().step(steps)
    energy = context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    return f"{steps} steps, {energy / 96.48533:.3f} eV"


# the potential is everything
ethanol = molecule("CH3CH2OH")
print("a molecule alone:", simulate(create_system(ethanol, model), ethanol.positions))

# water in a box of force-field water: the potential acts within the first molecule, the force field everywhere else
rng = np.random.default_rng(0)
topology, positions = app.Topology(), []
topology.setPeriodicBoxVectors(1.55 * np.eye(3) * unit.nanometer)
chain = topology.addChain()
for place in np.ndindex(5, 5, 5):
    residue = topology.addResidue("HOH", chain)
    oxygen, *hydrogens = [topology.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in ("O", "H1", "H2")]
    for hydrogen in hydrogens:
        topology.addBond(oxygen, hydrogen)
    one = molecule("H2O")
    one.rotate(rng.uniform(0, 360), rng.standard_normal(3))
    positions.append(one.positions + 3.1 * np.array(place))
classical = app.ForceField("tip3p.xml").createSystem(
    topology, nonbondedMethod=app.PME, nonbondedCutoff=0.7 * unit.nanometer, constraints=None, rigidWater=False
)
mixed = create_mixed_system(classical, range(3), ["O", "H", "H"], model)
print("a molecule in a force field:", simulate(mixed, np.concatenate(positions)))
