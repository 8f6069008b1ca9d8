"""A labelled structure and how it is written: extended XYZ with a fixed number of digits, compressed or not."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols

from forcetune.utils.files import atomic_path

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

POSITION_DIGITS = 6
"""Structures are rounded to so many digits (Å) before they are labelled, so that a file holds what was computed."""
FORCE_DIGITS = 6
ENERGY_DIGITS = 7


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A structure with its labels.

    Attributes:
        numbers: (atoms,) atomic numbers.
        positions: (atoms, 3), Å.
        energy: total energy, eV.
        forces: (atoms, 3), eV/Å.
        kind: how the structure was made; ``config_type`` in files.
        molecule: canonical SMILES; those of several molecules are joined by a dot.
    """

    numbers: IntArray
    positions: FloatArray
    energy: float
    forces: FloatArray
    kind: str
    molecule: str

    @property
    def max_force(self) -> float:
        """Length of the longest force, eV/Å."""
        return float(np.linalg.norm(self.forces, axis=1).max())


def rounded(positions: FloatArray) -> FloatArray:
    """Positions about their mean, to the digits that a file holds; without negative zeros."""
    return np.round(positions - positions.mean(axis=0), POSITION_DIGITS) + 0.0


def xyz_text(samples: Iterable[Sample]) -> str:
    """Extended XYZ with ``REF_energy`` (eV), ``REF_forces`` (eV/Å), ``config_type`` and ``molecule``."""
    lines: list[str] = []
    for sample in samples:
        lines.append(str(len(sample.numbers)))
        lines.append(
            "Properties=species:S:1:pos:R:3:REF_forces:R:3 "
            f'REF_energy={sample.energy:.{ENERGY_DIGITS}f} config_type={sample.kind} molecule="{sample.molecule}" '
            'pbc="F F F"'
        )
        for number, position, force in zip(sample.numbers, sample.positions, sample.forces, strict=True):
            place = " ".join(f"{value:.{POSITION_DIGITS}f}" for value in position)
            pull = " ".join(f"{value:.{FORCE_DIGITS}f}" for value in np.round(force, FORCE_DIGITS) + 0.0)
            lines.append(f"{chemical_symbols[number]} {place} {pull}")
    return "\n".join(lines) + "\n" if lines else ""


def write_xyz(path: Path, samples: Iterable[Sample]) -> None:
    """Write ``samples`` atomically; a name that ends in ``.gz`` is compressed, to the same bytes every time."""
    data = xyz_text(samples).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=9, mtime=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_shard(path: Path, samples: list[Sample], **counts: int) -> None:
    """Write samples and counters as one ``.npz`` without pickled objects, atomically."""
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "sizes": np.array([len(sample.numbers) for sample in samples], dtype=np.int64),
        "numbers": np.concatenate([sample.numbers for sample in samples] or [np.zeros(0, dtype=np.int64)]),
        "positions": np.concatenate([sample.positions for sample in samples] or [np.zeros((0, 3))]),
        "forces": np.concatenate([sample.forces for sample in samples] or [np.zeros((0, 3))]),
        "energies": np.array([sample.energy for sample in samples], dtype=np.float64),
        "kinds": np.array([sample.kind for sample in samples], dtype=np.str_),
        "molecules": np.array([sample.molecule for sample in samples], dtype=np.str_),
        "counters": np.array(list(counts), dtype=np.str_),
        "counts": np.array(list(counts.values()), dtype=np.int64),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def read_shard(path: Path) -> tuple[list[Sample], dict[str, int]]:
    """Samples and counters of a file that :func:`write_shard` wrote."""
    with np.load(path, allow_pickle=False) as shard:
        arrays = {key: shard[key] for key in shard.files}
    ends = np.cumsum(arrays["sizes"])
    samples: list[Sample] = []
    for index, (end, size) in enumerate(zip(ends, arrays["sizes"], strict=True)):
        atoms = slice(int(end - size), int(end))
        samples.append(
            Sample(
                arrays["numbers"][atoms],
                arrays["positions"][atoms],
                float(arrays["energies"][index]),
                arrays["forces"][atoms],
                str(arrays["kinds"][index]),
                str(arrays["molecules"][index]),
            )
        )
    counters = dict(zip(arrays["counters"].tolist(), arrays["counts"].tolist(), strict=True))
    return samples, counters
