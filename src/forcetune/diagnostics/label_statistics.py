"""How labels agree with what a foundation model predicts, in numbers that a few wrong frames cannot move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from forcetune.diagnostics.composition import composition_residual
from forcetune.evaluation.metrics import Predictions
from forcetune.frames.frame import FloatArray, Frame
from forcetune.uncertainty.calibration import rank_correlation

SATURATION = 5.0
"""Vectors longer than so many medians are cut to that length before they are compared."""

STANDS_OUT = 8.0
"""A frame whose largest force is so many times that of most frames says nothing about elements."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Labels against predictions of one quantity.

    Attributes:
        correlation: from −1 to 1; of components for forces and stress, of ranks for energies.
        ratio: typical size of the labels over that of the predictions.
        n_frames: frames compared.
    """

    correlation: float
    ratio: float
    n_frames: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ElementAgreement:
    """Forces on the atoms of one element: label size and error of the model, root mean square in meV/Å."""

    symbol: str
    n_atoms: int
    label_rms: float
    error_rms: float

    @property
    def relative(self) -> float:
        """Error over label size; 1 is what a model that predicts zero has."""
        return self.error_rms / self.label_rms if self.label_rms else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class LabelledPredictions:
    """Frames with their predictions, cut into frames.

    Attributes:
        frames: as predicted for.
        energy, energy_label: (frames,), eV; NaN where there is no label.
        forces, forces_label: per frame (atoms, 3), eV/Å; NaN where there is no label.
        stress, stress_label: (frames, 3, 3), eV/Å³, or None.
    """

    frames: tuple[Frame, ...]
    energy: FloatArray
    energy_label: FloatArray
    forces: list[FloatArray]
    forces_label: list[FloatArray]
    stress: FloatArray | None
    stress_label: FloatArray | None

    @staticmethod
    def split(frames: Sequence[Frame], predictions: Predictions) -> LabelledPredictions:
        """Predictions for all frames, cut into frames."""
        ends = np.cumsum(predictions.atoms)[:-1]
        return LabelledPredictions(
            tuple(frames),
            predictions.energy,
            predictions.energy_label,
            np.split(predictions.forces, ends),
            np.split(predictions.forces_label, ends),
            predictions.stress,
            predictions.stress_label,
        )

    def select(self, indices: Sequence[int]) -> LabelledPredictions:
        """Only these frames."""
        index = np.asarray(indices, dtype=np.int64)
        return LabelledPredictions(
            tuple(self.frames[k] for k in indices),
            self.energy[index],
            self.energy_label[index],
            [self.forces[k] for k in indices],
            [self.forces_label[k] for k in indices],
            None if self.stress is None else self.stress[index],
            None if self.stress_label is None else self.stress_label[index],
        )

    def with_forces(self) -> LabelledPredictions:
        """Frames of several atoms that have force labels, not all of them zero."""
        return self.select(
            [
                k
                for k, label in enumerate(self.forces_label)
                if len(label) > 1 and np.isfinite(label).all() and label.any()
            ]
        )

    def ordinary(self) -> LabelledPredictions:
        """Without frames whose largest force, label or prediction, is far larger than that of most frames."""
        if not self.frames:
            return self
        sizes = np.array(
            [np.nanmax(np.abs([*a.ravel(), *b.ravel()])) for a, b in zip(self.forces_label, self.forces, strict=True)]
        )
        return self.select(np.flatnonzero(sizes <= STANDS_OUT * np.median(sizes)).tolist())

    def with_energy(self) -> LabelledPredictions:
        """Frames of several atoms that have an energy label."""
        return self.select([k for k, e in enumerate(self.energy_label) if np.isfinite(e) and len(self.forces[k]) > 1])

    def with_stress(self) -> LabelledPredictions:
        """Frames that have a stress label."""
        if self.stress is None or self.stress_label is None:
            return self.select([])
        return self.select([k for k, label in enumerate(self.stress_label) if np.isfinite(label).all()])

    def arrays(self) -> dict[str, FloatArray]:
        """Labels and predictions of ordinary frames for plots; energies an atom, moved onto the labels by "
        "composition."""
        ordinary = self.ordinary()
        if not ordinary.frames:
            return {}
        arrays = {
            "forces_element": np.concatenate([frame.numbers for frame in ordinary.frames]),
            "reference/forces": np.concatenate(ordinary.forces_label),
            "before/forces": np.concatenate(ordinary.forces),
        }
        labelled = ordinary.with_energy()
        if len(labelled.frames) >= 3:
            label = labelled.energy_label / np.array([len(frame) for frame in labelled.frames])
            off, *_ = composition_residual(labelled.frames, labelled.energy_label - labelled.energy)
            arrays |= {"reference/energy_per_atom": label, "before/energy_per_atom": label - off}
        return arrays

    def energy_residuals(self) -> tuple[FloatArray, FloatArray]:
        """Labels and predictions with their own composition taken out, (frames,) each, eV an atom."""
        return (
            composition_residual(self.frames, self.energy_label)[0],
            composition_residual(self.frames, self.energy)[0],
        )


def saturated(vectors: FloatArray) -> FloatArray:
    """Vectors (n, 3) in units of their median length, none longer than :data:`SATURATION`."""
    length = np.linalg.norm(vectors, axis=1)
    # half of the atoms may have no force; the others then set the scale
    scale = float(np.median(length[length > 0])) if length.any() else 1.0
    # lengths near the largest float would overflow in a product
    cut = SATURATION * scale / np.maximum(length, SATURATION * scale)
    return vectors * cut[:, None] / scale


def cosine(one: FloatArray, other: FloatArray) -> float:
    """Cosine of the angle between two arrays taken as vectors; 0 where either is zero."""
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float((one * other).sum() / size) if size > 0 else 0.0


def force_agreement(predictions: LabelledPredictions) -> Agreement | None:
    """Of the force labels; None without any."""
    predictions = predictions.with_forces()
    if not predictions.frames:
        return None
    label, model = np.concatenate(predictions.forces_label), np.concatenate(predictions.forces)
    sizes = [float(np.median(np.linalg.norm(vectors, axis=1))) for vectors in (label, model)]
    ratio = sizes[0] / sizes[1] if sizes[1] > 0 else np.inf
    return Agreement(cosine(saturated(label), saturated(model)), ratio, len(predictions.frames))


def energy_agreement(predictions: LabelledPredictions) -> Agreement | None:
    """Of the energy labels after composition; None where that leaves nothing to compare."""
    predictions = predictions.with_energy()
    if len(predictions.frames) < 3:
        return None
    label, model = predictions.energy_residuals()
    sizes = [float(np.median(np.abs(values))) for values in (label, model)]
    if min(sizes) <= 1e-9:
        return None
    return Agreement(rank_correlation(label, model) or 0.0, sizes[0] / sizes[1], len(predictions.frames))


def stress_agreement(predictions: LabelledPredictions) -> Agreement | None:
    """Of the stress labels; None without any."""
    predictions = predictions.with_stress()
    if predictions.stress is None or predictions.stress_label is None or not len(predictions.stress):
        return None
    label, model = predictions.stress_label.reshape(-1, 3), predictions.stress.reshape(-1, 3)
    sizes = [float(np.median(np.linalg.norm(values, axis=1))) for values in (label, model)]
    if min(sizes) <= 0:
        return None
    return Agreement(cosine(saturated(label), saturated(model)), sizes[0] / sizes[1], len(predictions.frames))


def element_agreement(predictions: LabelledPredictions) -> list[ElementAgreement]:
    """Of the forces on every element, ascending by atomic number; frames that stand out by size are left out."""
    predictions = predictions.with_forces().ordinary()
    if not predictions.frames:
        return []
    numbers = np.concatenate([frame.numbers for frame in predictions.frames])
    label, model = np.concatenate(predictions.forces_label), np.concatenate(predictions.forces)

    def rms(vectors: FloatArray) -> float:
        return 1e3 * float(np.sqrt((vectors**2).mean()))

    return [
        ElementAgreement(
            chemical_symbols[z], int((numbers == z).sum()), rms(label[numbers == z]), rms((label - model)[numbers == z])
        )
        for z in np.unique(numbers)
    ]
