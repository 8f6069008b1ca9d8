"""ORCA's output, read by ASE: every geometry with its energy, and the gradient where it is printed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms

from forcetune.errors import warn
from forcetune.frames.formats.format import Format, labelled, say_left_out
from forcetune.frames.text import open_text


def read_orca(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """Geometries whose SCF converged; without those that have no gradient where others have one.

    Raises:
        InputError: no SCF converged.
    """
    with open_text(path) as stream:
        structures: Any = list(ase.io.iread(stream, ":", format="orca-output", parallel=False))
    results = [{} if atoms.calc is None else atoms.calc.results for atoms in structures]
    converged = [not math.isnan(result.get("energy") or 0.0) for result in results]
    bare = [result.get("forces") is None for result in results]
    if any(bare) and not all(bare):
        # an optimisation ends with an energy at its last geometry
        warn(
            f"{path}: {sum(bare)} of {len(bare)} geometries have an energy and no gradient (first {bare.index(True)}, "
            "counted from 0) and are left out."
        )
    for atoms, result, fine, without in zip(structures, results, converged, bare, strict=True):
        if fine and (not without or all(bare)):
            yield labelled(atoms, energy=result.get("energy"), forces=result.get("forces"))
    left = [index for index, fine in enumerate(converged) if not fine]
    say_left_out(path, left, len(structures), "the wavefunction did not converge", "repeat these calculations")


FORMAT = Format(
    name="orca-output",
    title="ORCA's output",
    conversion="energies from Hartree to eV, forces from gradients in Hartree/Bohr to eV/Å, sign turned.",
    recognizes=lambda path, head: re.search(r"\*\s+O\s+R\s+C\s+A\s+\*", head) is not None,
    read=read_orca,
)
