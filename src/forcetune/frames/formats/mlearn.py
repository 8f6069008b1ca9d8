"""JSON of mlearn and maml: a list of pymatgen structures with the results of VASP.

``[{"structure": …, "outputs": {"energy": eV, "forces": eV/Å, "virial_stress": kbar}, "element", "group", …}, …]``.
The six stresses are VASP's, positive under compression. Their order is VASP's (xx, yy, zz, xy, yz, zx) in data of maml
and by mlearn's own code; mlearn's published data (which have ``group`` and ``element``) have xx, yy, zz, xy, xz, yz
except for Li and the group ``Elastic`` of Si and Ge, as pairs of sheared cells show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from forcetune.errors import InputError
from forcetune.frames.formats.format import KILOBAR, Format, labelled, parse_symbols
from forcetune.frames.text import open_text

_VASP_ORDER = ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2))
_MLEARN_ORDER = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
_MLEARN_ELEMENTS = frozenset({"Ni", "Cu", "Li", "Mo", "Si", "Ge"})


def read_mlearn(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """
    Raises:
        InputError: a name that is no element.
        KeyError, TypeError, ValueError: another layout.
    """
    with open_text(path) as stream:
        records = json.load(stream)
    if not isinstance(records, list):
        raise InputError(f"{path}: should be a list of structures with outputs, as mlearn and maml write it.")
    said: set[str] = set()
    for record in records:
        yield _structure(path, record, said)


def _structure(path: Path, record: Any, said: set[str]) -> Atoms:
    structure, outputs = record["structure"], record["outputs"]
    sites = structure["sites"]
    mixed = [index for index, site in enumerate(sites) if len(site["species"]) != 1]
    if mixed:
        raise ValueError(f"atom {mixed[0]} is a mixture of elements")
    names = [site["species"][0]["element"] for site in sites]
    cell = np.array(structure["lattice"]["matrix"], dtype=float)
    periodic = structure["lattice"].get("pbc", True)
    atoms = Atoms(parse_symbols(path, names, said), positions=[site["xyz"] for site in sites], cell=cell, pbc=periodic)
    if isinstance(record.get("group"), str):
        atoms.info["group"] = record["group"]
    return labelled(atoms, energy=outputs.get("energy"), forces=outputs.get("forces"), stress=_stress(record, outputs))


def _stress(record: Any, outputs: Any) -> Any:
    """(3, 3), eV/Å³, positive under tension."""
    virial = outputs.get("virial_stress")
    if virial is None:
        return None
    values = -KILOBAR * np.array(virial, dtype=float)
    if values.shape == (3, 3):
        return values
    if values.shape != (6,):
        raise ValueError(f"virial_stress should be six numbers but has the shape {values.shape}")
    matrix = np.zeros((3, 3))
    for (row, column), value in zip(_order(record), values, strict=True):
        matrix[row, column] = matrix[column, row] = value
    return matrix


def _order(record: Any) -> tuple[tuple[int, int], ...]:
    element, group = record.get("element"), record.get("group")
    if element not in _MLEARN_ELEMENTS or not isinstance(group, str):
        return _VASP_ORDER
    return _VASP_ORDER if element == "Li" or (element in ("Si", "Ge") and group == "Elastic") else _MLEARN_ORDER


def _is_mlearn(path: Path, head: str) -> bool:
    return re.match(r"\s*\[\s*\{", head) is not None and '"structure"' in head and '"lattice"' in head


FORMAT = Format(
    name="mlearn-json",
    title="JSON of mlearn or maml",
    conversion="energies in eV and forces in eV/Å as they are; stress from kbar of pressure to eV/Å³ of tension, its "
    "components put into order by element and group.",
    recognizes=_is_mlearn,
    read=read_mlearn,
)
