"""Every pair of elements pushed together: a potential without holes is repulsive at all short distances."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from ase.data import chemical_symbols, covalent_radii

from forcetune.backbones.protocol import Backbone
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.frames.frame import Frame, Origin

SHORTEST = 0.3
"""Å."""
REACH = 50.0
"""eV above the free atoms; no dynamics brings two atoms to where their energy is higher."""


@dataclass(frozen=True, slots=True)
class PairScan:
    """Two atoms and nothing else.

    Attributes:
        symbols: their elements.
        distances: Å, ascending.
        energies: against the free atoms, eV.
        pull: the force that draws them together, eV/Å; negative is repulsion.
        wall: Å; nearer than this the pair must repel: 0.75 of the sum of the covalent radii.
    """

    symbols: tuple[str, str]
    distances: tuple[float, ...]
    energies: tuple[float, ...]
    pull: tuple[float, ...]
    wall: float

    @property
    def hole(self) -> float | None:
        """The largest distance at which the pair attracts, Å, from the wall to where the energy exceeds the reach."""
        for distance, energy, pull in zip(*map(reversed, (self.distances, self.energies, self.pull)), strict=True):
            if distance <= self.wall:
                if energy > REACH:
                    return None
                if pull >= 0:
                    return distance
        return None

    @property
    def dip(self) -> float | None:
        """The largest distance at which the pair attracts behind a wall higher than the reach, Å."""
        found = [d for d, pull in zip(self.distances, self.pull, strict=True) if d <= self.wall and pull >= 0]
        return max(found, default=None) if self.hole is None else None


def pair_scans(backbone: Backbone, *, shortest: float = SHORTEST, step: float = 0.02) -> list[PairScan]:
    """Scan every pair of the model's elements from ``shortest`` (Å) to its cutoff in steps of ``step`` (Å)."""
    distances = np.arange(shortest, backbone.cutoff, step)
    scans: list[PairScan] = []
    for first, second in combinations_with_replacement(backbone.elements, 2):
        frames = [
            Frame(
                numbers=np.array([first, second]),
                positions=np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance]]),
                cell=np.zeros((3, 3)),
                pbc=np.zeros(3, dtype=bool),
                energy=None,
                forces=None,
                stress=None,
                origin=Origin("scan", index),
            )
            for index, distance in enumerate(distances)
        ]
        found = predict(backbone, build_graphs(backbone, frames))
        free = backbone.reference_energies[first] + backbone.reference_energies[second]
        scans.append(
            PairScan(
                (chemical_symbols[first], chemical_symbols[second]),
                tuple(float(distance) for distance in distances),
                tuple(float(energy - free) for energy in found.energy),
                tuple(float(pull) for pull in found.forces.reshape(-1, 2, 3)[:, 0, 2]),
                0.75 * float(covalent_radii[first] + covalent_radii[second]),
            )
        )
    return scans
