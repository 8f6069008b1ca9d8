"""Frames whose labels are the embedded model's own, so that it has no errors on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

import forcetune
from forcetune.backbones.protocol import Backbone
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.frames.frame import FloatArray
from systems import frames_of

CELL = np.array([[6.5, 0.0, 0.1], [1.2, 6.2, 0.0], [-0.6, 1.0, 6.7]])
"""Å; skewed, so that all components of the stress differ."""


def shaken(count: int, *, periodic: bool) -> list[Atoms]:
    """Molecules of the package's data, in boxes where they touch their images if wanted."""
    actual = ase.io.read(forcetune.demo_file("train"), f":{count}")
    assert isinstance(actual, list)
    structures = [Atoms(atoms.numbers, atoms.positions) for atoms in actual]
    rng = np.random.default_rng(11)
    for atoms in structures if periodic else ():
        strain = np.eye(3) + 0.02 * rng.standard_normal((3, 3))
        atoms.set_cell(CELL @ (strain + strain.T) / 2)
        atoms.pbc = True
    return structures


def own_labels(model: Backbone, structures: Sequence[Atoms]) -> tuple[Predictions, list[FloatArray]]:
    """What a model predicts, stress included, and the forces of each structure."""
    predictions = predict(model, build_graphs(model, frames_of(*structures)), stress=True)
    return predictions, np.split(predictions.forces, np.cumsum(predictions.atoms)[:-1])


def labelled_by(model: Backbone, count: int, *, periodic: bool = False) -> list[Atoms]:
    """Frames with ``REF_energy``, ``REF_forces`` and, if periodic, ``REF_stress`` as the model predicts them."""
    structures = shaken(count, periodic=periodic)
    energies, forces = own_labels(model, structures)
    assert energies.stress is not None
    for atoms, energy, own, stress in zip(structures, energies.energy, forces, energies.stress, strict=True):
        atoms.info["REF_energy"] = float(energy)
        atoms.arrays["REF_forces"] = own
        if periodic:
            atoms.info["REF_stress"] = stress.ravel()
    return structures


def write(path: Path, frames: Sequence[Atoms]) -> Path:
    """As extended XYZ."""
    ase.io.write(path, list(frames), format="extxyz")
    return path
