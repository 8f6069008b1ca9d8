"""How far the surroundings of atoms are from those of a set of frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial import KDTree

from forcetune.diagnostics.shape import CENTRES, REACH, WIDTH, distances
from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame, IntArray

MOST_ENVIRONMENTS = 20_000
"""Of each element; of more a random part is compared with."""

USUAL = 0.99
"""Of the atoms in the set, so many are nearer than 1 to an atom of another frame of it."""


class Environments:
    """Surroundings of the atoms in a set of frames, to compare others with.

    The surroundings of an atom are, for every element of its neighbors, the smeared histogram of their distances,
    Σ exp(−(d − c)²/2w²) (1 − d²/R²)² over centres c, as in the doctor's descriptor of whole frames. The distance to
    the nearest surroundings in the set is given in units of what is usual within the set: 1 is the 0.99 quantile of
    the distances between atoms of different frames.

    Attributes:
        elements: atomic numbers in the set.
    """

    def __init__(self, frames: Sequence[Frame], seed: int = 0) -> None:
        """
        Args:
            frames: at least two.
            seed: of the choice among very many atoms.

        Raises:
            InputError: fewer than two frames.
        """
        if len(frames) < 2:
            raise InputError(f"{len(frames)} frames are too few to tell what is usual among them; give at least two.")
        rng = np.random.default_rng(seed)
        self.elements = tuple(sorted({int(z) for frame in frames for z in frame.numbers}))
        self._trees: dict[int, KDTree] = {}
        self._units: dict[int, float] = {}
        described = [self._describe(frame) for frame in frames]
        for element in self.elements:
            rows = [values[frame.numbers == element] for values, frame in zip(described, frames, strict=True)]
            owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
            values = np.concatenate(rows)
            if len(values) > MOST_ENVIRONMENTS:
                chosen = rng.choice(len(values), MOST_ENVIRONMENTS, replace=False)
                values, owner = values[chosen], owner[chosen]
            self._trees[element] = KDTree(values)
            self._units[element] = _usual_distance(values, owner)

    def novelty(self, frame: Frame) -> FloatArray:
        """(atoms,) distance of each atom's surroundings to the nearest in the set, 1 being usual there; infinite where
        the atom, or one of its neighbors, is of an element that the set does not have.
        """
        values = np.full(len(frame), np.inf)
        described = self._describe(frame)
        for element in np.unique(frame.numbers):
            mine = frame.numbers == element
            tree = self._trees.get(int(element))
            if tree is not None:
                values[mine] = tree.query(described[mine])[0] / self._units[int(element)]
        return np.where(self._beside_strangers(frame), np.inf, values)

    def _beside_strangers(self, frame: Frame) -> np.ndarray:
        strange = ~np.isin(frame.numbers, self.elements)
        if not strange.any():
            return strange
        first, second, _, _ = distances(frame)
        beside = strange.copy()
        beside[first[strange[second]]] = True
        return beside

    def _describe(self, frame: Frame) -> FloatArray:
        """(atoms, elements × centres)."""
        first, second, apart, _ = distances(frame)
        column = np.searchsorted(self.elements, frame.numbers[second])
        known = np.isin(frame.numbers[second], self.elements)
        first, column, apart = first[known], column[known], apart[known]
        weights = (1 - (apart / REACH) ** 2) ** 2
        smeared = weights[:, None] * np.exp(-0.5 * ((apart[:, None] - CENTRES) / WIDTH) ** 2)
        values = np.zeros((len(frame) * len(self.elements), len(CENTRES)))
        np.add.at(values, first * len(self.elements) + column, smeared)
        return values.reshape(len(frame), -1)


def _usual_distance(values: FloatArray, owner: IntArray) -> float:
    """The quantile :data:`USUAL` of the distances to the nearest row of another owner; not less than rounding."""
    smallest = 1e-6 * max(1.0, float(np.abs(values).max(initial=0.0)))
    if len(np.unique(owner)) < 2:
        # one frame has this element: nothing tells what is usual but the atoms' distances to each other
        owner = np.arange(len(owner))
    if len(values) < 2:
        return max(smallest, WIDTH)
    nearest = np.full(len(values), np.inf)
    neighbors, tree = 8, KDTree(values)
    left = np.arange(len(values))
    while len(left):
        count = min(neighbors, len(values))
        apart, index = tree.query(values[left], k=count)
        others = np.where(owner[index] != owner[left][:, None], apart, np.inf).min(axis=1)
        nearest[left] = others
        left = left[np.isinf(others)] if count < len(values) else left[:0]
        neighbors *= 8
    return max(smallest, float(np.quantile(nearest[np.isfinite(nearest)], USUAL)))
