"""One frame: a structure and the labels a quantum-chemistry code gave it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


SMALLEST_VOLUME = 1e-6
"""Å³; a cell below it is none."""


def compute_volume(cell: FloatArray) -> float:
    """Å³, of (3, 3) lattice vectors in rows."""
    return abs(float(np.linalg.det(cell)))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a frame was read: file and zero-based position in it. ``str()`` is what errors print."""

    file: str
    index: int

    def __str__(self) -> str:
        return f"{self.file}, frame {self.index}"


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """A structure with its labels, in eV and Å.

    Attributes:
        numbers: (atoms,) atomic numbers.
        positions: (atoms, 3), Å.
        cell: (3, 3), rows are lattice vectors, Å; zeros for a molecule without a cell.
        pbc: (3,) periodic directions.
        energy: total energy, eV, or None where the frame has no such label.
        forces: (atoms, 3), eV/Å, or None.
        stress: (3, 3), eV/Å³, ASE's sign (positive under tension), or None.
        origin: file and position, for error messages.
        moments: (atoms, 3), magnetic moments, μB (a number per atom in the file stands for its z component), or None.
        spins: (atoms, 3), the magnetic state that the labels belong to, as a spin-aware layer takes it, or None.
        magforces: (atoms, 3), magnetic forces −∂E/∂s, eV per unit of the state s (μB, or a radian where it is a
            direction, then NaN where it has none), or None.
        hessian: (3 atoms, 3 atoms), ∂²E/∂x∂x′ in the order x, y, z of atom 0, 1, …, symmetric, eV/Å², or None; frames
            on disk have none.
        energy_weight, forces_weight, stress_weight, moments_weight, hessian_weight: how much each label counts in the
            loss, positive; from the file (:mod:`forcetune.frames.weights`). Magnetic forces count as moments.
        charge, multiplicity: total charge and spin as the file names them, or None; no model here knows them.
    """

    numbers: IntArray
    positions: FloatArray
    cell: FloatArray
    pbc: npt.NDArray[np.bool_]
    energy: float | None
    forces: FloatArray | None
    stress: FloatArray | None
    origin: Origin
    moments: FloatArray | None = None
    spins: FloatArray | None = None
    magforces: FloatArray | None = None
    hessian: FloatArray | None = None
    energy_weight: float = 1.0
    forces_weight: float = 1.0
    stress_weight: float = 1.0
    moments_weight: float = 1.0
    hessian_weight: float = 1.0
    charge: float | None = None
    multiplicity: float | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def has_volume(self) -> bool:
        """Whether the cell has one; a stress is a share of it."""
        return compute_volume(self.cell) >= SMALLEST_VOLUME


class LabelKeys(NamedTuple):
    """The keys under which labels were found; None where there is no such label, or where it was not asked for.

    A key of ``calculator`` means the results of an attached ASE calculator.
    """

    energy: str | None
    forces: str | None
    stress: str | None
    moments: str | None = None
    spins: str | None = None
    hessian: str | None = None
    magforces: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FrameSet:
    """Frames read together, the label keys they were read with, and the hash of the files."""

    frames: Sequence[Frame]
    keys: LabelKeys
    files: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(sorted({int(z) for frame in self.frames for z in frame.numbers}))
