"""ORCA's ``.engrad``: one geometry with energy and gradient, each block behind comments that say what it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.units import Bohr, Hartree

from forcetune.frames.formats.format import Format, labelled
from forcetune.frames.text import open_text

_TITLE = re.compile(r"#\s*The current total energy in Eh")


def read_engrad(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """
    Raises:
        ValueError: another number of entries than there are atoms.
    """
    with open_text(path) as stream:
        words = [word for line in stream if not line.lstrip().startswith("#") for word in line.split()]
    atoms = int(words[0])
    if len(words) != 2 + 3 * atoms + 4 * atoms:
        raise ValueError(f"it has {len(words)} entries where {atoms} atoms have {2 + 7 * atoms}")
    gradient = np.array(words[2 : 2 + 3 * atoms], dtype=float).reshape(atoms, 3)
    rows = [words[start : start + 4] for start in range(2 + 3 * atoms, len(words), 4)]
    structure = Atoms([int(row[0]) for row in rows], positions=Bohr * np.array([row[1:] for row in rows], dtype=float))
    yield labelled(structure, energy=Hartree * float(words[1]), forces=-Hartree / Bohr * gradient)


FORMAT = Format(
    name="orca-engrad",
    title="ORCA's .engrad",
    conversion="energy from Hartree to eV, forces from the gradient in Hartree/Bohr to eV/Å, sign turned.",
    recognizes=lambda path, head: _TITLE.search(head) is not None,
    read=read_engrad,
)
