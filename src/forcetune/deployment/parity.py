"""Whether what was written predicts what it was made from: structures to compare on, and differences that count."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from forcetune.evaluation.metrics import Predictions
from forcetune.frames.frame import FloatArray, Frame, Origin

PARITY = {"float64": 1e-10, "float32": 1e-4}
"""Largest relative differences that rounding explains, by precision."""


def relative_differences(
    before: Predictions,
    after: Predictions,
    references: Mapping[int, float],
    written: Mapping[int, float],
    *,
    precision: str = "float64",
) -> tuple[float, float]:
    """The largest relative differences of interaction energies, and of forces and stress.

    Energies are compared without reference energies: those of all electrons of a heavy atom are 10⁵ eV, of which the
    parameters of a float32 model keep no more than some meV, which says nothing about the merged weights.

    Args:
        before, after: of the same structures.
        references, written: energies of isolated atoms of both, eV.
        precision: of the total energies of ``after``.
    """
    one, other = _interaction(before, references), _interaction(after, written)
    # total energies are rounded numbers, too
    rounding = 4 * float(np.finfo(precision).eps) * np.abs(before.energy).max()
    energy = max(np.abs(other - one).max() - rounding, 0.0) / max(np.abs(one).max(), 1e-12)
    pairs = [(before.forces, after.forces)]
    if before.stress is not None and after.stress is not None:
        pairs.append((before.stress, after.stress))
    forces = max(np.abs(new - old).max() / max(np.abs(old).max(), 1e-12) for old, new in pairs)
    return float(energy), float(forces)


def _interaction(predictions: Predictions, references: Mapping[int, float]) -> FloatArray:
    """(frames,) energies, eV, without those of the isolated atoms."""
    ends = np.cumsum(predictions.atoms)
    offsets = [math.fsum(references[int(z)] for z in part) for part in np.split(predictions.numbers, ends[:-1])]
    return predictions.energy - np.array(offsets)


def probe_frames(elements: tuple[int, ...], cutoff: float, seed: int = 0) -> list[Frame]:
    """Random structures that together hold every element: clusters, crystals, and an isolated atom."""
    rng = np.random.default_rng(seed)
    frames = []
    chosen = rng.permutation(np.repeat(elements, 3))
    for index, numbers in enumerate(np.array_split(chosen, max(2, len(chosen) // 12))):
        box = max(cutoff, 2.2 * len(numbers) ** (1 / 3))
        positions = _apart(rng, len(numbers), box)
        periodic = index % 2 == 1
        cell = box * (np.eye(3) + 0.1 * rng.standard_normal((3, 3))) if periodic else np.zeros((3, 3))
        frames.append(_frame(numbers, positions @ (cell / box) if periodic else positions, cell, periodic))
    frames.append(_frame(chosen[:1], np.zeros((1, 3)), np.zeros((3, 3)), periodic=False))
    return frames


def _apart(rng: np.random.Generator, count: int, box: float, nearest: float = 1.0) -> np.ndarray:
    """(count, 3) positions in a cube, no two nearer than ``nearest`` Å, images in a periodic cube included."""
    positions: list[np.ndarray] = []
    while len(positions) < count:
        trial = rng.uniform(0, box, 3)
        vectors = np.array(positions).reshape(-1, 3) - trial
        vectors -= box * np.round(vectors / box)
        if not positions or np.linalg.norm(vectors, axis=1).min() > nearest:
            positions.append(trial)
    return np.array(positions)


def _frame(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, periodic: bool) -> Frame:
    return Frame(
        numbers=np.asarray(numbers, dtype=np.int64),
        positions=positions,
        cell=cell,
        pbc=np.full(3, periodic),
        energy=None,
        forces=None,
        stress=None,
        origin=Origin("<probe>", 0),
    )
