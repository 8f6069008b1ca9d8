"""VASP's OUTCAR, read by ASE; electronic steps that did not converge are left out here.

ASE's ``energy`` is the one extrapolated to zero smearing. Forces and stress are derivatives of the free energy TOTEN,
which is the label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms

from forcetune.frames.formats.format import Format, labelled, say_left_out
from forcetune.frames.text import open_text

_END_OF_STEP = "FREE ENERGIE OF THE ION-ELECTRON SYSTEM"


def converged_steps(lines: Iterable[str]) -> list[bool]:
    """Of each ionic step, whether its electronic loop reached EDIFF; True where there was no such loop."""
    steps: list[bool] = []
    began = reached = False
    for line in lines:
        if "Iteration" in line and re.search(r"-\s*Iteration\s+\d+\(", line):
            began = True
        elif "aborting loop" in line:
            reached = "not reached" not in line and "unconverged" not in line
        elif _END_OF_STEP in line:
            steps.append(reached or not began)
            began = reached = False
    return steps


def read_outcar(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """The ionic steps that converged.

    Raises:
        InputError: none of them did.
    """
    with open_text(path) as stream:
        converged = converged_steps(stream)
    left: list[int] = []
    total = 0
    with open_text(path) as stream:
        structures: Any = ase.io.iread(stream, ":", format="vasp-out", parallel=False)
        for atoms in structures:
            if total < len(converged) and not converged[total]:
                left.append(total)
            else:
                yield from_results(atoms)
            total += 1
    say_left_out(path, left, total, UNCONVERGED, ADVICE)


UNCONVERGED = "the electronic loop did not converge to EDIFF"
ADVICE = "repeat these calculations with a larger NELM or another ALGO"


def from_results(atoms: Atoms) -> Atoms:
    """A structure as ASE reads it from VASP, with the free energy for its energy."""
    results = {} if atoms.calc is None else atoms.calc.results
    return labelled(
        atoms,
        energy=results.get("free_energy", results.get("energy")),
        forces=results.get("forces"),
        stress=None if results.get("stress") is None else voigt_matrix(results["stress"]),
        magmoms=results.get("magmoms"),
    )


def voigt_matrix(six: Any) -> list[list[float]]:
    """(3, 3) from xx, yy, zz, yz, xz, xy."""
    xx, yy, zz, yz, xz, xy = (float(value) for value in six)
    return [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]


def _is_outcar(path: Path, head: str) -> bool:
    if re.match(r"\s*vasp\.\d+\.\d+", head):
        return True
    return "OUTCAR" in path.name and any(word in head for word in ("POTCAR:", "VRHFIN", "INCAR:"))


FORMAT = Format(
    name="vasp-outcar",
    title="VASP's OUTCAR",
    conversion="the energy is the free energy TOTEN, whose derivatives its forces are; stress from kbar of pressure "
    "to eV/Å³ of tension.",
    recognizes=_is_outcar,
    read=read_outcar,
)
