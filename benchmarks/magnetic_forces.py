"""Whether the magnetic forces of DeePMD-kit's NiO are derivatives of its energies.

    python benchmarks/magnetic_forces.py --data DATA

DATA is the folder with ``magnetic/NiO_spin_train.xyz``. Of every pair of frames whose atoms are at the same places
within 0.01 Å the difference of energies, less the work of the forces, is compared with the work −½ Σ m θ (F₁·t₁ +
F₂·t₂) of magnetic forces along the arcs θ between their moments, t being the tangents and m their length, which is
nearly the same everywhere. The moments of the second frame are turned first, all together, to lie as near to those of
the first as they can, which costs nothing but anisotropy. Printed is the slope of differences over work, by the largest
arc.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read

FACTOR = 1.27
"""What the published magnetic forces are multiplied by to become −∂E/∂m."""
ARCS = (10, 15, 20, 30, 60)
SAME_PLACES = 0.01


def turned(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The rotation that brings ``other`` nearest to ``one``, (3, 3), to be multiplied from the right."""
    left, _, right = np.linalg.svd(other.T @ one)
    return left @ np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))]) @ right


def pairs(frames: list[Atoms]) -> Iterator[tuple[float, float, float]]:
    """Largest arc, degrees, energy difference and work of the published magnetic forces, eV, of every pair."""
    for index, one in enumerate(frames):
        spinning = np.linalg.norm(one.arrays["REF_magmoms"], axis=1) > 0.05
        for other in frames[index + 1 :]:
            inside = one.cell.scaled_positions(other.positions - one.positions)
            moved = (inside - np.round(inside)) @ one.cell.array
            if np.abs(moved).max() > SAME_PLACES:
                continue
            energy = other.info["REF_energy"] - one.info["REF_energy"]
            energy += 0.5 * ((one.arrays["REF_forces"] + other.arrays["REF_forces"]) * moved).sum()
            first, second = (atoms.arrays["REF_magmoms"][spinning] for atoms in (one, other))
            rotation = turned(first, second)
            yield (
                *_work(
                    first,
                    second @ rotation,
                    one.arrays["REF_magforces"][spinning],
                    other.arrays["REF_magforces"][spinning] @ rotation,
                )[::-1],
                energy,
            )


def _work(first: np.ndarray, second: np.ndarray, force: np.ndarray, other_force: np.ndarray) -> tuple[float, float]:
    """Of magnetic forces along the arcs, and the largest of these, degrees."""
    length = np.linalg.norm(first, axis=1)
    one, two = first / length[:, None], second / np.linalg.norm(second, axis=1, keepdims=True)
    cosine = np.clip((one * two).sum(axis=1), -1, 1)
    arc = np.arccos(cosine)
    sine = np.maximum(np.sin(arc), 1e-12)[:, None]
    start, end = (two - cosine[:, None] * one) / sine, (cosine[:, None] * two - one) / sine
    slope = (force * start).sum(axis=1) + (other_force * end).sum(axis=1)
    return float(-0.5 * (length * arc * slope).sum()), float(np.degrees(arc.max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    frames = read(parser.parse_args().data / "magnetic" / "NiO_spin_train.xyz", ":")
    assert isinstance(frames, list)
    lengths = np.concatenate([np.linalg.norm(atoms.arrays["REF_magmoms"], axis=1) for atoms in frames])
    print(f"lengths of moments: {lengths[lengths > 0.05].min():.4f} to {lengths.max():.4f} μB")
    arc, work, energy = np.array(list(pairs(frames))).T
    print("largest arc, degrees | pairs | slope | R²")
    for limit in ARCS:
        chosen = arc < limit
        x, y = work[chosen], energy[chosen]
        slope = (x @ y) / (x @ x)
        print(f"{limit} | {chosen.sum()} | {slope:.3f} | {1 - ((y - slope * x) ** 2).sum() / (y**2).sum():.4f}")


if __name__ == "__main__":
    main()
