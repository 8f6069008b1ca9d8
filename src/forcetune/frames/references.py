"""Reference energies (E0): the energy of each element that a model adds up before it learns the rest.

A foundation model carries the E0s of its own level of theory. Data of another level differ from its
predictions by hundreds or thousands of eV, nearly all of it a sum over elements: with the composition matrix
C (frames, elements), E_label − E_model ≈ C ΔE0. Taking that sum out first leaves the fine-tuning what is
really to be learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame, IntArray
from forcetune.frames.store.stored_frames import has_label, list_elements

Mode = Literal["estimate", "model", "isolated", "average", "table"]

BLOCK = 65_536
"""Frames that are solved for at once; of more, blocks are reduced one after another."""

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
        offset_after_mev_per_atom: the same with these E0s; both None where no frame has an energy.
        rank: rank of the composition matrix of the frames.
        n_elements: number of elements in the frames; where ``rank`` is smaller, the data fix only some sums
            of E0s, and the fit is the one of smallest change.
    """

    energies: dict[int, float]
    mode: str
    offset_before_mev_per_atom: float | None
    offset_after_mev_per_atom: float | None
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
    elements = tuple(sorted(model_references))
    if not has_label(frames, "energy"):
        return _without_energies(mode, frames, isolated_frames, model_references, table)
    labelled = _labelled(frames, elements, model_energies)
    present = tuple(z for z, occurs in zip(elements, labelled.occurring, strict=True) if occurs)
    if mode == "estimate":
        energies = _estimate(labelled, model_references)
    elif mode == "average":
        energies = _average(labelled, model_references)
    elif mode == "isolated":
        energies = isolated(isolated_frames, model_references, present)
    elif mode == "table":
        energies = explicit(table, model_references, present)
    else:
        energies = {z: float(model_references[z]) for z in elements}

    shift = np.array([energies[z] - model_references[z] for z in elements])
    atoms = labelled.counts.sum(axis=1, dtype=np.float64)
    residual = labelled.energies - labelled.predicted
    moved = np.concatenate([block @ shift for block, _ in _blocks(labelled.counts, residual)])
    return ReferenceEnergies(
        energies=energies,
        mode=mode,
        offset_before_mev_per_atom=float(np.mean(np.abs(residual) / atoms) * 1e3),
        offset_after_mev_per_atom=float(np.mean(np.abs(residual - moved) / atoms) * 1e3),
        rank=_rank(labelled.counts),
        n_elements=len(present),
    )


def _without_energies(
    mode: str,
    frames: Sequence[Frame],
    isolated_frames: Sequence[Frame],
    model_references: Mapping[int, float],
    table: Mapping[str | int, float] | None,
) -> ReferenceEnergies:
    """For frames with forces alone, which reference energies do not touch: the model's, unless others are given.

    Raises:
        InputError: the mode takes reference energies from the energies of frames, or lacks what it needs.
    """
    if mode in ("estimate", "average"):
        raise InputError("Reference energies: no frame has an energy; give data with energies or keep 'model'.")
    present = list_elements(frames)
    energies = {z: float(energy) for z, energy in sorted(model_references.items())}
    if mode == "isolated":
        energies = isolated(isolated_frames, model_references, present)
    elif mode == "table":
        energies = explicit(table, model_references, present)
    return ReferenceEnergies(energies, mode, None, None, 0, len(present))


def composition_matrix(frames: Sequence[Frame], elements: Sequence[int]) -> FloatArray:
    """How many atoms of each element each frame has, (frames, elements), in the order of ``elements``.

    Raises:
        InputError: a frame holds an element that is not among ``elements``.
    """
    columns = np.asarray(elements, dtype=np.int64)
    matrix = np.zeros((len(frames), len(columns)))
    for row, frame in enumerate(frames):
        matrix[row] = _counts(frame, columns)
    return matrix


def _counts(frame: Frame, columns: IntArray) -> IntArray:
    """(elements,) atoms of each element."""
    counts = np.bincount(frame.numbers, minlength=len(chemical_symbols))[columns]
    if counts.sum() != len(frame):
        unknown = sorted(set(frame.numbers.tolist()) - set(columns.tolist()))
        raise InputError(
            f"{frame.origin}: holds {_symbols(unknown)}, which the model does not know; "
            "remove the frame or choose a model with these elements."
        )
    return counts


def estimate(
    frames: Sequence[Frame],
    model_energies: Sequence[float] | FloatArray,
    model_references: Mapping[int, float],
) -> dict[int, float]:
    """The model's E0s moved by what explains its errors best: E0 = E0_model + ΔE0.

    ΔE0 minimises Σ_frames w ((E_label − E_model − C ΔE0) / atoms)²: each frame counts by its error per atom, so
    large frames do not outweigh small ones, and by the weight w that its file gives its energy. Where compositions do
    not fix every element (rank-deficient C), ΔE0 is the solution of smallest norm; elements that do not occur keep the
    model's E0.

    Args:
        frames: those without an energy are passed over.
        model_energies: (frames,), eV, predicted with the model's own E0s.
        model_references: atomic number → the model's E0, eV.

    Raises:
        InputError: no frame has an energy, or one holds an element that the model does not know.
    """
    return _estimate(_labelled(frames, tuple(sorted(model_references)), model_energies), model_references)


def _estimate(labelled: _Labelled, model_references: Mapping[int, float]) -> dict[int, float]:
    shift = _least_squares(labelled.counts, labelled.energies - labelled.predicted, labelled.weights, per_atom=True)
    return {z: float(model_references[z] + change) for z, change in zip(sorted(model_references), shift, strict=True)}


def average(frames: Sequence[Frame], model_references: Mapping[int, float]) -> dict[int, float]:
    """E0s from the labels alone: least squares of total energies on composition, min ‖E_label − C E0‖².

    Every frame counts alike, whatever its weight, as in mace's ``average``; rank-deficient compositions get the
    solution of smallest norm. Elements that do not occur keep the model's E0.

    Raises:
        InputError: no frame has an energy, or one holds an element that the model does not know.
    """
    return _average(_labelled(frames, tuple(sorted(model_references))), model_references)


def _average(labelled: _Labelled, model_references: Mapping[int, float]) -> dict[int, float]:
    fitted = _least_squares(labelled.counts, labelled.energies, np.ones(len(labelled.energies)), per_atom=False)
    return {
        z: float(value if occurs else model_references[z])
        for z, value, occurs in zip(sorted(model_references), fitted, labelled.occurring, strict=True)
    }


def _blocks(counts: np.ndarray, values: FloatArray) -> Iterator[tuple[FloatArray, FloatArray]]:
    for start in range(0, len(counts), BLOCK):
        yield counts[start : start + BLOCK].astype(np.float64), values[start : start + BLOCK]


def _triangle(counts: np.ndarray, values: FloatArray, divisors: FloatArray) -> FloatArray:
    """R of the QR decomposition of [C | values], block by block, each row over its divisor."""
    triangle = np.zeros((0, counts.shape[1] + 1))
    for (block, block_values), (_, divisor) in zip(_blocks(counts, values), _blocks(counts, divisors), strict=True):
        rows = np.column_stack((block, block_values)) / divisor[:, None]
        triangle = np.asarray(np.linalg.qr(np.concatenate((triangle, rows)), mode="r"), dtype=np.float64)
    return triangle


def _least_squares(counts: np.ndarray, values: FloatArray, weights: FloatArray, *, per_atom: bool) -> FloatArray:
    """x of smallest norm that minimises Σ w (C x − values)², or the same with each row over the atoms of its frame.

    More than :data:`BLOCK` frames are reduced to a triangle first, which has the same solution and singular values.
    """
    atoms = counts.sum(axis=1, dtype=np.float64) if per_atom else np.ones(len(counts))
    roots = np.sqrt(weights)
    if len(counts) <= BLOCK:
        composition = counts.astype(np.float64) / atoms[:, None]
        return np.asarray(
            np.linalg.lstsq(composition * roots[:, None], values / atoms * roots, rcond=None)[0], np.float64
        )
    triangle = _triangle(counts, values, atoms / roots)
    tolerance = np.finfo(np.float64).eps * max(counts.shape)
    return np.asarray(np.linalg.lstsq(triangle[:, :-1], triangle[:, -1], rcond=tolerance)[0], np.float64)


def _rank(counts: np.ndarray) -> int:
    """Of the composition matrix."""
    if len(counts) <= BLOCK:
        return int(np.linalg.matrix_rank(counts.astype(np.float64)))
    triangle = _triangle(counts, np.zeros(len(counts)), np.ones(len(counts)))[:, :-1]
    return int(np.linalg.matrix_rank(triangle, rtol=np.finfo(np.float64).eps * max(counts.shape)))


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
    frame_by_element: dict[int, Frame] = {}
    for frame in isolated_frames:
        if len(frame) != 1 or frame.energy is None:
            raise InputError(f"{frame.origin}: an isolated atom is one atom with an energy; this frame is not.")
        z = int(frame.numbers[0])
        first = frame_by_element.setdefault(z, frame)
        if abs(_energy(first) - frame.energy) > ISOLATED_TOLERANCE:
            raise InputError(
                f"{frame.origin}: isolated {chemical_symbols[z]} has {frame.energy} eV here but "
                f"{first.energy} eV in {first.origin}; keep one of them."
            )
    if missing := sorted(set(needed) - set(frame_by_element)):
        raise InputError(
            f"No isolated atom of {_symbols(missing)} among the data; add a frame of one atom with its "
            "energy for each, or choose reference energies 'estimate'."
        )
    return {
        z: _energy(frame_by_element[z]) if z in frame_by_element else float(energy)
        for z, energy in sorted(model_references.items())
    }


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
        InputError: there is no table, a key is not an element symbol, a value no finite number, an element is named
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
    return {z: values.get(z, float(model_energy)) for z, model_energy in sorted(model_references.items())}


def _atomic_number(key: str | int) -> int:
    """An element from its symbol in any case, its atomic number, or that number as text."""
    text = str(key).strip()
    z = int(text) if text.isdigit() else atomic_numbers.get(text.capitalize(), 0)
    if isinstance(key, bool) or not 0 < z < len(chemical_symbols):
        raise InputError(f"Reference energies: '{key}' is not an element symbol; write a symbol such as C, or 6.")
    return z


class _Labelled(NamedTuple):
    """The frames that have an energy.

    Attributes:
        counts: (frames, elements) atoms of each element.
        energies, predicted: (frames,), eV; of labels and of the model, which are zero where there is none.
        weights: (frames,) of the energies, from the file.
    """

    counts: np.ndarray
    energies: FloatArray
    predicted: FloatArray
    weights: FloatArray

    @property
    def occurring(self) -> list[bool]:
        """(elements,) whether there is an atom of it."""
        return (self.counts.sum(axis=0) > 0).tolist()


def _labelled(
    frames: Sequence[Frame], elements: Sequence[int], model_energies: Sequence[float] | FloatArray | None = None
) -> _Labelled:
    """One pass over the frames, which may be on disk."""
    predicted = np.zeros(len(frames)) if model_energies is None else np.asarray(model_energies, dtype=np.float64)
    if predicted.shape != (len(frames),):
        raise ValueError(f"model_energies: shape {predicted.shape}, expected ({len(frames)},)")
    columns = np.asarray(elements, dtype=np.int64)
    counts = np.zeros((len(frames), len(columns)), dtype=np.uint32)
    energies, weights = np.full(len(frames), np.nan), np.ones(len(frames))
    for row, frame in enumerate(frames):
        if frame.energy is not None:
            counts[row] = _counts(frame, columns)
            energies[row] = frame.energy
            weights[row] = frame.energy_weight
            if not np.isfinite(predicted[row]):
                raise InputError(
                    f"{frame.origin}: the model's energy is not finite; look for atoms on top of each other."
                )
    labelled = ~np.isnan(energies)
    if not labelled.any():
        raise InputError("Reference energies: no frame has an energy; give data with energies or keep 'model'.")
    return _Labelled(counts[labelled], energies[labelled], predicted[labelled], weights[labelled])


def _energy(frame: Frame) -> float:
    assert frame.energy is not None
    return frame.energy


def _symbols(numbers: Sequence[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in numbers)
