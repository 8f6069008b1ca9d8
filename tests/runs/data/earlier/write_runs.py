"""Write ``runs.zip``: runs of the commit before the networks of our own (60d249c), and what it predicts from them.

In a checkout of that commit, in an environment with what its ``constraints/mace.txt`` names::

    PYTHONPATH=CHECKOUT/src python write_runs.py runs.zip

``mini`` is tuned for a few steps by each method on frames in which springs hold pairs of atoms. ``expected.npz`` has
five structures, and energy (eV), forces (eV/Å), stress (eV/Å³, where periodic) and moments (μB) that the ASE calculator
of that commit gives for them, and for the base alone.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import write

import forcetune

SYMBOLS = ("H", "O")
SPRING = 2.0  # eV/Å²
PART = "interactions.0.(linear|skip_tp).*|products.1.*|readouts.*"
"""Sites of some methods, so that files stay small."""
GAIN = {"update": "Gain"}
SHIFT = {"update": "Shift"}
METHODS = {
    "mmea": {"method.rank": 2, "method.target": PART},
    "elora": {"method.rank": 2},
    "elora-norms": {"method.name": "elora", "method.rank": 2, "method.norms": True},
    "gain-and-shift": {"method.table": {"linear": [GAIN, SHIFT], "readout": [SHIFT]}},
    "sparse": {"method.target": PART},
    "sparse-h": {"method.target": PART},
    "full": {"method.target": PART},
    "readout": {},
    "lora-spin": {"method.name": "lora", "magnetism.layer": "spin", "magnetism.channels": 8},
}
"""Name of a run to its settings; the method is called like the run where nothing else is said."""
COMPLETE = "elora"
"""The run of which everything is stored but checkpoints and the report; of others configuration and adapter are."""


def structures(count: int, seed: int) -> list[Atoms]:
    """Shaken crystals and clusters of eight atoms with magnetic moments along z."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*3 * [np.arange(2)]), axis=-1).reshape(-1, 3) * 1.9
    made = []
    for index in range(count):
        atoms = Atoms([SYMBOLS[k % 2] for k in range(8)], grid + rng.uniform(-0.25, 0.25, (8, 3)))
        if index % 2 == 0:
            atoms.set_cell(np.diag([4.0, 4.2, 4.4]) + 0.3 * np.tri(3, k=-1))
            atoms.pbc = True
        atoms.set_initial_magnetic_moments(rng.uniform(0.5, 1.5, 8) * rng.choice([-1.0, 1.0], 8))
        made.append(atoms)
    return made


def label(atoms: Atoms) -> Atoms:
    """Springs of the length of 2 Å between all pairs inside of the cell, each E = ½ k (d - 2)²."""
    vectors = atoms.positions[None] - atoms.positions[:, None]
    distances = np.linalg.norm(vectors, axis=-1) + 2.0 * np.eye(len(atoms))
    stretch = distances - 2.0
    atoms.info["REF_energy"] = -800.0 + 0.25 * SPRING * float((stretch**2).sum())
    atoms.arrays["REF_forces"] = SPRING * ((stretch / distances)[..., None] * vectors).sum(axis=1)
    atoms.arrays["REF_magmom"] = 0.9 * atoms.get_initial_magnetic_moments()
    return atoms


def predictions(calculator: object, systems: list[Atoms], name: str) -> dict[str, np.ndarray]:
    results = {}
    for index, atoms in enumerate(systems):
        atoms = atoms.copy()
        atoms.calc = calculator
        results[f"{name}/{index}/energy"] = np.array(atoms.get_potential_energy())
        results[f"{name}/{index}/forces"] = atoms.get_forces()
        if atoms.pbc.all():
            results[f"{name}/{index}/stress"] = atoms.get_stress()
        if name.endswith("spin"):
            results[f"{name}/{index}/moments"] = atoms.get_magnetic_moments()
    return results


def fit(folder: Path, name: str) -> None:
    settings = {"training.batch_size": 4, "training.threads": 1, "training.seed": 1, "data.doctor": "off"}
    if "method.table" not in METHODS[name]:
        settings["method.name"] = name
    forcetune.fit(
        folder / "train.xyz",
        model="mini",
        valid=folder / "valid.xyz",
        epochs=3,
        out=folder / name,
        settings=settings | METHODS[name],
    )


def stored(run: Path) -> list[Path]:
    """Files of a run that go into the archive."""
    files = [run / "config.yaml", *sorted((run / "adapter").iterdir())]
    if run.name == COMPLETE:
        files += [run / name for name in ("results.json", "metrics.csv", "environment.json", "predictions.npz")]
    return files


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_DEFLATED) as archive:
        folder = Path(scratch)
        for name, count in (("train", 8), ("valid", 2)):
            write(folder / f"{name}.xyz", [label(atoms) for atoms in structures(count, len(name))], format="extxyz")
        systems = structures(5, 11)
        results: dict[str, np.ndarray] = {}
        for index, atoms in enumerate(systems):
            results |= {f"{index}/numbers": atoms.numbers, f"{index}/positions": atoms.positions}
            results |= {f"{index}/cell": atoms.cell.array, f"{index}/pbc": atoms.pbc}
            results[f"{index}/moments"] = atoms.get_initial_magnetic_moments()
        results |= predictions(forcetune.calculator("mini", dtype="float64"), systems, "base")
        for name in METHODS:
            fit(folder, name)
            results |= predictions(forcetune.calculator(folder / name), systems, name)
        np.savez(folder / "expected.npz", **results)
        for file in (folder / "expected.npz", *(file for name in METHODS for file in stored(folder / name))):
            archive.write(file, file.relative_to(folder))


if __name__ == "__main__":
    main()
