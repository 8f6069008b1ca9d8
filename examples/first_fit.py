"""The whole job on data made on the spot, about a minute: a base, a fit, the report, and the potential in ASE.

    python examples/first_fit.py [FOLDER]

The base is a small MACE trained here on copper–gold clusters at one level of theory (ASE's EMT potential). The new
data, 30 frames, are of another level: EMT with an additional Morse attraction between all atoms.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.mixing import SumCalculator
from ase.calculators.morse import MorsePotential
from ase.io import write

import forcetune
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.rebuild import MaceArchitecture, build

CHEAP = EMT()
BETTER = SumCalculator([EMT(), MorsePotential(epsilon=0.15, r0=2.8, rho0=4.0)])


def frames(level: object, count: int, seed: int) -> list[Atoms]:
    """Shaken clusters of 13 atoms in random composition, with energy and forces of ``level`` as labels."""
    rng = np.random.default_rng(seed)
    crystal = bulk("Cu", cubic=True, a=3.8) * 3
    centre = crystal[np.argsort(np.linalg.norm(crystal.positions - crystal.positions.mean(axis=0), axis=1))[:13]]
    found = []
    for _ in range(count):
        atoms = Atoms(rng.choice([29, 79], 13), centre.positions + 0.15 * rng.standard_normal((13, 3)))
        atoms.calc = level
        atoms.info["REF_energy"] = atoms.get_potential_energy()
        atoms.arrays["REF_forces"] = atoms.get_forces()
        atoms.calc = None
        found.append(atoms)
    return found


def main(folder: Path) -> None:
    """Make data and a base, then fine-tune, evaluate and use the result."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, level, count in (("cheap", CHEAP, 120), ("train", BETTER, 30), ("test", BETTER, 100)):
        write(folder / f"{name}.xyz", frames(level, count, seed=count), format="extxyz")

    architecture = MaceArchitecture(
        kind="ScaleShiftMACE",
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=2,
        interactions=("RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock"),
        atomic_numbers=(29, 79),
        hidden_irreps="16x0e+16x1o",
        MLP_irreps="8x0e",
        avg_num_neighbors=(9.0, 9.0),
        correlation=(2, 2),
        gate="silu",
        radial_MLP=(32, 32),
    )
    MaceBackbone.from_module(build(architecture)).save(folder / "random.model")
    print("1. A base at the cheap level: every weight of a small MACE, from random values")
    settings = {"references.mode": "average", "training.learning_rate": 0.01, "output.overwrite": True}
    random = folder / "random.model"
    forcetune.fit(folder / "cheap.xyz", model=random, method="full", epochs=25, out=folder / "base", settings=settings)
    forcetune.merge(folder / "base", folder / "base.model")

    print("\n2. Fine-tuning on 30 frames of the better level: forcetune fit train.xyz --model base.model --method mmea")
    run = forcetune.fit(
        folder / "train.xyz",
        model=folder / "base.model",
        method="mmea",
        valid=0.3,
        test=folder / "test.xyz",
        epochs=60,
        out=folder / "run",
        settings={"output.overwrite": True},
    )
    before, after = run.before["test"], run.after["test"]
    print(f"\nforces, MAE on 100 test frames: {before.forces_mae_mev_per_ang:.0f} meV/Å before", end=", ")
    print(f"{after.forces_mae_mev_per_ang:.0f} after")
    energies = (before.energy_mae_mev_per_atom, after.energy_mae_mev_per_atom)
    print("energy, MAE: {:.1f} meV/atom before, {:.1f} after".format(*energies))

    atoms = frames(BETTER, 1, seed=7)[0]
    atoms.calc = forcetune.calculator(run.folder)
    reference = atoms.info["REF_energy"]
    print(f"\n3. In ASE: {atoms.get_potential_energy():.3f} eV, where the better level has {reference:.3f} eV")
    print(f"The report: {run.folder / 'report.html'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        main(Path(tempfile.mkdtemp(prefix="forcetune-")))
