"""The Materials Project trajectories as CHGNet published them: one JSON file of many gigabytes.

``{material: {frame: {"structure": …, "uncorrected_total_energy": eV, "corrected_total_energy": eV, "force": eV/Å,
"stress": kBar in VASP's sign, "magmom": μB or null, …}}}``. It is read material by material, never as a whole.

Labels stand under the names that they have in the file, and under those that are looked for: ``energy`` is the
uncorrected one, ``stress`` is in eV/Å³ with ASE's sign, −kBar / 1602.1766, ``magmoms`` are scalars along z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers

from forcetune.errors import InputError
from forcetune.frames.frame import Origin

FORMAT = "mptrj"
KBAR_PER_EV_PER_CUBIC_ANGSTROM = 1602.1766208
_HEAD = 2000


def is_mptrj(path: Path) -> bool:
    """Whether a file looks like it; only its beginning is read."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as stream:
        head = stream.read(_HEAD).decode("utf-8", errors="replace").lstrip()
    return head.startswith("{") and '"mp-' in head and ('"structure"' in head or '"@module"' in head)


def iterate_mptrj(path: Path) -> Iterator[Atoms]:
    """Every frame, in the order of the file.

    Raises:
        InputError: ijson is not installed, the file is damaged, or a frame is not of the published form.
    """
    try:
        import ijson
    except ImportError as error:
        raise InputError(
            f"{path}: reading this JSON needs ijson; install it with `pip install 'forcetune[datasets]'`."
        ) from error
    index = 0
    with path.open("rb") as stream:
        try:
            for _, frames in ijson.kvitems(stream, "", use_float=True):
                if not isinstance(frames, dict):
                    raise InputError(f"{Origin(str(path), index)}: holds no frames of a material; copy the file again.")
                for identifier, frame in frames.items():
                    yield _atoms(Origin(str(path), index), str(identifier), frame)
                    index += 1
        except (ijson.JSONError, UnicodeDecodeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{Origin(str(path), index)}: the JSON is damaged ({str(error)[:80]}); copy it again."
            ) from error
    if index == 0:
        raise InputError(f"{path}: holds no frames; copy the file again.")


def _atoms(origin: Origin, identifier: str, frame: Any) -> Atoms:
    try:
        structure = frame["structure"]
        sites = structure["sites"]
        symbols = [_element(site) for site in sites]
        atoms = Atoms(
            numbers=[atomic_numbers[symbol] for symbol in symbols],
            positions=np.array([site["xyz"] for site in sites], dtype=np.float64).reshape(-1, 3),
            cell=np.array(structure["lattice"]["matrix"], dtype=np.float64).reshape(3, 3),
            pbc=True,
        )
        results: dict[str, Any] = {
            "energy": float(frame["uncorrected_total_energy"]),
            "forces": np.array(frame["force"], dtype=np.float64).reshape(len(atoms), 3),
        }
        if frame.get("stress") is not None:
            stress = np.array(frame["stress"], dtype=np.float64).reshape(3, 3)
            results["stress"] = -stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] / KBAR_PER_EV_PER_CUBIC_ANGSTROM
        if frame.get("magmom") is not None:
            results["magmoms"] = np.array(frame["magmom"], dtype=np.float64).reshape(len(atoms))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{origin}: is not a frame as published ({error!r:.80}); copy the file again.") from error
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info["frame_id"] = identifier
    for name in ("uncorrected_total_energy", "corrected_total_energy"):
        value = frame.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            atoms.info[name] = float(value)
    return atoms


def _element(site: Mapping[str, Any]) -> str:
    species = site["species"]
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise ValueError("a site with several elements")
    return str(species[0]["element"])
