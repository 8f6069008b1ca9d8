"""Frames from everything ASE reads, with their labels found, checked and brought to one shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from forcetune.errors import InputError, warn
from forcetune.frames.comment_line import numbers_in
from forcetune.frames.formats import say_conversions
from forcetune.frames.frame import FloatArray, Frame, FrameSet, LabelKeys, Origin
from forcetune.frames.hessians import describe_drift, hessian_matrix
from forcetune.frames.labels import (
    AUTO,
    CALCULATOR,
    LABELS,
    NONE,
    Label,
    RawFrame,
    choose_keys,
    label_under,
    raw_frame,
    stress_tensor,
)
from forcetune.frames.sources import content_hash, expand, file_format
from forcetune.frames.store.chunks import iterate_structures
from forcetune.frames.unread import CHARGE_KEYS, MULTIPLICITY_KEYS, describe_unread, scalar_under
from forcetune.frames.weights import WeightTally, is_left_out, read_weights
from forcetune.frames.xyz import XYZ_FORMATS

_USUAL: tuple[Label, ...] = ("energy", "forces", "stress")


def read_frames(
    sources: str | Path | Sequence[str | Path],
    *,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    stress_key: str = AUTO,
    moments_key: str = NONE,
    spins_key: str = NONE,
    hessian_key: str = AUTO,
    magforces_key: str = NONE,
    require: Sequence[Label] = ("energy",),
    expect: Sequence[Label] = (),
    name: str = "training data",
    type_map: Sequence[str] = (),
    ignored: Sequence[Label] = (),
) -> FrameSet:
    """Read frames and labels from files that ASE reads: extended XYZ, trajectories, databases, …, and from those of
    other programs (:mod:`forcetune.frames.formats`).

    Forces of constrained atoms keep the values of the file: ASE's constraints are not applied. Frames and labels whose
    weight in the file is 0 are left out (:mod:`forcetune.frames.weights`).

    Args:
        sources: a file, a folder of deepmd data, a pattern such as ``"runs/*/vasprun.xml"``, or several of them.
        energy_key: the key of the energy, eV; ``auto`` looks for it (see :mod:`forcetune.frames.labels`),
            ``calculator`` takes the results of an attached calculator, ``none`` leaves the label out.
        forces_key: as above for forces, (atoms, 3), eV/Å.
        stress_key: as above for stress, 6 (Voigt), 9 or (3, 3), eV/Å³; a key with ``virial`` in its name is a
            virial in eV and becomes stress = −virial / volume.
        moments_key: as above for magnetic moments, (atoms, 3) or (atoms,), μB; not looked for by default.
        spins_key: as above for the magnetic state that a spin-aware layer is given, of the same shapes.
        hessian_key: as above for Hessians, eV/Å², of the shapes in :func:`forcetune.frames.hessians.hessian_matrix`.
        magforces_key: as above for magnetic forces −∂E/∂m, eV/μB, of the shapes of moments; not looked for by default.
        require: labels that every frame must have. Isolated atoms may lack forces, and frames that are not
            periodic may lack stress.
        expect: labels that some frame must have, unless their key is ``none``; where one lacks it, it simply does not
            count.
        name: what the data are, for messages about all of them.
        type_map: elements of numbered types, type 0 first, for files that name none (MTP's ``.cfg``).
        ignored: labels that are left out on purpose: no warning says that they are in the files and not read.

    Raises:
        InputError: a file is missing, empty, damaged or of unknown format; a required label or a key that was
            asked for is not there; a frame has no atoms, or a number in it is not finite or of the wrong
            shape.
    """
    files = expand(sources)
    kinds = [(file, file_format(file)) for file in files]
    raws: list[RawFrame] = []
    for file, format_name in kinds:
        moved = format_name in XYZ_FORMATS
        for index, atoms in enumerate(iterate_structures(file, format_name, type_map)):
            raws.append(raw_frame(atoms, Origin(str(file), index), moved=moved))
    say_conversions(kinds)
    asked = LabelKeys(energy_key, forces_key, stress_key, moments_key, spins_key, hessian_key, magforces_key)
    frames, keys = _label(raws, asked, require, name, expect, ignored)
    digest = hashlib.sha256("".join(content_hash(file) for file in files).encode()).hexdigest()
    return FrameSet(frames, keys, tuple(str(file) for file in files), digest)


def frames_from_atoms(
    atoms_list: Iterable[Atoms],
    *,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    stress_key: str = AUTO,
    moments_key: str = NONE,
    spins_key: str = NONE,
    hessian_key: str = AUTO,
    magforces_key: str = NONE,
    require: Sequence[Label] = ("energy",),
    expect: Sequence[Label] = (),
    name: str = "training data",
) -> FrameSet:
    """Frames from ASE structures in memory, by the rules of :func:`read_frames`; their file is ``<atoms>``.

    Results of a calculator count only where they belong to the structure as it is now; nothing is calculated.
    The hash is taken over structures and labels.

    Raises:
        InputError: as :func:`read_frames`, or there are no structures.
    """
    raws = [raw_frame(atoms, Origin("<atoms>", i), in_memory=True) for i, atoms in enumerate(atoms_list)]
    if not raws:
        raise InputError(f"{name}: the list of structures is empty; give at least one.")
    asked = LabelKeys(energy_key, forces_key, stress_key, moments_key, spins_key, hessian_key, magforces_key)
    frames, keys = _label(raws, asked, require, name, expect)
    return FrameSet(frames, keys, ("<atoms>",), _content_hash(frames))


def describe_keys(frameset: FrameSet) -> str:
    """One line that says where the labels came from: ``energy from 'REF_energy', …, no stress``."""

    def describe(label: Label, key: str | None) -> str:
        if key is None:
            return f"no {label}"
        return f"{label} from the calculator" if key == CALCULATOR else f"{label} from '{key}'"

    pairs = zip(LABELS, frameset.keys, strict=True)
    return ", ".join(describe(label, key) for label, key in pairs if key is not None or label in _USUAL)


def _label(
    raws: Sequence[RawFrame],
    asked: LabelKeys,
    require: Sequence[Label],
    name: str,
    expect: Sequence[Label],
    ignored: Sequence[Label] = (),
) -> tuple[tuple[Frame, ...], LabelKeys]:
    tally = WeightTally()
    for raw in raws:
        check_structure(raw)
        tally.add(raw)
    tally.check(name, raws[0].origin.file)
    used = [raw for raw in raws if not is_left_out(raw)]
    keys = choose_keys(used, asked, require, name, expect=expect)
    for text in (tally.sentence(), describe_unread(used, keys, asked, ignored)):
        if text is not None:
            warn(f"{name}: {text}")
    frames = tuple(labelled_frame(raw, keys) for raw in used)
    drift = describe_drift(frames)
    if drift is not None:
        warn(f"{name}: {drift}")
    return frames, keys


def check_structure(raw: RawFrame) -> None:
    """
    Raises:
        InputError: no atoms, an atom without an element, or a position or cell that is not finite.
    """
    atoms = raw.atoms
    if len(atoms) == 0:
        raise InputError(f"{raw.origin}: has no atoms; remove the frame.")
    if (atoms.numbers < 1).any():
        atom = int(np.argmax(atoms.numbers < 1))
        raise InputError(f"{raw.origin}: atom {atom} has no element (atomic number {atoms.numbers[atom]}); name it.")
    if (atoms.numbers >= len(chemical_symbols)).any():
        atom = int(np.argmax(atoms.numbers >= len(chemical_symbols)))
        raise InputError(
            f"{raw.origin}: atom {atom} has the atomic number {atoms.numbers[atom]}; there is no such one."
        )
    if not np.isfinite(atoms.positions).all():
        atom = int(np.argmax(~np.isfinite(atoms.positions).all(axis=1)))
        raise InputError(f"{raw.origin}: the position of atom {atom} is not finite; fix or remove the frame.")
    if not np.isfinite(atoms.cell.array).all():
        raise InputError(f"{raw.origin}: the cell is not finite; fix or remove the frame.")


def labelled_frame(raw: RawFrame, keys: LabelKeys) -> Frame:
    """The frame with the labels that stand under these keys, but for those with weight 0.

    Raises:
        InputError: a label is not finite or of the wrong shape, or a weight is no number.
    """
    atoms = raw.atoms
    weights = read_weights(raw, keys)
    energy = _numbers(raw, "energy", keys.energy if weights.energy else None)
    forces = _numbers(raw, "forces", keys.forces if weights.forces else None)
    stress = _numbers(raw, "stress", keys.stress if weights.stress else None)
    moments = _numbers(raw, "moments", keys.moments)
    spins = _numbers(raw, "spins", keys.spins)
    magforces = _numbers(raw, "magforces", keys.magforces)
    hessian = _numbers(raw, "hessian", keys.hessian if weights.hessian else None)
    return Frame(
        numbers=np.array(atoms.numbers, dtype=np.int64),
        positions=np.array(atoms.positions, dtype=np.float64),
        cell=np.array(atoms.cell.array, dtype=np.float64),
        pbc=np.array(atoms.pbc, dtype=np.bool_),
        energy=None if energy is None else _energy(raw, keys.energy, energy),
        forces=None if forces is None else _forces(raw, keys.forces, forces),
        stress=None if stress is None else stress_tensor(raw, str(keys.stress), stress),
        origin=raw.origin,
        moments=None if moments is None else _vectors(raw, "moments", keys.moments, moments),
        spins=None if spins is None else _vectors(raw, "spins", keys.spins, spins),
        magforces=None if magforces is None else _vectors(raw, "magforces", keys.magforces, magforces),
        hessian=None if hessian is None else hessian_matrix(raw, str(keys.hessian), hessian),
        energy_weight=weights.energy,
        forces_weight=weights.forces,
        stress_weight=weights.stress,
        moments_weight=weights.moments,
        hessian_weight=weights.hessian if hessian is not None else 1.0,
        charge=scalar_under(raw, CHARGE_KEYS),
        multiplicity=scalar_under(raw, MULTIPLICITY_KEYS),
    )


def _numbers(raw: RawFrame, label: Label, key: str | None) -> FloatArray | None:
    """The label of a frame as finite real numbers of whatever shape."""
    value = None if key is None else label_under(raw, label, key)
    if value is None:
        return None
    if label == "stress" and isinstance(value, str):
        value = numbers_in(value) or value  # nested rows that ASE leaves as a text
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)  # ragged lists
    if array.dtype.kind not in "iuf":
        raise InputError(f"{raw.origin}: the {label} under '{key}' is not a number but {str(value)[:40]!r}; fix it.")
    numbers = array.astype(np.float64)
    finite = np.isfinite(numbers)
    if not finite.all():
        bad = numbers[~finite].flat[0]
        atom = f" of atom {int(np.argwhere(~finite)[0, 0])}" if label == "forces" and numbers.ndim == 2 else ""
        raise InputError(
            f"{raw.origin}: the {label}{atom} under '{key}' is {bad}; remove the frame or repeat its calculation."
        )
    return numbers


def _energy(raw: RawFrame, key: str | None, values: FloatArray) -> float:
    if values.size != 1:
        raise InputError(
            f"{raw.origin}: the energy under '{key}' should be one number but has {values.size}; "
            "choose the key of the total energy."
        )
    return float(values.reshape(()))


def _forces(raw: RawFrame, key: str | None, values: FloatArray) -> FloatArray:
    atoms = len(raw.atoms)
    if values.shape not in {(atoms, 3), (3 * atoms,)}:
        raise InputError(
            f"{raw.origin}: the forces under '{key}' should have shape ({atoms}, 3) but have {values.shape}; "
            "choose the key of the forces or fix the frame."
        )
    return values.reshape(atoms, 3)


def _vectors(raw: RawFrame, label: Label, key: str | None, values: FloatArray) -> FloatArray:
    """(atoms, 3) from vectors, or from numbers along z as collinear calculations give them."""
    atoms = len(raw.atoms)
    if values.shape == (atoms,):
        return np.stack((np.zeros(atoms), np.zeros(atoms), values), axis=1)
    if values.shape != (atoms, 3):
        raise InputError(
            f"{raw.origin}: the {label} under '{key}' should have shape ({atoms}, 3) or ({atoms},) but have "
            f"{values.shape}; choose the key of the {label} or fix the frame."
        )
    return values


def _content_hash(frames: Sequence[Frame]) -> str:
    digest = hashlib.sha256()
    for frame in frames:
        labels = (np.asarray(value, dtype=np.float64) for value in (frame.energy, frame.forces, frame.stress))
        more = (value for value in (frame.moments, frame.spins, frame.magforces, frame.hessian) if value is not None)
        weights = np.array([frame.energy_weight, frame.forces_weight, frame.stress_weight, frame.moments_weight])
        if (weights != 1).any():
            more = (*more, weights)
        for array in (frame.numbers, frame.positions, frame.cell, frame.pbc, *labels, *more):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
