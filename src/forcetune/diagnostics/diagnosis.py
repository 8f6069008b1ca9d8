"""What a foundation model's predictions say about a whole set of labels: sign, unit, order.

An error is only what undoing it would fix: labels that then agree with the model. A model that knows nothing about
these structures agrees with nothing, and is reported as such; what it says about energies is believed as far as it
agrees with the forces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from forcetune.diagnostics.finding import Finding, Severity, in_set
from forcetune.diagnostics.label_mismatch import Mismatch, find_mismatch, pair_correlation, same_order
from forcetune.diagnostics.label_statistics import (
    Agreement,
    LabelledPredictions,
    element_agreement,
    energy_agreement,
    force_agreement,
)
from forcetune.diagnostics.stress import check_stress
from forcetune.diagnostics.units import ENERGY, FORCES, Unit, candidates, is_usual, named, times, two
from forcetune.frames.frame import Frame

FEWEST = 10
"""Frames that a verdict on a whole set needs."""
AGREES = 0.6
"""Correlation of forces from which the model speaks for or against a unit or sign."""
PLAIN = (3, 0.8)
"""Fewer frames, and the correlation of their forces, that show a sign or unit plainly."""
SURE = 0.85
"""Correlation of forces from which the model speaks about energies: liquid water has right energies that a model with
0.68 does not follow at all."""
UNSURE_RATIO = 10.0
"""Below :data:`SURE` energies may be so many times too large or small without being in another unit."""
VANISHED = 0.3
SURE_FRAMES = 100
"""Frames from which energies without any correlation are no accident."""
ELEMENT_ATOMS = 20
STRANGE_ATOM = 2.2
"""Error over size of the forces on one atom, over many frames, beyond what a poor model has."""


def diagnose(predictions: LabelledPredictions) -> list[Finding]:
    """Everything that predictions for a set of frames say about its labels as a whole."""
    forces = force_agreement(predictions)
    findings = _check_forces(predictions.with_forces(), forces)
    if not findings and forces is not None and forces.n_frames >= FEWEST and forces.correlation > VANISHED:
        findings += _check_elements(predictions) or _check_atoms(predictions.with_forces())
    findings += _check_energies(predictions.with_energy(), forces)
    return findings + check_stress(predictions.with_stress(), forces)


def _check_forces(predictions: LabelledPredictions, agreement: Agreement | None) -> list[Finding]:
    if agreement is None or not _decides(agreement):
        return []
    frames = predictions.frames
    if agreement.correlation <= -AGREES:
        text = (
            f"Forces point against the model's (correlation {two(agreement.correlation)}): they are gradients; "
            "multiply them by −1."
        )
        return [in_set("forces-sign", "error", text, frames), *_check_force_unit(predictions, agreement)]
    if agreement.correlation >= AGREES:
        return _check_force_unit(predictions, agreement)
    if agreement.correlation > VANISHED:
        return []
    mismatch = find_mismatch(predictions)
    if mismatch is not None:
        return [_describe_mismatch(mismatch, agreement, predictions)]
    return [_unrelated(predictions, agreement)]


def _decides(agreement: Agreement) -> bool:
    """Whether a verdict on a whole set can rest on these frames."""
    few, plain = PLAIN
    return agreement.n_frames >= FEWEST or (agreement.n_frames >= few and abs(agreement.correlation) >= plain)


def _describe_mismatch(mismatch: Mismatch, agreement: Agreement, predictions: LabelledPredictions) -> Finding:
    before, after = two(agreement.correlation), two(mismatch.correlation)
    if mismatch.kind == "rotation":
        text = (
            f"Forces agree with the model only when all of them are rotated (correlation {before}, then {after}): "
            "positions and forces have different axes; take both in one orientation."
        )
        return in_set("forces-rotated", "error", text, predictions.frames)
    if mismatch.kind == "frames":
        text = (
            f"Forces agree with the model's for other frames ({mismatch.detail}; correlation {before}, then {after}): "
            "write structures and forces in one order."
        )
        return in_set("forces-of-other-frames", "error", text, predictions.frames)
    text = (
        f"Forces agree with the model's for other atoms ({mismatch.detail}; correlation {before}, then {after}): write "
        "atoms and forces in one order."
    )
    return in_set("forces-shuffled", "error", text, predictions.frames)


def _unrelated(predictions: LabelledPredictions, agreement: Agreement) -> Finding:
    if agreement.ratio < 0.25:
        text = (
            f"The model's forces are {1 / agreement.ratio:.0f} times larger than the labels and unrelated to them: "
            "elements, positions or cell are probably not what was calculated; else choose a model that knows such "
            "structures."
        )
        return in_set("structures-implausible", "warning", text, predictions.frames)
    text = (
        f"Forces have nothing to do with the model's (correlation {two(agreement.correlation)}): labels, elements or "
        "positions are wrong, or the model does not know this chemistry; compare with another model."
    )
    return in_set("forces-unrelated", "warning", text, predictions.frames)


def _check_force_unit(predictions: LabelledPredictions, agreement: Agreement) -> list[Finding]:
    near = candidates(agreement.ratio, FORCES, 1.35)
    severity: Severity = "error" if near else "warning"
    if is_usual(agreement.ratio):
        # eV/Bohr lies within what a soft or stiff model may do, so that only a close match is reported, as a doubt
        if not candidates(agreement.ratio, FORCES, 1.12) or abs(agreement.correlation) < 0.85:
            return []
        severity = "warning"
    text = f"Forces are {times(agreement.ratio)} the model's, as if they were " + (
        f"in {named(near)}; convert them to eV/Å." if near else "in another unit; convert them to eV/Å."
    )
    return [in_set("forces-unit", severity, text, predictions.frames)]


def _check_energies(predictions: LabelledPredictions, forces: Agreement | None) -> list[Finding]:
    agreement = energy_agreement(predictions)
    if agreement is None or agreement.n_frames < FEWEST:
        return []
    if forces is not None and abs(forces.correlation) < AGREES:
        return []
    bound = max(0.3, 3 / math.sqrt(agreement.n_frames))
    if agreement.correlation <= -max(0.4, bound):
        return _check_energy_sign(predictions, agreement, forces)
    if agreement.correlation >= bound:
        return _check_energy_unit(predictions, agreement, forces)
    return _check_energy_order(predictions, agreement, forces)


def _is_sure(forces: Agreement | None) -> bool:
    return forces is not None and abs(forces.correlation) >= SURE


def _followed(predictions: LabelledPredictions, forces: Agreement | None) -> float | None:
    """How label energies follow label forces from frame to frame; None where these cannot say."""
    if forces is None or forces.correlation < AGREES or not is_usual(forces.ratio):
        return None
    both = set(predictions.with_forces().frames)
    return pair_correlation(predictions.select([k for k, frame in enumerate(predictions.frames) if frame in both]))


def _check_energy_sign(
    predictions: LabelledPredictions, agreement: Agreement, forces: Agreement | None
) -> list[Finding]:
    """Energies that fall where the model's rise; where the model is weak, the label forces must say so, too."""
    if not _is_sure(forces):
        followed = _followed(predictions, forces)
        against = 2 / math.sqrt(agreement.n_frames)
        if forces is not None and (followed is None or followed > -against):
            return []
    text = (
        f"Energies fall where the model's rise (rank correlation {two(agreement.correlation)}): they have the "
        "wrong sign; multiply them by −1."
    )
    return [in_set("energy-sign", "warning" if forces is None else "error", text, predictions.frames)]


def _check_energy_unit(
    predictions: LabelledPredictions, agreement: Agreement, forces: Agreement | None
) -> list[Finding]:
    """Without forces it is a doubt only: along a scan of one coordinate a model may be wrong by any factor."""
    if is_usual(agreement.ratio) or (forces is None and agreement.n_frames < 3 * FEWEST):
        return []
    if forces is not None and not _is_sure(forces) and 1 / UNSURE_RATIO < agreement.ratio < UNSURE_RATIO:
        return []
    atoms = float(np.median([len(frame) for frame in predictions.frames]))
    near = candidates(agreement.ratio, (*ENERGY, Unit("eV divided by the number of atoms", 1 / atoms)), 1.6)
    text = f"Energy differences are {times(agreement.ratio)} the model's, as if they were " + (
        f"in {named(near)}; convert energies to eV for the whole frame." if near else "in another unit; give eV."
    )
    if _is_unexplained(predictions, agreement, forces):
        text += " Or they depend on what the model does not know, such as magnetic moments."
        return [in_set("energy-unit", "warning", text, predictions.frames)]
    return [in_set("energy-unit", "error" if near and forces is not None else "warning", text, predictions.frames)]


def _is_unexplained(predictions: LabelledPredictions, agreement: Agreement, forces: Agreement | None) -> bool:
    """Whether positions alone do not explain the energies, as the model's energies and the label forces say."""
    followed = _followed(predictions, forces)
    return agreement.correlation < SURE and followed is not None and followed < AGREES


def _check_energy_order(
    predictions: LabelledPredictions, agreement: Agreement, forces: Agreement | None
) -> list[Finding]:
    """Energies that do not follow the model's although the forces do."""
    if forces is None or forces.correlation < SURE or agreement.n_frames < 3 * FEWEST:
        return []
    followed = _followed(predictions, forces)
    bound = 2 / math.sqrt(agreement.n_frames)
    if agreement.correlation >= bound or (followed is not None and followed >= bound):
        return []
    following = "" if followed is None else f" and {two(followed)} with what the forces say"
    text = (
        f"Forces agree with the model, but energies do not (rank correlation {two(agreement.correlation)}{following}): "
        "energies and structures are in different orders or of different calculations; write them again."
    )
    severity: Severity = "error" if agreement.n_frames >= SURE_FRAMES and followed is not None else "warning"
    return [in_set("energy-shuffled", severity, text, predictions.frames)]


def _check_elements(predictions: LabelledPredictions) -> list[Finding]:
    far = [row for row in element_agreement(predictions) if row.n_atoms >= ELEMENT_ATOMS and row.relative > 1]
    if not far:
        return []
    named_rows = ", ".join(f"{row.symbol} ({100 * row.relative:.0f} %)" for row in far)
    text = (
        f"The model's force errors are larger than the forces on {named_rows}: is the element right? If so, the "
        "model does not know it in such surroundings; give enough frames of it, and test on it."
    )
    return [in_set("element-unknown-to-model", "warning", text, _having(predictions, [row.symbol for row in far]))]


def _having(predictions: LabelledPredictions, symbols: Sequence[str]) -> list[Frame]:
    wanted = [atomic_numbers[symbol] for symbol in symbols]
    return [frame for frame in predictions.with_forces().frames if np.isin(frame.numbers, wanted).any()]


def _check_atoms(predictions: LabelledPredictions) -> list[Finding]:
    """Atoms that the model sees otherwise in every frame, as where one element was written for another."""
    findings = []
    for members in same_order(predictions):
        group = predictions.select(members)
        label, model = np.stack(group.forces_label), np.stack(group.forces)
        # medians over frames, so that a broken frame does not speak for all
        size, error = (np.median((values**2).mean(axis=2), axis=0) for values in (label, label - model))
        strange = np.flatnonzero(error > STRANGE_ATOM**2 * np.maximum(size, 1e-12))
        if not len(strange):
            continue
        atoms = ", ".join(f"{k} ({chemical_symbols[group.frames[0].numbers[k]]})" for k in strange[:4])
        text = (
            "The model's force errors are far larger than the forces on atoms "
            f"{atoms}{' …' if len(strange) > 4 else ''}: are these and their neighbours the right elements?"
        )
        findings.append(in_set("atoms-unknown-to-model", "warning", text, group.frames))
    return findings
