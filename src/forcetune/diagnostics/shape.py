"""The geometry of a frame in the numbers that examinations ask for, from one list of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii

from forcetune.frames.frame import FloatArray, Frame, IntArray
from forcetune.frames.neighbor_list import neighbours

REACH = 5.0
"""Å; neighbours are looked for so far away."""
SMALLEST_VOLUME = 0.5
"""Å³ an atom; a cell below it cannot be searched for neighbours in any sensible time, and is nonsense."""
LARGEST_EXTENT = 1000.0
"""Å; atoms further apart than this in a direction without periodicity are no structure."""
BOND = 1.3
"""Atoms nearer than so many sums of covalent radii are bonded."""
CENTRES = np.linspace(0.8, 4.8, 11)
WIDTH = 0.4


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Distances of a frame.

    Attributes:
        nearest: (atoms,) distance to the nearest atom, Å; infinite beyond :data:`REACH`.
        tightness: (atoms,) the smallest distance over the sum of covalent radii, about 1 for a bond.
        descriptor: smeared histogram of distances for every pair of elements; equal for structures that differ by
            rotation, translation, reflection or the order of atoms, and nearly equal for nearly equal ones.
        n_edges: ordered pairs within :data:`REACH`.
        is_molecule: nothing bonds or touches across a cell boundary, so that the frame is a molecule in vacuum.
    """

    nearest: FloatArray
    tightness: FloatArray
    descriptor: FloatArray
    n_edges: int
    is_molecule: bool


def can_be_measured(frame: Frame) -> bool:
    """Whether neighbours can be searched: a cell with volume where periodic, and no absurd extent elsewhere."""
    if cell_problem(frame) is not None:
        return False
    return not _is_scattered(frame)


def cell_problem(frame: Frame) -> str | None:
    """``missing``, ``singular`` or ``tiny`` for a periodic frame whose cell cannot be right, otherwise None."""
    vectors = frame.cell[frame.pbc]
    if not len(vectors):
        return None
    if (np.abs(vectors).max(axis=1) < 1e-8).any():
        return "missing"
    unit = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    # the smallest singular value of unit vectors is about the smallest angle between one and the others
    if np.linalg.svd(unit, compute_uv=False).min() < 1e-3:
        return "singular"
    volume = abs(float(np.linalg.det(frame.cell))) if frame.pbc.all() else np.inf
    tiny = volume / len(frame) < SMALLEST_VOLUME or np.linalg.norm(vectors, axis=1).min() < 0.3
    return "tiny" if tiny else None


def _is_scattered(frame: Frame) -> bool:
    if frame.pbc.all():
        return False
    return bool(np.ptp(frame.positions, axis=0).max() > LARGEST_EXTENT)


def distances(frame: Frame) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
    """Ordered pairs within :data:`REACH`: sender, receiver, distance in Å, and the receiver's periodic image."""
    (i, j), shifts = neighbours(frame.positions, frame.cell, frame.pbc, REACH)
    apart = frame.positions[j] - frame.positions[i] + shifts @ frame.cell
    return i, j, np.linalg.norm(apart, axis=1), shifts


def measure_shape(frame: Frame) -> Shape:
    """Measure a frame for which :func:`can_be_measured` holds."""
    i, j, apart, shifts = distances(frame)
    radii = covalent_radii[frame.numbers]
    nearest = np.full(len(frame), np.inf)
    np.minimum.at(nearest, i, apart)
    tightness = np.full(len(frame), np.inf)
    np.minimum.at(tightness, i, apart / (radii[i] + radii[j]))
    return Shape(
        nearest,
        tightness,
        _descriptor(frame.numbers[i], frame.numbers[j], apart, len(frame)),
        len(i),
        not bool(shifts.any()),
    )


def _descriptor(first: IntArray, second: IntArray, apart: FloatArray, atoms: int) -> FloatArray:
    """Per pair of elements Σ exp(−(d − c)² / 2w²) (1 − d²/R²)² / √atoms over centres c, one after another."""
    half = first <= second
    pairs = np.stack((first[half], second[half]), axis=1)
    apart = apart[half]
    weights = (1 - (apart / REACH) ** 2) ** 2 / np.sqrt(atoms)
    smeared = weights[:, None] * np.exp(-0.5 * ((apart[:, None] - CENTRES) / WIDTH) ** 2)
    kinds, index = np.unique(pairs, axis=0, return_inverse=True)
    descriptor = np.zeros((len(kinds), len(CENTRES)))
    np.add.at(descriptor, index.reshape(-1), smeared)
    return np.concatenate((kinds.sum(axis=1, keepdims=True) * 10.0, descriptor), axis=1).ravel()


def sorted_distances(frame: Frame) -> dict[tuple[int, int], FloatArray]:
    """Distances within :data:`REACH` of every pair of elements, ascending, to compare two frames exactly."""
    i, j, apart, _ = distances(frame)
    first, second = frame.numbers[i], frame.numbers[j]
    return {
        (int(a), int(b)): np.sort(apart[(first == a) & (second == b)])
        for a, b in np.unique(np.stack((first, second), axis=1), axis=0)
        if a <= b
    }


def hash_bonding(frame: Frame) -> int:
    """A number that two frames share where every element has the same bonded neighbours in both, as conformers have."""
    i, j, apart, _ = distances(frame)
    radii = covalent_radii[frame.numbers]
    bonded = apart < BOND * (radii[i] + radii[j])
    neighbours_of: list[list[int]] = [[] for _ in range(len(frame))]
    for a, b in zip(i[bonded], j[bonded], strict=True):
        neighbours_of[a].append(int(frame.numbers[b]))
    return hash(
        tuple(sorted((int(z), *sorted(neighbours)) for z, neighbours in zip(frame.numbers, neighbours_of, strict=True)))
    )


def count_elements(frame: Frame) -> tuple[tuple[int, int], ...]:
    """Atomic numbers and how many atoms each has."""
    numbers, counts = np.unique(frame.numbers, return_counts=True)
    return tuple(zip(numbers.tolist(), counts.tolist(), strict=True))


def is_dense(frame: Frame) -> bool:
    """Whether atoms fill the cell of a frame, as in a crystal or a liquid."""
    volume = abs(float(np.linalg.det(frame.cell)))
    if volume < 1e-6:
        return False
    inside = np.ptp(frame.positions @ np.linalg.inv(frame.cell), axis=0)
    # a molecule in a large box is far from filling it in some direction
    return bool(volume / len(frame) < 30.0 and (inside > 0.5).all() and (inside < 1.05).all())


def by_composition(frames: Sequence[Frame]) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """Indices of the frames of each composition."""
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for index, frame in enumerate(frames):
        groups.setdefault(count_elements(frame), []).append(index)
    return groups
