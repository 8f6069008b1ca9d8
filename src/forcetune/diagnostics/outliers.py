"""Single frames whose labels stand out against what a foundation model predicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forcetune.diagnostics.composition import composition_residual
from forcetune.diagnostics.diagnosis import AGREES, FEWEST
from forcetune.diagnostics.finding import Finding, in_frames
from forcetune.diagnostics.label_statistics import LabelledPredictions, cosine, saturated
from forcetune.diagnostics.shape import hash_bonding
from forcetune.frames.frame import FloatArray, Frame

ENERGY_OUTLIER = (9.0, 0.03)
"""Robust standard deviations, and eV an atom, by which label minus model must lie off."""
FORCES_OUTLIER = 6.0
"""Robust standard deviations by which the correlation of a frame's forces must lie below that of most frames."""
GAP = (6.0, 0.02)
"""Robust standard deviations, and eV an atom, that separate two groups of frames of different settings."""
GROUP = (3, 0.03)
"""Frames, and share of all frames, that make a group and not outliers."""


def find_outliers(predictions: LabelledPredictions) -> list[Finding]:
    """Energies and forces of single frames, and groups of frames, that differ from the model as no others do."""
    return _energies(predictions.with_energy()) + _forces(predictions.with_forces())


def _energies(predictions: LabelledPredictions) -> list[Finding]:
    if len(predictions.frames) < FEWEST:
        return []
    off, _, _ = composition_residual(predictions.frames, predictions.energy_label - predictions.energy)
    levels = _levels(predictions, off)
    if levels:
        return levels
    spread = 1.4826 * float(np.median(np.abs(off)))
    bound = max(ENERGY_OUTLIER[0] * spread, ENERGY_OUTLIER[1])
    outside: list[Frame] = [frame for frame, size in zip(predictions.frames, np.abs(off), strict=True) if size > bound]
    text = (
        f"The energy is off by more than {1e3 * bound:,.0f} meV/atom against what the model and the other frames say; "
        "repeat its calculation or remove the frame."
    )
    return in_frames("energy-outlier", "warning", text, outside)


def _levels(predictions: LabelledPredictions, off: FloatArray) -> list[Finding]:
    """Frames of one bonding in two groups of energies; isomers may differ by what the model does not know."""
    by_bonding: dict[int, list[int]] = {}
    for k, frame in enumerate(predictions.frames):
        by_bonding.setdefault(hash_bonding(frame), []).append(k)
    findings = []
    for members in by_bonding.values():
        groups = _groups(off[members]) if len(members) >= FEWEST else None
        if groups is None:
            continue
        gap, smaller = groups
        inside = [predictions.frames[members[k]] for k in smaller]
        outside = [predictions.frames[k] for place, k in enumerate(members) if place not in set(smaller)]
        cause = _states(inside, outside) or (
            "settings, units or molecules are mixed; calculate all with the same settings."
        )
        text = (
            f"Energies fall into two groups {1e3 * gap:,.0f} meV/atom apart that structures do not explain, these "
            f"frames in the smaller one: {cause}"
        )
        findings += in_frames("energy-levels", "warning", text, inside)
    return findings


def _states(inside: Sequence[Frame], outside: Sequence[Frame]) -> str | None:
    """How two groups of frames differ in the charge and spin that their file gives; None where they do not."""
    parts = []
    for name, field in (("charge", "charge"), ("spin", "multiplicity")):
        ours, theirs = ({getattr(frame, field) for frame in frames} - {None} for frames in (inside, outside))
        if ours and theirs and not ours & theirs:
            listed = [", ".join(f"{value:g}" for value in sorted(values)) for values in (ours, theirs)]
            parts.append(f"{name} {listed[0]} (the others {listed[1]})")
    if not parts:
        return None
    return (
        f"they have {' and '.join(parts)} in the file, which the model does not know; train on one charge and spin "
        "only."
    )


def _groups(off: FloatArray) -> tuple[float, list[int]] | None:
    """The gap between two groups of values, and the members of the smaller one; None where there is one group."""
    order = np.argsort(off)
    values = off[order]
    least = max(GROUP[0], round(GROUP[1] * len(values)))
    inner = np.diff(values)[least - 1 : len(values) - least]
    if not len(inner):
        return None
    cut = int(inner.argmax()) + least
    gap = float(inner.max())
    spread = max(float(np.median(np.abs(part - np.median(part)))) for part in (values[:cut], values[cut:]))
    if gap < max(GAP[0] * 1.4826 * spread, GAP[1]):
        return None
    smaller = order[:cut] if cut <= len(order) - cut else order[cut:]
    return gap, sorted(smaller.tolist())


def _forces(predictions: LabelledPredictions) -> list[Finding]:
    """Frames whose forces do not follow the model although those of most frames do."""
    if len(predictions.frames) < FEWEST:
        return []
    likeness = np.array(
        [cosine(saturated(a), saturated(b)) for a, b in zip(predictions.forces_label, predictions.forces, strict=True)]
    )
    middle = float(np.median(likeness))
    if middle < AGREES + 0.1:
        return []
    # correlations crowd towards 1; their inverse hyperbolic tangents spread evenly (Fisher)
    off = np.arctanh(min(middle, 0.999)) - np.arctanh(np.clip(likeness, -0.999, 0.999))
    spread = 1.4826 * float(np.median(np.abs(off - np.median(off))))
    # of a few atoms near equilibrium the forces are mostly the difference between two theories
    size = np.array([np.sqrt((label**2).mean()) for label in predictions.forces_label])
    strange = (off > FORCES_OUTLIER * max(spread, 0.05)) & (size > 0.3 * np.median(size))
    strange &= np.array([len(frame) >= 4 for frame in predictions.frames])
    text = (
        "The forces do not follow the model's, while those of most frames do (correlation "
        f"{middle:.2f}); look "
        "for forces of another frame, another order of atoms or a failed calculation."
    )
    return in_frames("forces-outlier", "warning", text, [predictions.frames[k] for k in np.flatnonzero(strange)])
