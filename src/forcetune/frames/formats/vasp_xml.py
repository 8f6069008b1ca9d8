"""VASP's vasprun.xml, read by ASE; electronic steps that did not converge are left out here."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ase import Atoms
from ase.io.formats import open_with_compression
from ase.io.vasp import read_vasp_xml

from forcetune.frames.formats.format import Format, say_left_out
from forcetune.frames.formats.vasp_outcar import ADVICE, UNCONVERGED, from_results


def read_vasprun(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """The ionic steps that converged.

    Raises:
        InputError: none of them did.
    """
    with open_with_compression(str(path), "rb") as stream:
        converged = _converged_steps(stream)
    left: list[int] = []
    total = 0
    with open_with_compression(str(path), "rb") as stream:
        read: Any = read_vasp_xml
        for atoms in read(stream, slice(None)):
            if total < len(converged) and not converged[total]:
                left.append(total)
            else:
                yield from_results(atoms)
            total += 1
    say_left_out(path, left, total, UNCONVERGED, ADVICE)


def _converged_steps(stream: IO[Any]) -> list[bool]:
    """Of each ionic step, whether its electronic loop ended before NELM or with a change below EDIFF."""
    most, accuracy = 60, 1e-4
    steps: list[bool] = []
    try:
        for _, element in ElementTree.iterparse(stream, events=("end",)):
            if element.tag == "i" and element.get("name") == "NELM" and element.text:
                most = int(element.text)
            elif element.tag == "i" and element.get("name") == "EDIFF" and element.text:
                accuracy = abs(float(element.text))
            elif element.tag == "calculation":
                steps.append(_is_converged(element, most, accuracy))
                element.clear()
    except ElementTree.ParseError:
        pass  # the file of a job that still runs, or that was cut short: ASE reads the steps that are complete
    return steps


def _is_converged(calculation: ElementTree.Element, most: int, accuracy: float) -> bool:
    loop = calculation.findall("scstep")
    if len(loop) < most or most <= 1:
        return True
    energies = [float(step.findtext("energy/i[@name='e_fr_energy']") or "nan") for step in loop[-2:]]
    return len(energies) == 2 and abs(energies[1] - energies[0]) <= accuracy


FORMAT = Format(
    name="vasp-xml",
    title="VASP's vasprun.xml",
    conversion="the energy is the free energy, whose derivatives its forces are; stress from kbar of pressure to "
    "eV/Å³ of tension.",
    recognizes=lambda path, head: head.lstrip().startswith("<?xml") and "<modeling>" in head,
    read=read_vasprun,
)
