"""What a format must say of itself, and what readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from forcetune.errors import InputError, warn
from forcetune.frames.elements import parse_element

KILOBAR = 1e8 / 1.602176634e11
"""1 kbar in eV/Å³ (0.1 GPa)."""
GIGAPASCAL = 10 * KILOBAR
BAR = KILOBAR / 1000


def _only_itself(path: Path) -> list[Path]:
    return [path]


def _nothing(path: Path) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class Format:
    """A format that is read here.

    Its reader gives structures whose labels stand under ``energy`` (eV), ``forces`` ((atoms, 3), eV/Å), ``stress``
    ((3, 3), eV/Å³, positive under tension) and ``magmoms`` ((atoms, 3) or (atoms,), μB), see :func:`labelled`.

    Attributes:
        name: short and unique, for the choice of a reader.
        title: for people.
        conversion: one sentence: units and signs in the file, and what was done to them.
        recognizes: whether a file with this path and beginning (text, at most 64 KiB) is one; of a folder the text is
            empty.
        read: the structures, one at a time, given the path and elements of numbered types (empty where the user
            named none). Whatever it raises but :class:`InputError` is reported with the file and the frame reached.
        parts: all files that are read with the one that is named; they make the hash of the data.
        unused: what is in a file or folder and is not read.
        is_folder: data are a folder.
        folders_in: of folders: the folder itself if it is one, otherwise those below it.
    """

    name: str
    title: str
    conversion: str
    recognizes: Callable[[Path, str], bool]
    read: Callable[[Path, Sequence[str]], Iterator[Atoms]]
    parts: Callable[[Path], list[Path]] = _only_itself
    unused: Callable[[Path], list[str]] = _nothing
    is_folder: bool = False
    folders_in: Callable[[Path], list[Path]] | None = None


def labelled(
    atoms: Atoms,
    *,
    energy: float | None = None,
    forces: Any = None,
    stress: Any = None,
    magmoms: Any = None,
) -> Atoms:
    """A structure without results of its own and with these labels; None for one that is not there.

    Args:
        atoms: changed in place.
        energy: eV.
        forces: (atoms, 3), eV/Å.
        stress: (3, 3) or six numbers in Voigt order (xx, yy, zz, yz, xz, xy), eV/Å³, positive under tension.
        magmoms: (atoms, 3) or (atoms,), μB.

    Raises:
        ValueError: a label of atoms has another number of entries than there are atoms.
    """
    atoms.calc = None
    if energy is not None:
        atoms.info["energy"] = float(energy)
    if stress is not None:
        atoms.info["stress"] = np.asarray(stress, dtype=float)
    for name, values in (("forces", forces), ("magmoms", magmoms)):
        if values is None:
            continue
        array = np.asarray(values, dtype=float)
        if len(array) != len(atoms):
            raise ValueError(f"{name} of {len(array)} atoms for a structure of {len(atoms)}")
        atoms.set_array(name, array)
    return atoms


def parse_symbols(path: Path, names: Sequence[str], said: set[str] | None = None) -> list[str]:
    """Symbols for the names of atoms; warns once about each name that is not one.

    Raises:
        InputError: a name that is no element.
    """
    said = set() if said is None else said
    symbols: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            symbols[name], remark = parse_element(name)
        except ValueError as error:
            raise InputError(f"{path}: an atom has {error}.") from error
        if remark is not None and remark not in said:
            said.add(remark)
            warn(f"{path}: {remark}.")
    return [symbols[name] for name in names]


def symbols_of_types(path: Path, types: Sequence[int], type_map: Sequence[str], source: str) -> list[str]:
    """Symbols for types that are numbered from 0.

    Args:
        path: for messages.
        types: of the atoms.
        type_map: the name of each type.
        source: what numbers its types, for a message: ``MTP's .cfg``.

    Raises:
        InputError: there are types and no names for them.
    """
    highest, lowest = max(types, default=-1), min(types, default=0)
    if lowest < 0:
        raise InputError(f"{path}: has an atom of type {lowest}; types are numbered from 0.")
    if highest >= len(type_map):
        known = f"{len(type_map)} ({', '.join(type_map)})" if type_map else "none"
        raise InputError(
            f"{path}: {source} numbers the types of its atoms, here 0 to {highest}, and {known} of them has a name; "
            "name the elements in the order of their types, such as --type-map C,O,H (data.type_map)."
        )
    symbols = parse_symbols(path, list(type_map))
    return [symbols[number] for number in types]


def say_left_out(path: Path, steps: Sequence[int], total: int, why: str, advice: str) -> None:
    """Warn that steps of a calculation are not used.

    Raises:
        InputError: these are all there are.
    """
    if not steps:
        return
    listed = ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")
    if len(steps) == total:
        raise InputError(
            f"{path}: {why} in {'its only step' if total == 1 else f'all of its {total} steps'}; {advice}."
        )
    warn(f"{path}: {why} in {len(steps)} of {total} steps ({listed}, counted from 0), which are left out; {advice}.")
