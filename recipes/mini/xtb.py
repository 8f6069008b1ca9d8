"""GFN2-xTB energies and forces by tblite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase.units import Bohr, Hartree
from tblite.exceptions import TBLiteRuntimeError
from tblite.interface import Calculator, Result

from recipes.mini.sample import FloatArray, IntArray, Sample, rounded

METHOD = "GFN2-xTB"
ACCURACY = 0.1
"""tblite's factor on its thresholds: ten times tighter than its default, forces to about 1e-5 eV/Å."""

UNPAIRED = {1: 1, 6: 2, 7: 3, 8: 2, 9: 1, 16: 2, 17: 1}
"""Unpaired electrons of the free atoms by Hund's first rule."""


class SurfaceError(Exception):
    """The self-consistent field did not converge, or its result is not finite."""


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Energy in eV and forces (atoms, 3) in eV/Å."""

    energy: float
    forces: FloatArray


class Surface:
    """The potential energy surface of one set of neutral atoms.

    Args:
        numbers: (atoms,) atomic numbers.
        unpaired: number of unpaired electrons; as few as possible when not given.
    """

    def __init__(self, numbers: IntArray, unpaired: int | None = None) -> None:
        self.numbers = numbers
        self._unpaired = int(numbers.sum()) % 2 if unpaired is None else unpaired
        self._calculator: Calculator | None = None
        self._last: Result | None = None

    def __call__(self, positions: FloatArray, *, follow: bool = False) -> Labels:
        """Labels at ``positions`` (atoms, 3), Å.

        Args:
            positions: the structure.
            follow: start from the density of the last call: faster along a trajectory, but the last digits then
                depend on the way there, so that labels are computed without it.

        Raises:
            SurfaceError: no self-consistent solution was found.
        """
        if self._calculator is None:
            self._calculator = Calculator(METHOD, self.numbers, positions / Bohr, 0.0, self._unpaired)
            self._calculator.set("verbosity", 0)
            self._calculator.set("accuracy", ACCURACY)
        else:
            self._calculator.update(positions / Bohr)
        try:
            self._last = self._calculator.singlepoint(self._last if follow else None)
        except TBLiteRuntimeError as error:
            self._last = None
            raise SurfaceError(str(error)) from error
        energy = float(self._last.get("energy")) * Hartree
        forces = -np.asarray(self._last.get("gradient"), dtype=np.float64) * (Hartree / Bohr)
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            self._last = None
            raise SurfaceError("the energy or the forces are not finite")
        return Labels(energy, forces)


def label(surface: Surface, positions: FloatArray, kind: str, molecule: str) -> Sample:
    """A sample at ``positions``, rounded to the digits of a file first.

    Raises:
        SurfaceError: no self-consistent solution was found.
    """
    place = rounded(positions)
    labels = surface(place)
    return Sample(surface.numbers, place, labels.energy, labels.forces, kind, molecule)
