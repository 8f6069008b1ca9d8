"""Reference energies (E0): the energy of each element that a model adds up before it learns the rest.

A foundation model carries the E0s of its own level of theory. Data of another level differ from its
predictions by hundreds or thousands of eV, nearly all of it a sum over elements: with the composition matrix
C (frames, elements), E_label − E_model ≈ C ΔE0. Taking that sum out first leaves the fine-tuning what is
really to be learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame

Mode = Literal["estimate", "model", "isolated", "average", "table"]

ISOLATED_TOLERANCE = 1e-3
"""eV; two isolated atoms of one element that differ by more are a contradiction."""


@dataclass(frozen=True)
class ReferenceEnergies:
    """Reference energies, and how far they take the model from the labels.

    Attributes:
        energies: atomic number → E0, eV, for every element of the model.
        mode: how they were found.
        offset_before_mev_per_atom: mean over frames of |E_label − E_model| / atoms with the model's own E0s,
            meV.
        offset_after_mev_per_atom: the same with these E0s.
        rank: rank of the composition matrix of the frames.
        n_elements: number of elements in the frames; where ``rank`` is smaller, the data fix only some sums
            of E0s, and the fit is the one of smallest change.
    """

    energies: dict[int, float]
    mode: str
    offset_before_mev_per_atom: float
    offset_after_mev_per_atom: float
    rank: int
    n_elements: int


def reference_energies(
    mode: Mode | str,
    frames: Sequence[Frame],
    isolated_frames: Sequence[Frame],
    model_energies: Sequence[float] | FloatArray,
    model_references: Mapping[int, float],
    table: Mapping[str | int, float] | None = None,
) -> ReferenceEnergies:
    """Find reference energies for the elements of ``model_references``.

    Elements of the model that the data do not fix keep the model's E0.

    Args:
        mode: ``estimate`` (:func:`estimate`), ``model`` (keep the model's), ``isolated`` (:func:`isolated`),
            ``average`` (:func:`average`) or ``table`` (:func:`explicit`).
        frames: molecules and crystals; those without an energy are passed over.
        isolated_frames: frames of one atom, see :func:`forcetune.frames.splits.separate_isolated`.
        model_energies: (frames,), eV, what the model predicts for ``frames`` with its own E0s.
        model_references: atomic number → the model's E0, eV.
        table: symbol or atomic number → E0, eV, for mode ``table``.

    Raises:
        InputError: no frame has an energy, the data hold an element that the model does not know, the mode is
            unknown, or it lacks what it needs.
    """
    if mode not in get_args(Mode):
        raise InputError(f"Reference energies '{mode}': choose one of {', '.join(get_args(Mode))}.")
    labelled, predicted = _labelled(frames, model_energies)
    elements = tuple(sorted(model_references))
    composition = composition_matrix(labelled, elements)
    present = tuple(z for z, atoms_of in zip(elements, composition.sum(axis=0), strict=True) if atoms_of)
    if mode == "estimate":
        energies = estimate(labelled, predicted, model_references)
    elif mode == "average":
        energies = average(labelled, model_references)
    elif mode == "isolated":
        energies = isolated(isolated_frames, model_references, present)
    elif mode == "table":
        energies = explicit(table, model_references, present)
    else:
        energies = {z: float(model_references[z]) for z in elements}

    shift = np.array([energies[z] - model_references[z] for z in elements])
    atoms = composition.sum(axis=1)
    residual = _energies(labelled) - predicted
    return ReferenceEnergies(
        energies=energies,
        mode=mode,
        offset_before_mev_per_atom=float(np.mean(np.abs(residual) / atoms) * 1e3),
        offset_after_mev_per_atom=float(np.mean(np.abs(residual - composition @ shift) / atoms) * 1e3),
        rank=int(np.linalg.matrix_rank(composition)),
        n_elements=len(present),
    )


def composition_matrix(frames: Sequence[Frame], elements: Sequence[int]) -> FloatArray:
    """How many atoms of each element each frame has, (frames, elements), in the order of ``elements``.

    Raises:
        InputError: a frame holds an element that is not among ``elements``.
    """
    columns = np.asarray(elements, dtype=np.int64)
    matrix = np.zeros((len(frames), len(columns)))
    for row, frame in enumerate(frames):
        counts = np.bincount(frame.numbers, minlength=len(chemical_symbols))
        matrix[row] = counts[columns]
        if matrix[row].sum() != len(frame):
            unknown = sorted(set(frame.numbers.tolist()) - set(columns.tolist()))
            raise InputError(
                f"{frame.origin}: holds {_symbols(unknown)}, which the model does not know; "
                "remove the frame or choose a model with these elements."
            )
    return matrix


def estimate(
    frames: Sequence[Frame],
    model_energies: Sequence[float] | FloatArray,
    model_references: Mapping[int, float],
) -> dict[int, float]:
    """The model's E0s moved by what explains its errors best: E0 = E0_model + ΔE0.

    ΔE0 minimises Σ_frames ((E_label − E_model − C ΔE0) / atoms)²: each frame counts by its error per atom, so
    large frames do not outweigh small ones. Where compositions do not fix every element (rank-deficient C),
    ΔE0 is the solution of smallest norm; elements that do not occur keep the model's E0.

    Args:
        frames: those without an energy are passed over.
        model_energies: (frames,), eV, predicted with the model's own E0s.
        model_references: atomic number → the model's E0, eV.

    Raises:
        InputError: no frame has an energy, or one holds an element that the model does not know.
    """
    labelled, predicted = _labelled(frames, model_energies)
    elements = tuple(sorted(model_references))
    composition = composition_matrix(labelled, elements)
    atoms = composition.sum(axis=1)
    residual = _energies(labelled) - predicted
    shift, *_ = np.linalg.lstsq(composition / atoms[:, None], residual / atoms, rcond=None)
    return {z: float(model_references[z] + change) for z, change in zip(elements, shift, strict=True)}


def average(frames: Sequence[Frame], model_references: Mapping[int, float]) -> dict[int, float]:
    """E0s from the labels alone: least squares of total energies on composition, min ‖E_label − C E0‖².

    Every frame counts alike, as in mace's ``average``; rank-deficient compositions get the solution of
    smallest norm. Elements that do not occur keep the model's E0.

    Raises:
        InputError: no frame has an energy, or one holds an element that the model does not know.
    """
    labelled = _with_energy(frames)
    elements = tuple(sorted(model_references))
    composition = composition_matrix(labelled, elements)
    fitted, *_ = np.linalg.lstsq(composition, _energies(labelled), rcond=None)
    return {
        z: float(value if atoms_of else model_references[z])
        for z, value, atoms_of in zip(elements, fitted, composition.sum(axis=0), strict=True)
    }


def isolated(
    isolated_frames: Sequence[Frame], model_references: Mapping[int, float], needed: Sequence[int]
) -> dict[int, float]:
    """E0s from the energies of isolated atoms; elements of the model that have none keep the model's E0.

    Args:
        isolated_frames: frames of one atom; elements that the model does not know are passed over.
        model_references: atomic number → the model's E0, eV.
        needed: atomic numbers that must have an isolated atom: those of the data.

    Raises:
        InputError: an element of ``needed`` has no isolated atom, or an element has two that disagree.
    """
    found: dict[int, Frame] = {}
    for frame in isolated_frames:
        if len(frame) != 1 or frame.energy is None:
            raise InputError(f"{frame.origin}: an isolated atom is one atom with an energy; this frame is not.")
        z = int(frame.numbers[0])
        first = found.setdefault(z, frame)
        if abs(_energy(first) - frame.energy) > ISOLATED_TOLERANCE:
            raise InputError(
                f"{frame.origin}: isolated {chemical_symbols[z]} has {frame.energy} eV here but "
                f"{first.energy} eV in {first.origin}; keep one of them."
            )
    if missing := sorted(set(needed) - set(found)):
        raise InputError(
            f"No isolated atom of {_symbols(missing)} among the data; add a frame of one atom with its "
            "energy for each, or choose reference energies 'estimate'."
        )
    return {z: _energy(found[z]) if z in found else float(own) for z, own in sorted(model_references.items())}


def explicit(
    table: Mapping[str | int, float] | None, model_references: Mapping[int, float], needed: Sequence[int]
) -> dict[int, float]:
    """E0s from a table by symbol or atomic number, eV; elements of the model not in it keep the model's E0.

    Args:
        table: for example ``{"H": -13.57, 6: -1026.85}``; elements that the model does not know are passed
            over.
        model_references: atomic number → the model's E0, eV.
        needed: atomic numbers that the table must have: those of the data.

    Raises:
        InputError: there is no table, a key is no element, a value no finite number, an element is named
            twice with different values, or an element of ``needed`` is missing.
    """
    if not table:
        raise InputError("Reference energies 'table': no table was given; give an energy in eV for each element.")
    values: dict[int, float] = {}
    for key, energy in table.items():
        z = _atomic_number(key)
        if isinstance(energy, bool) or not isinstance(energy, int | float | np.number) or not math.isfinite(energy):
            raise InputError(f"Reference energies: the value of {key} is {energy!r}; give a number in eV.")
        if values.setdefault(z, float(energy)) != float(energy):
            raise InputError(f"Reference energies: {chemical_symbols[z]} is given twice with different values.")
    if missing := sorted(set(needed) - set(values)):
        raise InputError(f"Reference energies: the table has none for {_symbols(missing)}; add them in eV.")
    return {z: values.get(z, float(own)) for z, own in sorted(model_references.items())}


def _atomic_number(key: str | int) -> int:
    """An element from its symbol in any case, its atomic number, or that number as text."""
    text = str(key).strip()
    z = int(text) if text.isdigit() else atomic_numbers.get(text.capitalize(), 0)
    if isinstance(key, bool) or not 0 < z < len(chemical_symbols):
        raise InputError(f"Reference energies: '{key}' is no element; write a symbol such as C, or 6.")
    return z


def _with_energy(frames: Sequence[Frame]) -> list[Frame]:
    labelled = [frame for frame in frames if frame.energy is not None]
    if not labelled:
        raise InputError("Reference energies: no frame has an energy; give data with energies or keep 'model'.")
    return labelled


def _labelled(frames: Sequence[Frame], model_energies: Sequence[float] | FloatArray) -> tuple[list[Frame], FloatArray]:
    """The frames with an energy, and what the model predicts for them."""
    predicted = np.asarray(model_energies, dtype=np.float64)
    if predicted.shape != (len(frames),):
        raise ValueError(f"model_energies: shape {predicted.shape}, expected ({len(frames)},)")
    kept = np.array([frame.energy is not None for frame in frames], dtype=bool)
    labelled = _with_energy(frames)
    predicted = predicted[kept]
    if not np.isfinite(predicted).all():
        frame = labelled[int(np.argmax(~np.isfinite(predicted)))]
        raise InputError(f"{frame.origin}: the model's energy is not finite; look for atoms on top of each other.")
    return labelled, predicted


def _energy(frame: Frame) -> float:
    assert frame.energy is not None
    return frame.energy


def _energies(frames: Sequence[Frame]) -> FloatArray:
    return np.array([_energy(frame) for frame in frames], dtype=np.float64)


def _symbols(numbers: Sequence[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in numbers)
