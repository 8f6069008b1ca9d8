"""Structures away from the minimum: displaced, stretched, compressed, in contact."""

from __future__ import annotations

import numpy as np
from ase.data import covalent_radii, vdw_radii
from scipy.optimize import minimize

from recipes.mini.conformers import Molecule
from recipes.mini.sample import FloatArray, IntArray
from recipes.mini.xtb import Labels, Surface

CONTACTS = (0.5, 0.6, 0.7, 0.8, 0.95, 1.15, 1.4)
"""Closest contact of two molecules, in sums of van der Waals radii."""


def relaxed(surface: Surface, positions: FloatArray, steps: int = 30) -> FloatArray:
    """Positions after at most so many steps downhill; close to a minimum, which is all that is asked.

    Raises:
        SurfaceError: no self-consistent solution was found on the way.
    """

    def value(flat: FloatArray) -> tuple[float, FloatArray]:
        labels: Labels = surface(flat.reshape(-1, 3), follow=True)
        return labels.energy, -labels.forces.ravel()

    found = minimize(value, positions.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": steps, "gtol": 0.01})
    return np.asarray(found.x, dtype=np.float64).reshape(-1, 3)


def displaced(positions: FloatArray, width: float, generator: np.random.Generator) -> FloatArray:
    """Every coordinate moved by normal noise of ``width`` Å."""
    return positions + width * generator.standard_normal(positions.shape)


def _far_side(molecule: Molecule, bond: int) -> list[int]:
    """Atoms that hang on the second atom of a bond; that atom alone when the bond is in a ring."""
    near, far = (int(atom) for atom in molecule.bonds[bond])
    neighbours: dict[int, set[int]] = {atom: set() for atom in range(len(molecule.numbers))}
    for index, (first, second) in enumerate(molecule.bonds.tolist()):
        if index != bond:
            neighbours[first].add(second)
            neighbours[second].add(first)
    side, fresh = {far}, [far]
    while fresh:
        for atom in neighbours[fresh.pop()] - side:
            side.add(atom)
            fresh.append(atom)
    return [far] if near in side else sorted(side)


def stretched(molecule: Molecule, positions: FloatArray, generator: np.random.Generator) -> FloatArray:
    """One bond at 0.75 to 1.7 times its length, the rest of the molecule moved along with it."""
    bond = int(generator.integers(len(molecule.bonds)))
    near, far = molecule.bonds[bond]
    factor = generator.uniform(0.75, 1.7)
    moved = positions.copy()
    moved[_far_side(molecule, bond)] += (factor - 1.0) * (positions[far] - positions[near])
    return moved


def compressed(molecule: Molecule, positions: FloatArray, generator: np.random.Generator) -> FloatArray:
    """The whole molecule shrunk, or two atoms that are not bonded brought close to each other.

    Distances of such a pair go down to about the sum of covalent radii times 0.7.
    """
    atoms = len(molecule.numbers)
    free = np.triu(np.ones((atoms, atoms), dtype=bool), 1)
    first, second = molecule.bonds.T
    free[np.minimum(first, second), np.maximum(first, second)] = False
    pairs = np.argwhere(free)
    if len(pairs) == 0 or generator.random() < 0.5:
        return positions * generator.uniform(0.78, 0.96)
    one, other = pairs[int(generator.integers(len(pairs)))]
    gap = positions[other] - positions[one]
    length = float(np.linalg.norm(gap))
    radii = covalent_radii[molecule.numbers]
    wanted = min(length, float(generator.uniform(0.7, 1.6) * (radii[one] + radii[other])))
    moved = positions.copy()
    shift = 0.5 * (1.0 - wanted / length) * gap
    moved[one] += shift
    moved[other] -= shift
    return moved


def _turned(positions: FloatArray, generator: np.random.Generator) -> FloatArray:
    """Positions about their mean in a random orientation."""
    q, r = np.linalg.qr(generator.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    return (positions - positions.mean(axis=0)) @ (q * np.linalg.det(q))


def in_contact(
    numbers: tuple[IntArray, IntArray],
    positions: tuple[FloatArray, FloatArray],
    contact: float,
    generator: np.random.Generator,
) -> FloatArray:
    """Two molecules in random orientations whose closest contact is ``contact`` sums of van der Waals radii."""
    first, second = (_turned(part, generator) for part in positions)
    direction = generator.standard_normal(3)
    direction /= np.linalg.norm(direction)
    reach = vdw_radii[numbers[0]][:, None] + vdw_radii[numbers[1]][None, :]
    low, high = 0.0, 30.0
    # the closest contact grows with the shift beyond the last overlap: halve from a shift that is far enough
    for _ in range(50):
        middle = 0.5 * (low + high)
        distances = np.linalg.norm(first[:, None] - (second + middle * direction)[None, :], axis=-1)
        if (distances / reach).min() < contact:
            low = middle
        else:
            high = middle
    return np.concatenate([first, second + high * direction])
