"""Units that labels may stand in, recognised by how large they are against what a model predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ase.units import Bohr, Hartree, Rydberg, kcal, kJ, mol

KCAL, KJ = kcal / mol, kJ / mol


class Unit(NamedTuple):
    """A unit, and how many of it are one of ours (eV, eV/Å, eV/Å³)."""

    name: str
    size: float


ENERGY = (
    Unit("Hartree", 1 / Hartree),
    Unit("Rydberg", 1 / Rydberg),
    Unit("kcal/mol", 1 / KCAL),
    Unit("kJ/mol", 1 / KJ),
    Unit("meV", 1e3),
    Unit("cm⁻¹", 8065.544),
)
FORCES = (
    Unit("Hartree/Bohr", Bohr / Hartree),
    Unit("Hartree/Å", 1 / Hartree),
    Unit("Rydberg/Bohr", Bohr / Rydberg),
    Unit("eV/Bohr", Bohr),
    Unit("kcal/mol/Å", 1 / KCAL),
    Unit("kcal/mol/Bohr", Bohr / KCAL),
    Unit("kJ/mol/Å", 1 / KJ),
    Unit("kJ/mol/nm", 10 / KJ),
    Unit("meV/Å", 1e3),
)
STRESS = (
    Unit("GPa", 160.2177),
    Unit("kBar", 1602.177),
    Unit("bar", 1.602177e6),
    Unit("Hartree/Bohr³", Bohr**3 / Hartree),
    Unit("meV/Å³", 1e3),
)

USUAL = 3.5
"""A label may be so many times larger or smaller than what a model predicts without being in another unit."""


def is_usual(ratio: float) -> bool:
    """Whether labels are about as large as predictions."""
    return 1 / USUAL < ratio < USUAL


def candidates(ratio: float, units: Sequence[Unit], tolerance: float) -> list[Unit]:
    """The units that a ratio of labels to predictions speaks for, the likeliest first.

    Args:
        ratio: size of the labels over size of the predictions, positive.
        units: to choose from.
        tolerance: factor by which the ratio may be off.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        return []
    off = sorted((abs(math.log(ratio / unit.size)), unit) for unit in units)
    return [unit for distance, unit in off if distance < math.log(tolerance)]


def named(units: Sequence[Unit]) -> str:
    """Two units at most, in words."""
    return " or ".join(unit.name for unit in units[:2])


def two(value: float) -> str:
    """A correlation with two decimals."""
    return f"{value:.2f}".replace("-", "−")


def times(ratio: float) -> str:
    """How many times labels are as large as predictions, in words."""
    return f"{ratio:.3g} times" if ratio >= 1 else f"1/{1 / ratio:.3g} of"
