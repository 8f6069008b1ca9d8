"""Magnetism on a model that knows no spin: a foundation model of iron's lattice, a sparse update and a spin layer.

    python examples/magnetic_iron.py OUT [--quick]

Run it from a checkout of the repository: the data come from recipes/spin_lattice, whose answers are known. It takes
some ten minutes on two cores; ``--quick`` only shows that it runs.
"""

import sys
from pathlib import Path

import ase.io
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forcetune
from recipes.spin_lattice.data import cell, make
from recipes.spin_lattice.foundation import train
from recipes.spin_lattice.hamiltonian import solve

out, quick = Path(sys.argv[1]), "--quick" in sys.argv
counts = {"lattice_train": 120, "lattice_valid": 20, "train": 120, "valid": 30, "test": 60}
make(out / "data", {name: max(4, count // 20) for name, count in counts.items()} if quick else counts)
if not (out / "iron.model").exists():
    train(out / "data", out / "iron.model", epochs=2 if quick else 40, channels=4 if quick else 16)

# frames with energies, forces, stress, moments (REF_magmoms) and the directions they were held along (REF_spins)
run = forcetune.fit(
    out / "data" / "train.xyz",
    model=out / "iron.model",
    method="sparse",
    valid=out / "data" / "valid.xyz",
    test=out / "data" / "test.xyz",
    epochs=2 if quick else 80,
    out=out / "run",
    settings={
        "magnetism.layer": "spin",
        "references.mode": "model",
        "training.batch_size": 8,
        "training.clip": 10.0,
        "training.loss.stress": 1.0,
        "data.doctor": "off" if quick else "on",
        "output.overwrite": True,
    },
)
print(f"report: {run.folder / 'report.html'}")

# the energy between ferromagnet and antiferromagnet, of which no perfect one was trained on
up = np.tile([0.0, 0.0, 2.2], (16, 1))
down = np.where(np.arange(16)[:, None] % 2 == 0, 1, -1) * up
atoms = cell((2, 2, 2))
atoms.calc = forcetune.calculator(run.folder)
energies = []
for spins in (up, down):
    atoms.set_initial_magnetic_moments(spins)
    energies.append(atoms.get_potential_energy() / 16)
known = [solve(atoms, spins / 2.2).energy / 16 for spins in (up, down)]
print(
    f"antiferromagnet above ferromagnet: {1e3 * (energies[1] - energies[0]):.1f} meV/atom, "
    f"known {1e3 * (known[1] - known[0]):.1f}; moment there {np.linalg.norm(atoms.get_magnetic_moments()[0]):.2f} μB"
)

# spins find their order at fixed positions
random = np.random.default_rng(0).standard_normal((16, 3)) + np.array([0.0, 0.0, 1.0])
atoms.set_initial_magnetic_moments(2.2 * random / np.linalg.norm(random, axis=1, keepdims=True))
found = forcetune.relax_spins(atoms, evaluations=20 if quick else 500)
order = np.linalg.norm(atoms.get_initial_magnetic_moments().mean(axis=0)) / 2.2
print(
    f"spins relaxed from {1e3 * found.energy_before / 16:.1f} to {1e3 * found.energy_after / 16:.1f} meV/atom, "
    f"{100 * order:.0f} % of them in one direction"
)
ase.io.write(out / "relaxed.xyz", atoms, format="extxyz")
