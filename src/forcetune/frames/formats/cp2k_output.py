"""CP2K's output file: geometries with their energy, forces and stress.

A frame is made of each block of coordinates (``MODULE QUICKSTEP: ATOMIC COORDINATES``) and the first energy after it.
Optimisations and dynamics print coordinates once and write the others to ``PROJECT-pos-1.xyz``
(:mod:`forcetune.frames.formats.cp2k_trajectory`). CP2K's stress is positive under compression.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.units import Bohr, Hartree

from forcetune.errors import InputError, warn
from forcetune.frames.formats.format import BAR, GIGAPASCAL, KILOBAR, Format, labelled, parse_symbols, say_left_out
from forcetune.frames.text import open_text

_CELL = re.compile(r"\s*CELL\| Vector ([abc]) \[(angstrom|bohr)\]:?\s+(\S+)\s+(\S+)\s+(\S+)", re.IGNORECASE)
_PERIODIC = re.compile(r"\s*(?:POISSON|CELL)\| Periodicity\s+(\w+)", re.IGNORECASE)
_COORDINATES = re.compile(r"\s*MODULE \w+:\s+ATOMIC COORDINATES IN (angstrom|bohr)", re.IGNORECASE)
_ATOM = re.compile(r"\s*\d+\s+\d+\s+(\S+)\s+\d+\s+(\S+)\s+(\S+)\s+(\S+)\s+\S+\s+\S+\s*$")
_ENERGY = re.compile(r"\s*ENERGY\| Total FORCE_EVAL \(.*?\) energy \[(a\.u\.|hartree)\]:?\s+(\S+)", re.IGNORECASE)
_FORCES = re.compile(r"\s*(?:FORCES\|\s*)?ATOMIC FORCES (?:in )?\[(a\.u\.|hartree/bohr|eV/angstrom)\]", re.IGNORECASE)
_FORCE = re.compile(r"\s*(?:FORCES\|\s+\d+|\d+\s+\d+\s+\S+)((?:\s+[-+]?\d+\.\d+(?:[eE][-+]?\d+)?){3,4})\s*$")
_STRESS = re.compile(r"\s*(?:STRESS\|\s*)?(?:Analytical |Numerical )?STRESS TENSOR \[(GPa|bar|kbar)\]", re.IGNORECASE)
_STRESS_ROW = re.compile(r"\s*(?:STRESS\|)?\s+([xyz])\s+(\S+)\s+(\S+)\s+(\S+)\s*$", re.IGNORECASE)
_LENGTHS = {"angstrom": 1.0, "bohr": Bohr}
_FORCE_UNITS = {"a.u.": Hartree / Bohr, "hartree/bohr": Hartree / Bohr, "ev/angstrom": 1.0}
_STRESS_UNITS = {"gpa": GIGAPASCAL, "bar": BAR, "kbar": KILOBAR}


@dataclass(slots=True)
class _Step:
    """A geometry and what was computed for it."""

    names: list[str] = field(default_factory=list)
    positions: list[list[float]] = field(default_factory=list)
    cell: np.ndarray | None = None
    pbc: tuple[bool, bool, bool] = (True, True, True)
    energy: float | None = None
    forces: list[list[float]] = field(default_factory=list)
    stress: dict[str, list[float]] = field(default_factory=dict)
    converged: bool = True


class _Parser:
    """The lines of an output, one after another.

    Attributes:
        steps: geometries that have an energy.
        without: energies of geometries that are not printed.
    """

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.without = 0
        self._current: _Step | None = None
        self._cell = np.zeros((3, 3))
        self._pbc = (True, True, True)
        self._converged = True
        self._table = ""
        self._unit = 1.0

    def take(self, line: str) -> None:
        """The next line."""
        if self._table and self._row(line):
            return
        if match := _CELL.match(line):
            row = "abc".index(match[1].lower())
            self._cell[row] = [_LENGTHS[match[2].lower()] * float(match[number]) for number in (3, 4, 5)]
        elif match := _PERIODIC.match(line):
            x, y, z = (axis in match[1].upper() and match[1].upper() != "NONE" for axis in "XYZ")
            self._pbc = (x, y, z)
        elif match := _COORDINATES.match(line):
            cell = self._cell.copy() if self._cell.any() else None
            self._current = _Step(cell=cell, pbc=self._pbc if cell is not None else (False, False, False))
            self._open("coordinates", _LENGTHS[match[1].lower()])
        elif "SCF run NOT converged" in line:
            self._converged = False
        elif "SCF run converged" in line:
            self._converged = True
        elif match := _ENERGY.match(line):
            self._energy(Hartree * float(match[2]))
        elif match := _FORCES.match(line):
            self._open("forces", _FORCE_UNITS[match[1].lower()])
        elif match := _STRESS.match(line):
            self._open("stress", _STRESS_UNITS[match[1].lower()])

    def _open(self, table: str, unit: float) -> None:
        self._table, self._unit = table, unit

    def _energy(self, energy: float) -> None:
        step = self._current
        if step is None or step.energy is not None:
            self.without += 1
            self._current = None
            return
        step.energy, step.converged = energy, self._converged
        # cells of a cell optimisation stand before the energy
        self.steps.append(step)

    def _row(self, line: str) -> bool:
        """Whether the line is a row of the table that is open, or before its first row."""
        step = self._current
        if self._table == "coordinates" and (match := _ATOM.match(line)) and step is not None:
            step.names.append(match[1])
            step.positions.append([self._unit * float(match[number]) for number in (2, 3, 4)])
            return True
        if self._table == "forces" and (match := _FORCE.match(line)):
            if step is not None:
                step.forces.append([self._unit * float(word) for word in match[1].split()[:3]])
            return True
        if self._table == "stress" and (match := _STRESS_ROW.match(line)) and _is_number(match[2]):
            if step is not None:
                step.stress[match[1].lower()] = [-self._unit * float(match[number]) for number in (2, 3, 4)]
            return True
        rows = {
            "coordinates": [] if step is None else step.names,
            "forces": [] if step is None else step.forces,
            "stress": {} if step is None else step.stress,
        }[self._table]
        heading = not line.strip() or "Atom" in line or re.match(r"\s*(STRESS\|)?\s+x\s+y\s+z\s*$", line, re.IGNORECASE)
        if heading and not rows:
            return True
        self._table = ""
        return False


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_output(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """The geometries whose SCF converged.

    Raises:
        InputError: there is none, or geometries are not printed.
    """
    parser = _Parser()
    with open_text(path) as stream:
        for line in stream:
            parser.take(line)
    if not parser.steps:
        raise InputError(
            f"{path}: CP2K's output has no coordinates with an energy; print them (PRINT_LEVEL MEDIUM), or name the "
            "trajectory PROJECT-pos-1.xyz."
        )
    if parser.without:
        warn(
            f"{path}: {parser.without} energies belong to geometries that are not printed here and are left out; name "
            "the trajectory PROJECT-pos-1.xyz for them."
        )
    left = [index for index, step in enumerate(parser.steps) if not step.converged]
    said: set[str] = set()
    for step in parser.steps:
        if step.converged:
            yield _structure(path, step, said)
    say_left_out(
        path, left, len(parser.steps), "the SCF did not converge", "repeat these calculations with a larger MAX_SCF"
    )


def _structure(path: Path, step: _Step, said: set[str]) -> Atoms:
    symbols = parse_symbols(path, step.names, said)
    atoms = Atoms(symbols, positions=step.positions, cell=step.cell, pbc=step.pbc)
    stress: Any = [step.stress[axis] for axis in "xyz"] if len(step.stress) == 3 else None
    return labelled(atoms, energy=step.energy, forces=step.forces or None, stress=stress)


FORMAT = Format(
    name="cp2k-output",
    title="CP2K's output",
    conversion="energies from Hartree to eV, forces from Hartree/Bohr to eV/Å, stress from pressure to eV/Å³ of "
    "tension.",
    recognizes=lambda path, head: "CP2K| version string" in head or re.search(r"^ ?DBCSR\| ", head, re.M) is not None,
    read=read_output,
)
