"""NumPy archives of sGDML (MD17 and its relatives) and of rMD17.

sGDML: ``R`` (frames, atoms, 3), ``z`` (atoms,), ``E`` (frames,), ``F`` (frames, atoms, 3), perhaps ``lattice`` (3, 3;
its columns are the vectors), ``e_unit`` and ``r_unit``; without units kcal/mol and Å. rMD17: ``coords``,
``nuclear_charges``, ``energies``, ``forces`` in kcal/mol and Å.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.units import Bohr, Hartree, kcal, kJ, mol

from forcetune.errors import InputError
from forcetune.frames.formats.format import Format, labelled
from forcetune.utils.parsing import check_archive

_ENERGIES = {
    "kcal/mol": kcal / mol,
    "kj/mol": kJ / mol,
    "ev": 1.0,
    "mev": 1e-3,
    "hartree": Hartree,
    "ha": Hartree,
    "a.u.": Hartree,
    "au": Hartree,
}
_LENGTHS = {"ang": 1.0, "angstrom": 1.0, "å": 1.0, "bohr": Bohr, "a.u.": Bohr, "au": Bohr}
_READ = ("positions", "numbers", "energies", "forces", "lattice", "e_unit", "r_unit")
_LAYOUTS: dict[str, dict[str, str]] = {
    "sGDML": {"positions": "R", "numbers": "z", "energies": "E", "forces": "F"},
    "rMD17": {"positions": "coords", "numbers": "nuclear_charges", "energies": "energies", "forces": "forces"},
}


def _read_layout(path: Path) -> tuple[dict[str, str], list[str]]:
    """Names of the arrays, and all names in the archive.

    Raises:
        InputError: another content.
    """
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    for layout in _LAYOUTS.values():
        if {layout["positions"], layout["numbers"]} <= set(names):
            return {key: layout.get(key, key) for key in _READ}, names
    listed = ", ".join(repr(name[:30]) for name in names[:8]) or "nothing"
    raise InputError(
        f"{path}: a NumPy archive that is neither sGDML's (R, z, E, F) nor rMD17's (coords, nuclear_charges, energies, "
        f"forces) but has {listed}; write the frames as extended XYZ."
    )


def read_npz(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """
    Raises:
        InputError: another content, or units that are not known.
        ValueError: shapes that do not fit each other.
    """
    check_archive(path)
    layout, names = _read_layout(path)
    with zipfile.ZipFile(path) as archive:
        arrays = {key: _array(archive, name) for key, name in layout.items() if name in names}
    energy_unit = _unit(path, arrays.get("e_unit"), _ENERGIES, "kcal/mol")
    length_unit = _unit(path, arrays.get("r_unit"), _LENGTHS, "Ang")
    numbers = np.asarray(arrays["numbers"], dtype=int).reshape(-1)
    positions = np.asarray(arrays["positions"], dtype=float)
    if positions.ndim != 3 or positions.shape[1:] != (len(numbers), 3):
        raise ValueError(f"positions of the shape {positions.shape} for {len(numbers)} atoms")
    energies, forces, lattice = (arrays.get(key) for key in ("energies", "forces", "lattice"))
    if energies is not None:
        energies = np.asarray(energies, dtype=float).reshape(len(positions))
    if forces is not None:
        forces = np.asarray(forces, dtype=float).reshape(positions.shape)
    cell = None if lattice is None else length_unit * np.asarray(lattice, dtype=float).reshape(3, 3).T
    for index, frame_positions in enumerate(positions):
        yield labelled(
            Atoms(numbers, positions=length_unit * frame_positions, cell=cell, pbc=cell is not None),
            energy=None if energies is None else energy_unit * energies[index],
            forces=None if forces is None else energy_unit / length_unit * forces[index],
        )


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of numbers or text, once it is certain that its bytes are there.

    Raises:
        ValueError: it is one of objects, or larger than its bytes.
    """
    content = io.BytesIO(archive.read(f"{name}.npy"))
    version = np.lib.format.read_magic(content)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(content)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize > content.getbuffer().nbytes:
        raise ValueError(f"'{name}' is no array of numbers, or cut short")
    content.seek(0)
    return np.lib.format.read_array(content, allow_pickle=False)


def _unit(path: Path, stored: Any, units: dict[str, float], usual: str) -> float:
    text = usual if stored is None else stored.item()
    name = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    if name.strip().lower() not in units:
        raise InputError(f"{path}: its unit '{name[:30]}' is unknown; known are {', '.join(units)}.")
    return units[name.strip().lower()]


def _unused(path: Path) -> list[str]:
    layout, names = _read_layout(path)
    about = {"name", "theory", "md5", "type", "code_version"}
    return sorted(name[:30] for name in set(names) - set(layout.values()) - about)


FORMAT = Format(
    name="npz",
    title="a NumPy archive of sGDML or rMD17",
    conversion="energies and forces from kcal/mol and Å, or the units that it names, to eV and eV/Å.",
    recognizes=lambda path, head: path.suffix == ".npz" and head.startswith("PK"),
    read=read_npz,
    unused=_unused,
)
