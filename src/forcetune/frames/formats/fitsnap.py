"""FitSNAP's JSON: ``{"Dataset": {"EnergyStyle": …, "Data": [{"Lattice", "Positions", "AtomTypes", "Energy", …}]}}``.

Comment lines before it begin with ``#``. The styles say the units. Stress is LAMMPS's pressure tensor, positive under
compression. ``Spins`` are |μ| and a unit vector of each atom.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.units import Bohr, Hartree, kcal, mol

from forcetune.frames.formats.format import BAR, GIGAPASCAL, KILOBAR, Format, labelled, parse_symbols
from forcetune.frames.text import open_text

_LENGTHS = {"angstrom": 1.0, "bohr": Bohr}
_ENERGIES = {"electronvolt": 1.0, "ev": 1.0, "hartree": Hartree, "kcal/mol": kcal / mol}
_FORCES = {"electronvoltperangstrom": 1.0, "ev/angstrom": 1.0, "hartreeperbohr": Hartree / Bohr}
_STRESSES = {"bar": BAR, "kb": KILOBAR, "kbar": KILOBAR, "gpa": GIGAPASCAL, "gigapascal": GIGAPASCAL}
_READ = frozenset(
    {"NumAtoms", "Lattice", "Positions", "AtomTypes", "Energy", "Forces", "Stress", "Spins", "QMLattice", "QMStress"}
)


def _load(path: Path) -> Any:
    with open_text(path) as stream:
        text = stream.read()
    return json.loads(re.sub(r"\A(\s*#[^\n]*\n)+", "", text))["Dataset"]


def read_fitsnap(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """
    Raises:
        InputError: a name that is no element.
        KeyError, TypeError, ValueError: another layout, or a style that is not known.
    """
    dataset = _load(path)
    length = _unit(dataset, "PositionsStyle", _LENGTHS, "angstrom")
    lattice = _unit(dataset, "LatticeStyle", _LENGTHS, "angstrom")
    energy = _unit(dataset, "EnergyStyle", _ENERGIES, "electronvolt")
    forces = _unit(dataset, "ForcesStyle", _FORCES, "electronvoltperangstrom")
    said: set[str] = set()
    for row in dataset["Data"]:
        cell = lattice * np.array(row["Lattice"], dtype=float)
        symbols = parse_symbols(path, [str(name) for name in row["AtomTypes"]], said)
        atoms = Atoms(symbols, positions=length * np.array(row["Positions"], dtype=float), cell=cell, pbc=True)
        yield labelled(
            atoms,
            energy=None if row.get("Energy") is None else energy * float(row["Energy"]),
            forces=None if row.get("Forces") is None else forces * np.array(row["Forces"], dtype=float),
            stress=_stress(dataset, row),
            magmoms=_moments(dataset, row),
        )


def _unit(dataset: Mapping[str, Any], style: str, units: Mapping[str, float], usual: str) -> float:
    name = str(dataset.get(style, usual))
    if name.lower() not in units:
        raise ValueError(f"its {style} is '{name[:40]}'; known are {', '.join(units)}")
    return units[name.lower()]


def _stress(dataset: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    if row.get("Stress") is None:
        return None
    return -_unit(dataset, "StressStyle", _STRESSES, "bar") * np.array(row["Stress"], dtype=float).reshape(3, 3)


def _moments(dataset: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """(atoms, 3), μB; None where there are none, or in another style."""
    if row.get("Spins") is None or "".join(str(dataset.get("SpinsStyle", "")).split()).lower() != "totalxyz":
        return None
    spins = np.array(row["Spins"], dtype=float)
    return spins[:, :1] * spins[:, 1:4]


def _unused(path: Path) -> list[str]:
    dataset = _load(path)
    unused = {key for row in dataset["Data"] for key in row} - _READ
    if any("Spins" in row and _moments(dataset, row) is None for row in dataset["Data"]):
        unused.add("Spins")
    return sorted(unused)


FORMAT = Format(
    name="fitsnap-json",
    title="FitSNAP's JSON",
    conversion="units by its styles; stress from pressure to eV/Å³ of tension, Spins as magnetic moments (length times "
    "direction).",
    recognizes=lambda path, head: re.match(r'(\s*#[^\n]*\n)*\s*\{\s*"Dataset"\s*:', head) is not None,
    read=read_fitsnap,
    unused=_unused,
)
