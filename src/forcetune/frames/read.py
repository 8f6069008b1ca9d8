"""Frames from everything ASE reads, with their labels found, checked and brought to one shape.

Labels are looked for under these names, in this order, and one choice holds for the whole set:

- energy: ``REF_energy, dft_energy, DFT_energy, ref_energy, energy, Energy, TotEnergy, total_energy, free_energy``
- forces: ``REF_forces, dft_forces, DFT_forces, ref_forces, forces, Forces, force, dft_force, DFT_force``
- stress: ``REF_stress, dft_stress, DFT_stress, ref_stress, stress, Stress``, then virials
  ``REF_virials, REF_virial, dft_virials, dft_virial, DFT_virial, virials, virial``, from which
  stress = −virial / volume

and last in the results of an attached ASE calculator (``calculator``). ASE's extended-XYZ reader moves ``energy``,
``forces``, ``stress``, … into such a calculator; they are found under the name they have in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from ase import Atoms

from forcetune.errors import InputError, warn
from forcetune.files import sha256_of
from forcetune.frames.frame import FloatArray, Frame, FrameSet, LabelKeys, Origin
from forcetune.frames.sources import XYZ_FORMATS, expand, file_format, iterate

Label = Literal["energy", "forces", "stress"]
LABELS: tuple[Label, ...] = get_args(Label)

AUTO = "auto"
NONE = "none"
CALCULATOR = "calculator"

CANDIDATES: dict[Label, tuple[str, ...]] = {
    "energy": (
        *("REF_energy", "dft_energy", "DFT_energy", "ref_energy", "energy", "Energy"),
        *("TotEnergy", "total_energy", "free_energy", CALCULATOR),
    ),
    "forces": (
        *("REF_forces", "dft_forces", "DFT_forces", "ref_forces", "forces", "Forces"),
        *("force", "dft_force", "DFT_force", CALCULATOR),
    ),
    "stress": (
        *("REF_stress", "dft_stress", "DFT_stress", "ref_stress", "stress", "Stress"),
        *("REF_virials", "REF_virial", "dft_virials", "dft_virial", "DFT_virial", "virials", "virial", CALCULATOR),
    ),
}

_STRUCTURE_ARRAYS = frozenset({"numbers", "positions"})
_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


@dataclass(frozen=True, slots=True, eq=False)
class _Raw:
    """A structure as ASE gave it, with what may hold labels.

    Attributes:
        named: what stands under a name in the file or the Atoms object (``info`` and ``arrays``).
        results: what stands in the results of the calculator, unconstrained.
        moved: the results were names in an extended-XYZ file.
        stale: the calculator has results, but of another structure.
    """

    atoms: Atoms
    origin: Origin
    named: dict[str, Any]
    results: dict[str, Any]
    moved: bool = False
    stale: bool = False


def read_frames(
    sources: str | Path | Sequence[str | Path],
    *,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    stress_key: str = AUTO,
    require: Sequence[Label] = ("energy",),
    name: str = "training data",
) -> FrameSet:
    """Read frames and labels from files that ASE reads: extended XYZ, trajectories, databases, vasprun.xml, ….

    Forces of constrained atoms keep the values of the file: ASE's constraints are not applied.

    Args:
        sources: a file, a pattern such as ``"runs/*/vasprun.xml"``, or several of either.
        energy_key: the key of the energy, eV; ``auto`` looks for it (see this module), ``calculator`` takes the
            results of an attached calculator, ``none`` leaves the label out.
        forces_key: as above for forces, (atoms, 3), eV/Å.
        stress_key: as above for stress, 6 (Voigt), 9 or (3, 3), eV/Å³; a key with ``virial`` in its name is a
            virial in eV and becomes stress = −virial / volume.
        require: labels that every frame must have. Isolated atoms may lack forces, and frames that are not
            periodic may lack stress.
        name: what the data are, for messages about all of them.

    Raises:
        InputError: a file is missing, empty, damaged or of unknown format; a required label or a key that was
            asked for is not there; a frame has no atoms, or a number in it is not finite or of the wrong shape.
    """
    files = expand(sources)
    raws: list[_Raw] = []
    for file in files:
        format_name = file_format(file)
        moved = format_name in XYZ_FORMATS
        for index, atoms in enumerate(iterate(file, format_name)):
            raws.append(_raw_of(atoms, Origin(str(file), index), moved=moved))
    frames, keys = _label(raws, LabelKeys(energy_key, forces_key, stress_key), require, name)
    digest = hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()
    return FrameSet(frames, keys, tuple(str(file) for file in files), digest)


def frames_from_atoms(
    atoms_list: Iterable[Atoms],
    *,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    stress_key: str = AUTO,
    require: Sequence[Label] = ("energy",),
    name: str = "training data",
) -> FrameSet:
    """Frames from ASE structures in memory, by the rules of :func:`read_frames`; the file is called ``<atoms>``.

    Results of a calculator count only where they belong to the structure as it is now; nothing is calculated.
    The hash is taken over structures and labels.

    Raises:
        InputError: as :func:`read_frames`, or there are no structures.
    """
    raws = [_raw_of(atoms, Origin("<atoms>", i), in_memory=True) for i, atoms in enumerate(atoms_list)]
    if not raws:
        raise InputError(f"{name}: the list of structures is empty; give at least one.")
    frames, keys = _label(raws, LabelKeys(energy_key, forces_key, stress_key), require, name)
    return FrameSet(frames, keys, ("<atoms>",), _content_hash(frames))


def describe_keys(frameset: FrameSet) -> str:
    """One line that says where the labels came from: ``energy from 'REF_energy', forces from …, no stress``."""

    def told(label: Label, key: str | None) -> str:
        if key is None:
            return f"no {label}"
        return f"{label} from the calculator" if key == CALCULATOR else f"{label} from '{key}'"

    return ", ".join(told(label, key) for label, key in zip(LABELS, frameset.keys, strict=True))


def _raw_of(atoms: Atoms, origin: Origin, *, moved: bool = False, in_memory: bool = False) -> _Raw:
    # the raw results, because atoms.get_forces() zeroes the forces of constrained atoms
    results: dict[str, Any] = dict(getattr(atoms.calc, "results", {}))
    stale = bool(in_memory and results and _belongs_elsewhere(atoms))
    if stale:
        results = {}
    arrays = {key: value for key, value in atoms.arrays.items() if key not in _STRUCTURE_ARRAYS}
    named = {key: value for key, value in {**arrays, **atoms.info}.items() if isinstance(key, str)}
    if moved:
        named = {**results, **named}
    return _Raw(atoms, origin, named, results, moved, stale)


def _belongs_elsewhere(atoms: Atoms) -> bool:
    """Whether the calculator's results are those of another structure (moved since, or one calculator for all)."""
    check = getattr(atoms.calc, "check_state", None)
    return check is not None and bool({"positions", "numbers", "cell", "pbc"} & set(check(atoms)))


def _label(
    raws: Sequence[_Raw], asked: LabelKeys, require: Sequence[Label], name: str
) -> tuple[tuple[Frame, ...], LabelKeys]:
    if unknown := set(require) - set(LABELS):
        raise ValueError(f"require: {sorted(unknown)} are not among {list(LABELS)}")
    for raw in raws:
        _check_structure(raw)
    chosen = {
        label: _choose(label, key, raws, label in require, name)
        for label, key in zip(LABELS, asked, strict=True)
    }
    keys = LabelKeys(**chosen)
    for label, key in chosen.items():
        if key is not None:
            _check_complete(label, key, raws, label in require, name)
    return tuple(_frame_of(raw, keys) for raw in raws), keys


# ---- which key ------------------------------------------------------------------------------------------------


def _own(raw: _Raw, label: Label, key: str) -> Any:
    """What a frame holds under exactly this key, or None."""
    if key == CALCULATOR:
        return None if raw.moved else raw.results.get(label)
    return raw.named.get(key)


def _found(raw: _Raw, label: Label, key: str) -> Any:
    """What a frame holds under this key, or under this name in its calculator's results, or None."""
    if key == CALCULATOR:
        return raw.results.get(label)
    value = raw.named.get(key)
    return raw.results.get(key) if value is None else value


def _choose(label: Label, key: str, raws: Sequence[_Raw], required: bool, name: str) -> str | None:
    """The key for the whole set, or None for a label that is not there or not wanted."""
    needed = required and not all(_may_lack(raw, label) for raw in raws)
    if key == NONE:
        if required:
            raise InputError(f"{name}: {label}_key is 'none', but {label} labels are needed; name their key.")
        return None
    if key != AUTO:
        if any(_found(raw, label, key) is not None for raw in raws):
            return key
        if all(_may_lack(raw, label) for raw in raws):
            return None
        raise InputError(
            f"{name} ({_files(raws)}): no frame has {label} under '{key}'; {_listing(raws)} "
            f"Set {label}_key to the right one."
        )
    present = [c for c in CANDIDATES[label] if any(_own(raw, label, c) is not None for raw in raws)]
    if not present:
        if not needed:
            return None
        raise InputError(
            f"{name} ({_files(raws)}): no {label} found under the usual keys; {_listing(raws)} "
            f"Set {label}_key to the right one."
        )
    first, *others = present
    if aside := [repr(other) for other in others if _differs(label, first, other, raws)]:
        warn(
            f"{name}: {label} taken from '{first}'; {', '.join(aside)} with other values left aside. "
            f"Set {label}_key to choose."
        )
    return first


def _differs(label: Label, chosen: str, other: str, raws: Sequence[_Raw]) -> bool:
    """Whether some frame holds both keys with different values, so that the choice matters."""
    for raw in raws:
        ours, theirs = _found(raw, label, chosen), _own(raw, label, other)
        if ours is None or theirs is None or ours is theirs:
            continue
        if not np.array_equal(np.asarray(ours), np.asarray(theirs)):
            return True
    return False


def _may_lack(raw: _Raw, label: Label) -> bool:
    """Forces of an isolated atom are zero and stress of a molecule is undefined: data leave them out."""
    if label == "forces":
        config_type = str(raw.named.get("config_type", "")).replace("_", "").lower()
        return len(raw.atoms) == 1 or config_type == "isolatedatom"
    return label == "stress" and not raw.atoms.pbc.any()


def _check_complete(label: Label, key: str, raws: Sequence[_Raw], required: bool, name: str) -> None:
    missing = [raw for raw in raws if _found(raw, label, key) is None and not _may_lack(raw, label)]
    if not missing:
        return
    if required:
        raise InputError(
            f"{missing[0].origin} has no {label} under '{key}' ({len(missing)} of {len(raws)} frames lack it); "
            f"{_listing(missing[:1])} Remove the frame or set {label}_key."
        )
    warn(f"{name}: {len(missing)} of {len(raws)} frames have no {label} under '{key}', first {missing[0].origin}.")


def _listing(raws: Sequence[_Raw]) -> str:
    """A sentence with the keys that are there, for a message about one that is not."""
    names = sorted({key for raw in raws for key in raw.named} - {"initial_magmoms", "initial_charges", "tags"})
    results = sorted({key for raw in raws if not raw.moved for key in raw.results})
    shown = ", ".join(f"'{key}'" for key in names[:16]) + (", …" if len(names) > 16 else "")
    parts = [f"the keys there are {shown}"] if names else []
    if results:
        parts.append(f"the calculator has {', '.join(results)}")
    if any(raw.stale for raw in raws):
        parts.append("the results of the calculator belong to another structure")
    return (" and ".join(parts) if parts else "there are no labels at all") + "."


def _files(raws: Sequence[_Raw]) -> str:
    files = list(dict.fromkeys(raw.origin.file for raw in raws))
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


# ---- one frame ------------------------------------------------------------------------------------------------


def _check_structure(raw: _Raw) -> None:
    atoms = raw.atoms
    if len(atoms) == 0:
        raise InputError(f"{raw.origin}: has no atoms; remove the frame.")
    if (atoms.numbers < 1).any():
        atom = int(np.argmax(atoms.numbers < 1))
        raise InputError(f"{raw.origin}: atom {atom} has no element (atomic number {atoms.numbers[atom]}); name it.")
    if not np.isfinite(atoms.positions).all():
        atom = int(np.argmax(~np.isfinite(atoms.positions).all(axis=1)))
        raise InputError(f"{raw.origin}: the position of atom {atom} is not finite; mend or remove the frame.")
    if not np.isfinite(atoms.cell.array).all():
        raise InputError(f"{raw.origin}: the cell is not finite; mend or remove the frame.")


def _frame_of(raw: _Raw, keys: LabelKeys) -> Frame:
    atoms = raw.atoms
    energy = _numbers(raw, "energy", keys.energy)
    forces = _numbers(raw, "forces", keys.forces)
    stress = _numbers(raw, "stress", keys.stress)
    return Frame(
        numbers=np.array(atoms.numbers, dtype=np.int64),
        positions=np.array(atoms.positions, dtype=np.float64),
        cell=np.array(atoms.cell.array, dtype=np.float64),
        pbc=np.array(atoms.pbc, dtype=np.bool_),
        energy=None if energy is None else _energy(raw, keys.energy, energy),
        forces=None if forces is None else _forces(raw, keys.forces, forces),
        stress=None if stress is None else _stress(raw, keys.stress, stress),
        origin=raw.origin,
    )


def _numbers(raw: _Raw, label: Label, key: str | None) -> FloatArray | None:
    """The label of a frame as finite real numbers of whatever shape."""
    value = None if key is None else _found(raw, label, key)
    if value is None:
        return None
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.asarray(None)  # ragged lists
    if found.dtype.kind not in "iuf":
        raise InputError(f"{raw.origin}: the {label} under '{key}' is not a number but {str(value)[:40]!r}; mend it.")
    numbers = found.astype(np.float64)
    finite = np.isfinite(numbers)
    if not finite.all():
        bad = numbers[~finite].flat[0]
        atom = f" of atom {int(np.argwhere(~finite)[0, 0])}" if label == "forces" and numbers.ndim == 2 else ""
        raise InputError(
            f"{raw.origin}: the {label}{atom} under '{key}' is {bad}; remove the frame or repeat its calculation."
        )
    return numbers


def _energy(raw: _Raw, key: str | None, values: FloatArray) -> float:
    if values.size != 1:
        raise InputError(
            f"{raw.origin}: the energy under '{key}' should be one number but has {values.size}; "
            "choose the key of the total energy."
        )
    return float(values.reshape(()))


def _forces(raw: _Raw, key: str | None, values: FloatArray) -> FloatArray:
    atoms = len(raw.atoms)
    if values.shape not in {(atoms, 3), (3 * atoms,)}:
        raise InputError(
            f"{raw.origin}: the forces under '{key}' should have shape ({atoms}, 3) but have {values.shape}; "
            "choose the key of the forces or mend the frame."
        )
    return values.reshape(atoms, 3)


def _stress(raw: _Raw, key: str | None, values: FloatArray) -> FloatArray:
    """(3, 3) stress from Voigt order (xx, yy, zz, yz, xz, xy), 9 numbers or a matrix, or from such a virial."""
    if values.shape == (6,):
        matrix = values[_VOIGT]
    elif values.shape in {(9,), (3, 3)}:
        matrix = values.reshape(3, 3)
    else:
        raise InputError(
            f"{raw.origin}: the stress under '{key}' should be 6 or 9 numbers but has shape {values.shape}; mend it."
        )
    if key is None or "virial" not in key.lower():
        return matrix
    volume = abs(float(np.linalg.det(raw.atoms.cell.array)))
    if volume < 1e-6:
        raise InputError(
            f"{raw.origin}: the virial under '{key}' cannot become a stress because the cell has no volume; "
            "give the frame a cell or set stress_key to 'none'."
        )
    return -matrix / volume


def _content_hash(frames: Sequence[Frame]) -> str:
    digest = hashlib.sha256()
    for frame in frames:
        labels = (np.asarray(value, dtype=np.float64) for value in (frame.energy, frame.forces, frame.stress))
        for array in (frame.numbers, frame.positions, frame.cell, frame.pbc, *labels):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
