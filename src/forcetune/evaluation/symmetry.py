"""How far predictions are from being those of a rotated structure, rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from forcetune.backbones.protocol import Backbone
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.evaluation.summaries import RotationError
from forcetune.frames.frame import FloatArray, Frame


def rotation_error(backbone: Backbone, frames: Sequence[Frame], *, most: int = 5, seed: int = 0) -> RotationError:
    """Rotate (and in half of the cases reflect) structures at random and compare.

    Args:
        backbone: the model.
        frames: structures; labels are not used.
        most: so many of them, evenly spread.
        seed: of the rotations.
    """
    generator = np.random.default_rng(seed)
    chosen = [frames[int(i)] for i in np.linspace(0, len(frames) - 1, min(most, len(frames)))]
    rotations = [np.linalg.qr(generator.standard_normal((3, 3)))[0] for _ in chosen]
    turned = [_turned(frame, rotation) for frame, rotation in zip(chosen, rotations, strict=True)]
    one = predict(backbone, build_graphs(backbone, [replace(frame, stress=None) for frame in chosen]))
    other = predict(backbone, build_graphs(backbone, turned))
    ends = np.cumsum(one.atoms)
    forces = [
        np.abs(other.forces[end - size : end] @ rotation - one.forces[end - size : end]).max()
        for end, size, rotation in zip(ends, one.atoms, rotations, strict=True)
    ]
    energies = np.abs(other.energy - one.energy) / one.atoms
    return RotationError(1000 * float(energies.max()), 1000 * float(max(forces)))


def _turned(frame: Frame, rotation: FloatArray) -> Frame:
    """Rotated or reflected; spins are axial: a reflection leaves out their sign."""
    spins = None if frame.spins is None else np.linalg.det(rotation) * frame.spins @ rotation.T
    return replace(
        frame, positions=frame.positions @ rotation.T, cell=frame.cell @ rotation.T, stress=None, spins=spins
    )
