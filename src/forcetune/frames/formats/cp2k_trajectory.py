"""CP2K's trajectory ``PROJECT-pos-1.xyz`` with the files beside it.

Its comments are `` i = 12, time = 6.000, E = -17.16`` (step, fs, Hartree). Forces (Hartree/Bohr) stand in
``PROJECT-frc-1.xyz``, cells (Å) in ``PROJECT-1.cell``, stress (bar, positive under compression) in
``PROJECT-1.stress``; without a file of cells the cell and the periodicity of ``PROJECT-1.restart`` hold for all frames.
Files are matched by the number of the step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.units import Bohr, Hartree

from forcetune.errors import InputError, warn
from forcetune.frames.formats.format import BAR, Format, labelled, parse_symbols
from forcetune.frames.frame import FloatArray, Origin
from forcetune.frames.text import open_text
from forcetune.frames.xyz import xyz_texts

_COMMENT = re.compile(r"\s*i\s*=\s*(\d+)\s*,(?:.*,)?\s*E\s*=\s*([-+]?\d+\.?\d*(?:[eE][-+]?\d+)?)")
_UNITS = {"bar": BAR, "kbar": 1000 * BAR, "gpa": 10_000 * BAR}


def read_trajectory(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """
    Raises:
        InputError: the file is one of forces, or a step is missing in a file beside it.
    """
    if "-frc-" in path.name or "-vel-" in path.name:
        raise InputError(f"{path}: has forces or velocities of CP2K; name the trajectory of positions (-pos-).")
    beside = _beside(path)
    forces = _frames(beside["forces"]) if "forces" in beside else None
    cells = _table(beside["cells"], 9) if "cells" in beside else {}
    stresses = _table(beside["stress"], 9) if "stress" in beside else {}
    fixed = _cell_of_restart(beside["restart"]) if not cells and "restart" in beside else None
    if not cells and fixed is None:
        warn(
            f"{path}: there is no {_stem(path)}.cell and no .restart beside it, so its frames are read as molecules "
            "without a cell; copy one of them here if they are periodic."
        )
    force_rows = None if forces is None else next(forces, None)
    said: set[str] = set()
    unit = _UNITS.get(_read_unit(beside["stress"]), BAR) if "stress" in beside else BAR
    for index, (step, energy, names, positions) in enumerate(_frames(path)):
        # files may be written less often than others, or begin earlier
        while forces is not None and force_rows is not None and force_rows[0] < step:
            force_rows = next(forces, None)
        frame_forces = None if force_rows is None or force_rows[0] != step else Hartree / Bohr * force_rows[3]
        if forces is not None and frame_forces is None:
            raise InputError(
                f"{Origin(str(path), index)}: step {step} is missing in {beside['forces']}; copy both again."
            )
        cell, pbc = _cell(path, index, step, cells, fixed)
        atoms = Atoms(parse_symbols(path, names, said), positions=positions, cell=cell, pbc=pbc)
        stress = -unit * stresses[step].reshape(3, 3) if step in stresses else None
        yield labelled(atoms, energy=Hartree * energy, forces=frame_forces, stress=stress)


_Fixed = tuple[FloatArray, tuple[bool, bool, bool]]


def _cell(
    path: Path, index: int, step: int, cells: dict[int, FloatArray], fixed: _Fixed | None
) -> tuple[FloatArray | None, tuple[bool, bool, bool]]:
    if fixed is not None:
        return fixed
    if not cells:
        return None, (False, False, False)
    if step not in cells:
        raise InputError(f"{Origin(str(path), index)}: step {step} is missing in the file of cells; copy both again.")
    return cells[step].reshape(3, 3), (True, True, True)


def _stem(path: Path) -> str:
    """PROJECT-1 of PROJECT-pos-1.xyz."""
    return re.sub(r"-pos-(\d+)\.xyz.*$", r"-\1", path.name)


def _beside(path: Path) -> dict[str, Path]:
    """The files that belong to a trajectory."""
    stem = _stem(path)
    places = {
        "forces": path.with_name(path.name.replace("-pos-", "-frc-")),
        "cells": path.with_name(f"{stem}.cell"),
        "stress": path.with_name(f"{stem}.stress"),
        "restart": path.with_name(f"{stem}.restart"),
    }
    return {name: place for name, place in places.items() if place != path and place.is_file()}


def _frames(path: Path) -> Iterator[tuple[int, float, list[str], FloatArray]]:
    """Step, energy (Hartree), names and the three numbers of each atom."""
    for index, text in enumerate(xyz_texts(path)):
        lines = text.splitlines()
        match = _COMMENT.match(lines[1])
        if match is None:
            raise InputError(f"{Origin(str(path), index)}: its comment has no step and energy as CP2K writes them.")
        rows = [line.split() for line in lines[2 : 2 + int(lines[0])]]
        numbers = np.array([[float(word) for word in row[1:4]] for row in rows]).reshape(-1, 3)
        yield int(match[1]), float(match[2]), [row[0] for row in rows], numbers


def _table(path: Path, numbers: int) -> dict[int, FloatArray]:
    """Numbers behind step and time, by step."""
    table: dict[int, FloatArray] = {}
    with open_text(path) as stream:
        for line in stream:
            words = line.split()
            if words and not words[0].startswith("#"):
                table[int(words[0])] = np.array([float(word) for word in words[2 : 2 + numbers]])
    if any(len(values) != numbers for values in table.values()):
        raise InputError(f"{path}: a line has fewer than {numbers} numbers; copy the file again.")
    return table


def _read_unit(path: Path) -> str:
    with open_text(path) as stream:
        units = re.findall(r"\[(bar|kbar|GPa)\]", stream.readline(2**16))
    return units[0].lower() if units else "bar"


def _cell_of_restart(path: Path) -> _Fixed | None:
    with open_text(path) as stream:
        section = re.search(r"^\s*&CELL\b(.*?)^\s*&END CELL", stream.read(2**26), re.MULTILINE | re.DOTALL)
    if section is None:
        return None
    words = {line.split()[0].upper(): line.split()[1:] for line in section[1].splitlines() if line.split()}
    if not {"A", "B", "C"} <= words.keys():
        return None
    cell = np.array([[float(word) for word in words[name][-3:]] for name in "ABC"])
    axes = words.get("PERIODIC", ["XYZ"])[0].upper()
    x, y, z = (axes != "NONE" and axis in axes for axis in "XYZ")
    return cell, (x, y, z)


def _is_trajectory(path: Path, head: str) -> bool:
    lines = head.split("\n", 2)
    if len(lines) < 3 or not lines[0].strip().isdecimal() or "Properties=" in lines[1]:
        return False
    return _COMMENT.match(lines[1]) is not None


FORMAT = Format(
    name="cp2k-trajectory",
    title="a trajectory of CP2K",
    conversion="energies from Hartree to eV, forces of its -frc- file from Hartree/Bohr to eV/Å, stress from pressure "
    "to eV/Å³ of tension.",
    recognizes=_is_trajectory,
    read=read_trajectory,
    parts=lambda path: [path, *_beside(path).values()],
)
