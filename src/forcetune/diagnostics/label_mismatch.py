"""Forces that belong to other atoms, other frames or another orientation; energies that do not belong to the forces.

Each suspicion is confirmed only where undoing it brings labels and model together. How well a search for the best match
does by chance is measured on the negated labels, which no rearrangement brings together with the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from forcetune.diagnostics.label_statistics import LabelledPredictions, cosine, saturated
from forcetune.frames.frame import FloatArray
from forcetune.uncertainty.calibration import rank_correlation

RESTORED = 0.6
"""Correlation from which a suspicion is confirmed."""
LEAD = 0.05
SIGNIFICANT = 8.0
"""By so much, and so many standard errors, matches must be better than those of negated labels."""
PAIR = 0.8
"""Correlation of a frame's forces with the model's of another frame that is no chance."""
NEAREST = 3


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A confirmed suspicion: its kind (``atoms``, ``frames``, ``rotation``), the correlation it restores, and more."""

    kind: str
    correlation: float
    detail: str = ""


def find_mismatch(predictions: LabelledPredictions) -> Mismatch | None:
    """What brings force labels and model together, None if nothing does.

    Args:
        predictions: frames with force labels.
    """
    label = _cut(saturated(np.concatenate(predictions.forces_label)), predictions)
    model = _cut(saturated(np.concatenate(predictions.forces)), predictions)
    rotation = _rotated(np.concatenate(label), np.concatenate(model))
    if rotation >= RESTORED:
        return Mismatch("rotation", rotation)
    return _of_other_frames(predictions, label, model) or _of_other_atoms(predictions, label, model)


def _cut(vectors: FloatArray, predictions: LabelledPredictions) -> list[FloatArray]:
    return np.split(vectors, np.cumsum([len(frame) for frame in predictions.frames])[:-1])


def _rotated(label: FloatArray, model: FloatArray) -> float:
    """Correlation after the one rotation or reflection of all labels that fits best."""
    u, _, vt = np.linalg.svd(label.T @ model)
    return cosine(label @ (u @ vt), model)


def same_order(predictions: LabelledPredictions) -> list[list[int]]:
    """Frames with the same elements in the same order, in groups of ten or more."""
    groups: dict[bytes, list[int]] = {}
    for k, frame in enumerate(predictions.frames):
        groups.setdefault(frame.numbers.tobytes(), []).append(k)
    return [members for members in groups.values() if len(members) >= 10]


def _of_other_frames(
    predictions: LabelledPredictions, label: list[FloatArray], model: list[FloatArray]
) -> Mismatch | None:
    matched = by_chance = total = 0
    best: list[float] = []
    steps: list[int] = []
    for members in same_order(predictions):
        if len(predictions.frames[members[0]]) < 8:
            continue  # the forces of so few atoms resemble others by chance
        ours = _unit(np.stack([label[k].ravel() for k in members]))
        theirs = _unit(np.stack([model[k].ravel() for k in members]))
        likeness = ours @ theirs.T
        np.fill_diagonal(likeness, 0.0)
        places = likeness.argmax(axis=1)
        sizes = likeness.max(axis=1)
        matched += int((sizes > PAIR).sum())
        by_chance += int((-likeness.min(axis=1) > PAIR).sum())
        total += len(members)
        best += sizes[sizes > PAIR].tolist()
        origins = [predictions.frames[k].origin for k in members]
        steps += [origins[places[i]].index - origins[i].index for i in np.flatnonzero(sizes > PAIR)]
    if total == 0 or matched < max(3, 0.05 * total) or by_chance > 0.2 * matched:
        return None
    values, counts = np.unique(steps, return_counts=True)
    common = int(values[counts.argmax()])
    if counts.max() > 0.5 * len(steps):
        detail = f"those of the frame {abs(common)} {'later' if common > 0 else 'earlier'}"
    else:
        detail = "those of other frames without a common step"
    return Mismatch("frames", float(np.mean(best)), detail)


def _unit(rows: FloatArray) -> FloatArray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)


def _of_other_atoms(
    predictions: LabelledPredictions, label: list[FloatArray], model: list[FloatArray]
) -> Mismatch | None:
    for members in same_order(predictions):
        # one order for all frames leaves no room for chance
        gain = np.einsum("kax,kbx->ab", np.stack([label[k] for k in members]), np.stack([model[k] for k in members]))
        rows, columns = linear_sum_assignment(-gain)
        ordered = cosine(
            np.concatenate([label[k][rows] for k in members]), np.concatenate([model[k][columns] for k in members])
        )
        if ordered >= RESTORED and (rows != columns).any():
            return Mismatch("atoms", ordered, "in the same wrong order in every frame")
    straight = np.array([_assigned(ours, theirs) for ours, theirs in zip(label, model, strict=True)])
    lead = straight - np.array([_assigned(-ours, theirs) for ours, theirs in zip(label, model, strict=True)])
    error = max(float(lead.std()) / np.sqrt(len(lead)), 1e-6)
    if straight.mean() >= RESTORED and lead.mean() >= LEAD and lead.mean() >= SIGNIFICANT * error:
        return Mismatch("atoms", float(straight.mean()), "in a different wrong order in each frame")
    return None


def _assigned(label: FloatArray, model: FloatArray) -> float:
    """Correlation when a frame's forces (atoms, 3) may be assigned to its atoms again."""
    rows, columns = linear_sum_assignment(-(label @ model.T))
    return cosine(label[rows], model[columns])


def pair_correlation(predictions: LabelledPredictions) -> float | None:
    """How energy differences of similar frames follow the forces between them, as a rank correlation.

    For two frames of one molecule, the second turned onto the first, E₂ − E₁ is expected to be the model's difference
    plus −½ (δF₁ + δF₂)·(x₂ − x₁) with δF the force labels minus the model's: the trapezoidal rule for what the model
    lacks, exact where that is harmonic. So the label forces speak for the label energies, and the model only helps.

    Args:
        predictions: frames with energy and force labels.

    Returns:
        None where no ten frames have the same atoms in the same order.
    """
    expected, seen = [], []
    for members in same_order(predictions):
        one = predictions.select(members[:200])
        positions = np.stack([frame.positions - frame.positions.mean(axis=0) for frame in one.frames])
        lacking = np.stack(one.forces_label) - np.stack(one.forces)
        turn = _turns(positions)
        moved = np.einsum("jax,ijxy->ijay", positions, turn) - positions[:, None]
        apart = (moved**2).sum(axis=(-1, -2))
        np.fill_diagonal(apart, np.inf)
        first = np.repeat(np.arange(len(apart)), NEAREST)
        second = np.argsort(apart, axis=1)[:, :NEAREST].ravel()
        turned = np.einsum("pax,pxy->pay", lacking[second], turn[first, second])
        work = -0.5 * ((turned + lacking[first]) * moved[first, second]).sum(axis=(-1, -2))
        expected.append(one.energy[second] - one.energy[first] + work)
        seen.append(one.energy_label[second] - one.energy_label[first])
    if not expected:
        return None
    return rank_correlation(np.concatenate(seen), np.concatenate(expected)) or 0.0


def _turns(positions: FloatArray) -> FloatArray:
    """(frames, frames, 3, 3) rotations R that bring frame j onto frame i as x_j @ R (Kabsch)."""
    u, _, vt = np.linalg.svd(np.einsum("jax,iay->ijxy", positions, positions))
    u = u.copy()
    u[..., :, 2] *= np.sign(np.linalg.det(u @ vt))[..., None]
    return u @ vt
