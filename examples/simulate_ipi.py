"""i-PI drives the potential through ASE's socket client: path integrals, replica exchange and whatever else it has.

    python examples/simulate_ipi.py [MODEL] [STEPS] [FOLDER] [BEADS]

It writes i-PI's input to FOLDER, starts i-PI, and answers it with energies, forces and virials. Several clients can
answer one i-PI: start the lines around SocketClient as often as there are cores.
"""

import subprocess
import sys
import time
import uuid
from pathlib import Path

import ase.io
import numpy as np
from ase.build import molecule
from ase.calculators.socketio import SocketClient

import forcetune

model = sys.argv[1] if len(sys.argv) > 1 else "mini"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
folder = Path(sys.argv[3] if len(sys.argv) > 3 else "ipi")
beads = int(sys.argv[4]) if len(sys.argv) > 4 else 2

INPUT = """
<simulation verbosity='low'>
  <output prefix='simulation'>
    <properties filename='md' stride='1'>
      [ step, time{{femtosecond}}, conserved{{electronvolt}}, potential{{electronvolt}}, temperature{{kelvin}} ]
    </properties>
  </output>
  <total_steps>{steps}</total_steps>
  <ffsocket name='forcetune' mode='unix' pbc='false'><address>{address}</address></ffsocket>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase'>start.xyz</file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces><force forcefield='forcetune'/></forces>
    <motion mode='dynamics'>
      <dynamics mode='nve'><timestep units='femtosecond'> 0.25 </timestep></dynamics>
    </motion>
    <ensemble><temperature units='kelvin'> 300 </temperature></ensemble>
  </system>
</simulation>
"""

folder.mkdir(parents=True, exist_ok=True)
address = f"forcetune-{uuid.uuid4().hex[:8]}"
atoms = molecule("CH3CH2OH", cell=[20, 20, 20])
atoms.rattle(0.02, seed=0)
ase.io.write(folder / "start.xyz", atoms, format="extxyz")
(folder / "input.xml").write_text(INPUT.format(steps=steps, address=address, beads=beads))

# i-PI beside this Python
program = Path(sys.executable).with_name("i-pi")
server = subprocess.Popen([sys.executable, program, "input.xml"], cwd=folder, stdout=subprocess.DEVNULL)
try:
    for _ in range(600):
        if Path(f"/tmp/ipi_{address}").exists():
            break
        if server.poll() is not None:
            raise SystemExit("i-PI did not start; look at its input.")
        time.sleep(0.1)
    atoms.calc = forcetune.calculator(model)
    SocketClient(unixsocket=address).run(atoms, use_stress=False)
finally:
    if server.wait(timeout=60) != 0:
        raise SystemExit("i-PI ended with an error.")

conserved, potential = np.loadtxt(folder / "simulation.md", usecols=(2, 3), unpack=True)
print(f"{beads} beads, {steps} steps: potential energy {potential[-1]:.4f} eV at the end,")
print(f"conserved quantity within {1000 * np.ptp(conserved) / len(atoms) / beads:.3f} meV per atom and bead")
