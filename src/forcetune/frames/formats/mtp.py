"""Configurations of moment tensor potentials (MLIP's ``.cfg``).

``BEGIN_CFG … END_CFG`` with ``Size``, ``Supercell`` (rows, Å; one for each periodic direction), ``AtomData:`` whose
header names the columns (``id type cartes_x cartes_y cartes_z fx fy fz``, or ``direct_x …``), ``Energy`` (eV) and
``PlusStress:`` (eV, its header naming the components): the virial −dE/dε, so that stress = −PlusStress / volume. Types
are numbers; which elements they are stands nowhere in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import complete_cell

from forcetune.errors import InputError
from forcetune.frames.formats.format import Format, labelled, symbols_of_types
from forcetune.frames.frame import Origin
from forcetune.frames.text import open_text

_SECTIONS = ("Size", "Supercell", "AtomData:", "Energy", "PlusStress:", "Feature", "END_CFG", "BEGIN_CFG")
_COMPONENTS = {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "yz": (1, 2), "xz": (0, 2), "xy": (0, 1)}


@dataclass(slots=True)
class _Configuration:
    """What stands between BEGIN_CFG and END_CFG: rows of words by section, and the headers of tables."""

    rows: dict[str, list[list[str]]] = field(default_factory=dict)
    headers: dict[str, list[str]] = field(default_factory=dict)


def read_cfg(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """
    Raises:
        InputError: a configuration is cut short or damaged, or there is nothing that says which elements the types are.
    """
    for index, configuration in enumerate(_configurations(path)):
        try:
            yield _atoms(path, configuration, type_map)
        except (ValueError, IndexError, KeyError) as error:
            raise InputError(
                f"{Origin(str(path), index)}: its MTP configuration is damaged ({str(error)[:160]}); fix or remove it."
            ) from error


def _configurations(path: Path) -> Iterator[_Configuration]:
    index, current, section = 0, None, ""
    with open_text(path) as stream:
        for line in stream:
            words = line.split()
            if not words:
                continue
            if words[0] == "BEGIN_CFG" and current is None:
                current, section = _Configuration(), ""
            elif current is None:
                continue
            elif words[0] == "END_CFG":
                yield current
                index, current = index + 1, None
            elif words[0] == "BEGIN_CFG":
                break
            elif words[0] in _SECTIONS:
                section = words[0]
                current.headers[section] = words[1:]
                current.rows.setdefault(section, [])
            elif section and section != "Feature":
                current.rows[section].append(words)
    if current is not None:
        raise InputError(
            f"{Origin(str(path), index)}: the MTP configuration begins but does not end (no END_CFG); the file was cut "
            "short, copy it again or remove this configuration."
        )


def _atoms(path: Path, configuration: _Configuration, type_map: Sequence[str]) -> Atoms:
    size = int((configuration.headers.get("Size") or configuration.rows["Size"][0])[0])
    columns = configuration.headers.get("AtomData:", [])
    table = configuration.rows.get("AtomData:", [])
    if len(table) != size:
        raise ValueError(f"it has {len(table)} atoms and announces {size}")
    missing = {"type"} - set(columns)
    if missing or not ({"cartes_x", "direct_x"} & set(columns)):
        raise ValueError(f"its AtomData has the columns {' '.join(columns)[:60]}, but type and cartes_x are needed")
    vectors = np.array([[float(word) for word in row[:3]] for row in configuration.rows.get("Supercell", [])]).reshape(
        -1, 3
    )
    periodic = np.arange(3) < len(vectors)
    cell = np.zeros((3, 3))
    cell[: len(vectors)] = vectors
    numbers = np.array([[float(word) for word in row[: len(columns)]] for row in table])

    def vector(name: str) -> Any:
        if f"{name}x" not in columns:
            return None
        return np.stack([numbers[:, columns.index(f"{name}{axis}")] for axis in "xyz"], axis=1)

    positions = vector("cartes_")
    if positions is None:
        positions = vector("direct_") @ complete_cell(cell)
    types = numbers[:, columns.index("type")].astype(int).tolist()
    atoms = Atoms(symbols_of_types(path, types, type_map, "MTP's .cfg"), positions=positions, cell=cell, pbc=periodic)
    energy = configuration.headers.get("Energy") or next(iter(configuration.rows.get("Energy", [])), None)
    return labelled(
        atoms,
        energy=None if energy is None else float(energy[0]),
        forces=vector("f"),
        stress=_stress(configuration, cell if periodic.all() else None),
    )


def _stress(configuration: _Configuration, cell: Any) -> Any:
    rows = configuration.rows.get("PlusStress:", [])
    if not rows or cell is None:
        return None
    header = configuration.headers.get("PlusStress:") or list(_COMPONENTS)
    virial = np.zeros((3, 3))
    for name, word in zip(header, rows[0], strict=True):
        row, column = _COMPONENTS[name.lower()]
        virial[row, column] = virial[column, row] = float(word)
    return -virial / abs(np.linalg.det(cell))


FORMAT = Format(
    name="mtp-cfg",
    title="MTP's .cfg",
    conversion="energies in eV and forces in eV/Å as they are, stress = −PlusStress / volume.",
    recognizes=lambda path, head: re.search(r"^[ \t]*BEGIN_CFG[ \t]*$", head, re.MULTILINE) is not None,
    read=read_cfg,
)
