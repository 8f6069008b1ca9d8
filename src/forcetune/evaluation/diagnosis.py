"""What a foundation model's predictions say about a whole set of labels: sign, unit, order.

An error is only what undoing it would mend: labels that then agree with the model. A model that knows nothing about
these structures agrees with nothing, and is told as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from forcetune.evaluation.agreement import (
    Agreement,
    Compared,
    element_agreement,
    energy_agreement,
    force_agreement,
    stress_agreement,
)
from forcetune.evaluation.shuffles import Mismatch, find_mismatch, pair_correlation, same_order
from forcetune.evaluation.units import ENERGY, FORCES, STRESS, Unit, candidates, is_usual, named
from forcetune.frames.doctor.finding import Finding, Severity, in_set
from forcetune.frames.frame import Frame

FEWEST = 10
"""Frames that a verdict on a whole set needs."""
AGREES = 0.6
"""Correlation of forces from which the model speaks for or against a unit or sign."""
VANISHED = 0.3
SURE_FRAMES = 100
"""Frames from which energies without any correlation are no accident."""
ELEMENT_ATOMS = 20
STRANGE_ATOM = 2.2
"""Error over size of the forces on one atom, over many frames, beyond what a poor model has."""


def diagnose(found: Compared) -> list[Finding]:
    """Everything that predictions for a set of frames say about its labels as a whole."""
    forces = force_agreement(found)
    findings = _check_forces(found.with_forces(), forces)
    if not findings and forces is not None and forces.n_frames >= FEWEST and forces.correlation > VANISHED:
        findings += _check_elements(found) or _check_atoms(found.with_forces())
    trusted = forces is None or forces.correlation >= AGREES or forces.correlation <= -AGREES
    findings += _check_energies(found.with_energy(), forces, trusted)
    return findings + _check_stress(found.with_stress())


def _check_forces(found: Compared, agreement: Agreement | None) -> list[Finding]:
    if agreement is None or agreement.n_frames < FEWEST:
        return []
    frames = found.frames
    if agreement.correlation <= -AGREES:
        text = (
            f"Forces point against the model's (correlation {_two(agreement.correlation)}): they are gradients; "
            "multiply them by −1."
        )
        return [in_set("forces-sign", "error", text, frames), *_check_force_unit(found, agreement)]
    if agreement.correlation >= AGREES:
        return _check_force_unit(found, agreement)
    if agreement.correlation > VANISHED:
        return []
    mismatch = find_mismatch(found)
    if mismatch is not None:
        return [_told(mismatch, agreement, found)]
    return [_unrelated(found, agreement)]


def _told(mismatch: Mismatch, agreement: Agreement, found: Compared) -> Finding:
    before, after = _two(agreement.correlation), _two(mismatch.correlation)
    if mismatch.kind == "rotation":
        text = (
            f"Forces agree with the model only when all of them are rotated (correlation {before}, then {after}): "
            "positions and forces have different axes; take both in one orientation."
        )
        return in_set("forces-rotated", "error", text, found.frames)
    if mismatch.kind == "frames":
        text = (
            f"Forces agree with the model's for other frames ({mismatch.detail}; correlation {before}, then {after}): "
            "write structures and forces in one order."
        )
        return in_set("forces-of-other-frames", "error", text, found.frames)
    text = (
        f"Forces agree with the model's for other atoms ({mismatch.detail}; correlation {before}, then {after}): write "
        "atoms and forces in one order."
    )
    return in_set("forces-shuffled", "error", text, found.frames)


def _unrelated(found: Compared, agreement: Agreement) -> Finding:
    if agreement.ratio < 0.25:
        text = (
            f"The model's forces are {1 / agreement.ratio:.0f} times larger than the labels and unrelated to them: "
            "elements, positions or cell are probably not what was calculated; else choose a model that knows such "
            "structures."
        )
        return in_set("structures-implausible", "warning", text, found.frames)
    text = (
        f"Forces have nothing to do with the model's (correlation {_two(agreement.correlation)}): labels, elements or "
        "positions are wrong, or the model does not know this chemistry; compare with another model."
    )
    return in_set("forces-unrelated", "warning", text, found.frames)


def _check_force_unit(found: Compared, agreement: Agreement) -> list[Finding]:
    near = candidates(agreement.ratio, FORCES, 1.35)
    severity: Severity = "error" if near else "warning"
    if is_usual(agreement.ratio):
        # eV/Bohr lies within what a soft or stiff model may do, so that only a close match is told, and as a doubt
        if not candidates(agreement.ratio, FORCES, 1.12) or abs(agreement.correlation) < 0.85:
            return []
        severity = "warning"
    text = f"Forces are {_times(agreement.ratio)} the model's, as if they were " + (
        f"in {named(near)}; convert them to eV/Å." if near else "in another unit; convert them to eV/Å."
    )
    return [in_set("forces-unit", severity, text, found.frames)]


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio >= 1 else f"1/{1 / ratio:.3g} of"


def _check_energies(found: Compared, forces: Agreement | None, trusted: bool) -> list[Finding]:
    agreement = energy_agreement(found)
    if agreement is None or agreement.n_frames < FEWEST or not trusted:
        return []
    bound = max(0.3, 3 / math.sqrt(agreement.n_frames))
    if agreement.correlation <= -max(0.4, bound):
        text = (
            f"Energies fall where the model's rise (rank correlation {_two(agreement.correlation)}): they have the "
            "wrong sign; multiply them by −1."
        )
        return [in_set("energy-sign", "error", text, found.frames)]
    if agreement.correlation >= bound:
        return _check_energy_unit(found, agreement, forces)
    return _check_energy_order(found, agreement, forces)


def _check_energy_unit(found: Compared, agreement: Agreement, forces: Agreement | None) -> list[Finding]:
    """Without forces it is a doubt only: along a scan of one coordinate a model may be wrong by any factor."""
    if is_usual(agreement.ratio) or (forces is None and agreement.n_frames < 3 * FEWEST):
        return []
    atoms = float(np.median([len(frame) for frame in found.frames]))
    near = candidates(agreement.ratio, (*ENERGY, Unit("eV divided by the number of atoms", 1 / atoms)), 1.6)
    text = f"Energy differences are {_times(agreement.ratio)} the model's, as if they were " + (
        f"in {named(near)}; convert energies to eV for the whole frame." if near else "in another unit; give eV."
    )
    return [in_set("energy-unit", "error" if near and forces is not None else "warning", text, found.frames)]


def _check_energy_order(found: Compared, agreement: Agreement, forces: Agreement | None) -> list[Finding]:
    """Energies that do not follow the model's although the forces do."""
    if forces is None or forces.correlation < AGREES or agreement.n_frames < 3 * FEWEST:
        return []
    both = set(found.with_forces().frames)
    pairs = found.select([k for k, frame in enumerate(found.frames) if frame in both])
    followed = pair_correlation(pairs) if is_usual(forces.ratio) else None
    bound = 2 / math.sqrt(agreement.n_frames)
    if agreement.correlation >= bound or (followed is not None and followed >= bound):
        return []
    told = "" if followed is None else f" and {_two(followed)} with what the forces say"
    text = (
        f"Forces agree with the model, but energies do not (rank correlation {_two(agreement.correlation)}{told}): "
        "energies and structures are in different orders or of different calculations; write them anew."
    )
    severity: Severity = "error" if agreement.n_frames >= SURE_FRAMES and followed is not None else "warning"
    return [in_set("energy-shuffled", severity, text, found.frames)]


def _check_stress(found: Compared) -> list[Finding]:
    agreement = stress_agreement(found)
    if agreement is None or agreement.n_frames < FEWEST or abs(agreement.correlation) < AGREES:
        return []
    findings = []
    if agreement.correlation < 0:
        text = (
            f"Stress has the sign against the model's (correlation {_two(agreement.correlation)}); positive is tension "
            "here, as in ASE: multiply it by −1."
        )
        findings.append(in_set("stress-sign", "error", text, found.frames))
    if is_usual(agreement.ratio):
        return findings
    volume = float(np.median([abs(np.linalg.det(frame.cell)) for frame in found.frames]))
    near = candidates(agreement.ratio, (*STRESS, Unit("eV (a virial; stress is −virial / volume)", volume)), 1.6)
    text = f"Stress is {_times(agreement.ratio)} the model's, as if it were " + (
        f"in {named(near)}; convert it to eV/Å³." if near else "in another unit; convert it to eV/Å³."
    )
    return [*findings, in_set("stress-unit", "error" if near else "warning", text, found.frames)]


def _check_elements(found: Compared) -> list[Finding]:
    far = [row for row in element_agreement(found) if row.n_atoms >= ELEMENT_ATOMS and row.relative > 1]
    if not far:
        return []
    named_rows = ", ".join(f"{row.symbol} ({100 * row.relative:.0f} %)" for row in far)
    text = (
        f"The model's force errors are larger than the forces on {named_rows}: is the element right? If so, the "
        "model does not know it in such surroundings; give enough frames of it, and test on it."
    )
    return [in_set("element-unknown-to-model", "warning", text, _having(found, [row.symbol for row in far]))]


def _having(found: Compared, symbols: Sequence[str]) -> list[Frame]:
    wanted = [atomic_numbers[symbol] for symbol in symbols]
    return [frame for frame in found.with_forces().frames if np.isin(frame.numbers, wanted).any()]


def _check_atoms(found: Compared) -> list[Finding]:
    """Atoms that the model sees otherwise in every frame, as where one element was written for another."""
    findings = []
    for members in same_order(found):
        group = found.select(members)
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
