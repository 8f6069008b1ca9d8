"""Labels that contradict themselves: constant, zero, repeated, rounded, too large, or without balance."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from forcetune.diagnostics.composition import composition_residual
from forcetune.diagnostics.finding import Finding, Severity, in_frames, in_set
from forcetune.diagnostics.shape import Shape, by_composition
from forcetune.frames.frame import FloatArray, Frame

NET_SHARE = 0.1
"""Of √Σ|F|²; a net force above it is no numerical noise."""
NET_LEAST = 0.1
"""eV/Å (eV for torques); below it a net force does no harm, however small the forces are."""
OVERFLOW_FORCE = 1e4
"""eV/Å; no calculation of atoms that are apart gives more."""
THOMAS_FERMI = 20.9
"""eV; the energy of a neutral atom is −20.9 Z^(7/3) eV in Thomas-Fermi theory, a third too deep for light atoms."""
OUTLIER_FORCE = (8.0, 30.0)
"""A force is an outlier above so many times the median of largest forces, and above so many eV/Å."""
COARSE_ENERGY = (1e-3, 5e-5)
"""Energies are rounded if their step is at least so many eV, and so many eV an atom."""
COARSE_FORCE = 0.01
ENERGY_OUTLIER = (12.0, 0.2)
"""Robust standard deviations, and eV an atom, by which an energy must lie off to be an outlier without a model."""
REPEATED_BY_CHANCE = 4.0
"""So many times as often as rounding makes them so, energies of different structures may be equal."""
UNEXPLAINED = 2.0
"""eV an atom; composition alone explains energies of one level of theory better than this."""


def check_labels(frames: Sequence[Frame], shapes: Sequence[Shape | None]) -> list[Finding]:
    """All examinations of labels that need no model.

    Args:
        frames: of one set.
        shapes: of each frame; None where it cannot be measured.
    """
    findings = _check_energies(frames, shapes) + _check_forces(frames, shapes) + _check_balance(frames, shapes)
    return findings + _check_sizes(frames) + _check_composition(frames)


def _check_energies(frames: Sequence[Frame], shapes: Sequence[Shape | None]) -> list[Finding]:
    labelled = [k for k, frame in enumerate(frames) if frame.energy is not None and len(frame) > 1]
    energies = np.array([frames[k].energy for k in labelled], dtype=np.float64)
    if len(labelled) < 5:
        return []
    repeated = _repeated(frames, shapes, labelled, lambda frame: frame.energy)
    if len(np.unique(energies)) == 1 and repeated:
        text = (
            f"All {len(energies)} energies are {energies[0]:.8g} eV although the structures differ: choose another key."
        )
        return [in_set("energy-constant", "error", text, [frames[k] for k in labelled])]
    findings = []
    step = _step(energies)
    atoms = float(np.median([len(frames[k]) for k in labelled]))
    if step >= COARSE_ENERGY[0] and step / atoms >= COARSE_ENERGY[1]:
        text = (
            f"Energies are rounded to {1e3 * step:.3g} meV, {1e3 * step / atoms:.2g} meV/atom, which no model can "
            "learn through; write them with all digits (single precision has 7)."
        )
        findings.append(in_set("energy-rounded", "warning", text, [frames[k] for k in labelled]))
    elif len(repeated) >= 2 + REPEATED_BY_CHANCE * _chance_repeats([frames[k] for k in labelled], step):
        findings += in_frames(
            "energy-repeated",
            "warning",
            "The energy is that of an earlier frame to the last digit although the structure differs; look whether "
            "results of one calculation were written to several frames.",
            [frames[k] for k in repeated],
        )
    return findings


def _check_forces(frames: Sequence[Frame], shapes: Sequence[Shape | None]) -> list[Finding]:
    labelled = [k for k, frame in enumerate(frames) if frame.forces is not None and len(frame) > 1]
    moving = [k for k in labelled if _forces(frames[k]).any()]
    # atoms out of each other's reach feel no forces
    still = [k for k in labelled if k not in set(moving) and ((shape := shapes[k]) is None or shape.n_edges > 0)]
    molecules = [k for k in still if (shape := shapes[k]) is not None and shape.is_molecule]
    findings = []
    if labelled and not moving and len(molecules) >= 2:
        text = "All forces are zero; they were not calculated, or not written. Name another key with data.forces_key."
        findings.append(in_set("forces-zero", "error", text, [frames[k] for k in labelled]))
    else:
        findings += in_frames(
            "forces-zero",
            "warning",
            "All forces of the frame are exactly zero; unless symmetry makes them so, they were not calculated: remove "
            "the frame.",
            [frames[k] for k in still],
        )
    findings += in_frames(
        "forces-repeated",
        "error",
        "The forces are those of an earlier frame to the last digit although the structure differs; results of one "
        "calculation were written to several frames, write them again.",
        [frames[k] for k in _repeated(frames, shapes, moving, lambda frame: _forces(frame).tobytes())],
    )
    if len(moving) >= 5:
        step = _step(np.concatenate([_forces(frames[k]).ravel() for k in moving]))
        if step >= COARSE_FORCE:
            text = f"Forces are rounded to {1e3 * step:.3g} meV/Å; write them with more digits."
            findings.append(in_set("forces-rounded", "warning", text, [frames[k] for k in moving]))
    return findings


def _repeated(
    frames: Sequence[Frame],
    shapes: Sequence[Shape | None],
    members: Sequence[int],
    label: Callable[[Frame], Hashable],
) -> list[int]:
    """Frames whose label is that of an earlier one although their structure is another."""
    first: dict[Hashable, int] = {}
    findings = []
    for k in members:
        earlier = first.setdefault((len(frames[k]), label(frames[k])), k)
        one, other = shapes[earlier], shapes[k]
        if earlier != k and one is not None and other is not None and _is_other(one.descriptor, other.descriptor):
            findings.append(k)
    return findings


def _chance_repeats(frames: Sequence[Frame], step: float) -> float:
    """Pairs of equal energies that are expected among frames of one composition whose energies have this step.

    For a normal distribution of width s two values fall into one step with the probability step / (2 √π s).
    """
    if step == 0:  # energies as they were computed do not meet by chance
        return 0.0
    expected = 0.0
    for members in by_composition(frames).values():
        energies = np.array([frames[k].energy for k in members], dtype=np.float64)
        width = max(1.4826 * float(np.median(np.abs(energies - np.median(energies)))), step)
        expected += len(members) * (len(members) - 1) / 2 * step / (2 * np.sqrt(np.pi) * width)
    return expected


def _is_other(one: FloatArray, other: FloatArray) -> bool:
    # atoms out of each other's reach have nothing to compare
    return one.shape != other.shape or float(np.abs(one - other).max(initial=0.0)) > 1e-3


def _step(values: FloatArray) -> float:
    """The step in which numbers were written: 10⁻ᵈ for d decimals, or that of single precision; 0 if neither shows."""
    values = values[np.abs(values) < 1e9]  # an overflow is a whole number
    scale = float(np.abs(values).max(initial=0.0))
    if scale == 0 or not np.isfinite(scale):
        return 0.0
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    coarse = float(np.spacing(np.float32(scale))) if np.array_equal(single.astype(np.float64), values) else 0.0
    for decimals in range(6):
        scaled = values * 10.0**decimals
        if (np.abs(scaled - np.round(scaled)) < 1e-11 * np.abs(scaled) + 1e-7).all():
            return max(coarse, 10.0**-decimals)
    return coarse


def _check_balance(frames: Sequence[Frame], shapes: Sequence[Shape | None]) -> list[Finding]:
    """Net force everywhere, and net torque of molecules."""
    pushed, zeroed, turned = [], [], []
    for frame, shape in zip(frames, shapes, strict=True):
        if frame.forces is None or len(frame) == 1:
            continue
        if _unbalanced(frame.forces):
            (pushed if frame.forces.any(axis=1).all() else zeroed).append(frame)
        elif shape is not None and shape.is_molecule:
            arms = frame.positions - frame.positions.mean(axis=0)
            if _unbalanced(np.cross(arms, frame.forces).astype(np.float64)):
                turned.append(frame)
    findings = in_frames(
        "forces-sum",
        "warning",
        "The forces do not add up to zero; unless there is an external field or substrate, atoms, signs or digits are "
        "wrong or missing.",
        pushed,
    )
    findings += in_frames(
        "forces-of-fixed-atoms",
        "warning",
        "The forces do not add up to zero and some are exactly zero: those of constrained atoms were probably set to "
        "zero; write the forces before constraints.",
        zeroed,
    )
    findings += in_frames(
        "forces-torque",
        "warning",
        "The forces turn the molecule as a whole, which energy conservation forbids: positions and forces have "
        "different orientations or orders of atoms, or there is an external field.",
        turned,
    )
    return findings


def _unbalanced(vectors: FloatArray) -> bool:
    """Whether (atoms, 3) vectors that should add up to zero do not."""
    net = float(np.linalg.norm(vectors.sum(axis=0)))
    return net > NET_LEAST and net > NET_SHARE * float(np.linalg.norm(vectors))


def _check_sizes(frames: Sequence[Frame]) -> list[Finding]:
    """Numbers that no calculation gives, and forces far larger than all others."""
    with_forces = [frame for frame in frames if frame.forces is not None and len(frame) > 1]
    largest = np.array([np.linalg.norm(_forces(frame), axis=1).max() for frame in with_forces])
    findings = in_frames(
        "forces-overflow",
        "error",
        f"A force is larger than {OVERFLOW_FORCE:g} eV/Å: an overflow, a failed calculation or atoms on top of each "
        "other; remove the frame.",
        [frame for frame, size in zip(with_forces, largest, strict=True) if size > OVERFLOW_FORCE],
    )
    if len(with_forces) >= 5:
        usual = float(np.median(largest))
        bound = max(OUTLIER_FORCE[0] * usual, OUTLIER_FORCE[1])
        outside = [f for f, size in zip(with_forces, largest, strict=True) if bound < size <= OVERFLOW_FORCE]
        text = (
            f"A force is larger than {bound:.0f} eV/Å while the largest of most frames is {usual:.1f} eV/Å; remove the "
            "frame unless such structures are wanted."
        )
        findings += in_frames("forces-outlier", "warning", text, outside)
    findings += _check_depth(frames)
    return findings


def _check_depth(frames: Sequence[Frame]) -> list[Finding]:
    """Total energies deeper than all electrons of all atoms can account for."""
    deep: list[Frame] = []
    labelled = [frame for frame in frames if frame.energy is not None]
    for frame in labelled:
        assert frame.energy is not None
        bound = 2 * THOMAS_FERMI * float((frame.numbers.astype(np.float64) ** (7 / 3)).sum()) + 10.0 * len(frame)
        if abs(frame.energy) > bound:
            deep.append(frame)
    severity: Severity = "error"
    if len(deep) > 0.5 * len(labelled):
        text = (
            "Total energies are more than twice those of all electrons together, so that they cannot be in eV; convert "
            "them (1 Hartree = 27.2114 eV, 1 kcal/mol = 0.0433641 eV, 1 kJ/mol = 0.0103643 eV)."
        )
        return [in_set("energy-unit", severity, text, deep)]
    text = (
        "The energy is more than twice that of all electrons together: an overflow or another unit; remove the frame."
    )
    return in_frames("energy-overflow", severity, text, deep)


def _check_composition(frames: Sequence[Frame]) -> list[Finding]:
    """Energies against the sum over elements that explains them best."""
    labelled = [frame for frame in frames if frame.energy is not None]
    if len(labelled) < 5:
        return []
    residual, rank, elements = composition_residual(labelled, np.array([frame.energy for frame in labelled]))
    spread = 1.4826 * float(np.median(np.abs(residual)))
    bound = max(ENERGY_OUTLIER[0] * spread, ENERGY_OUTLIER[1])
    text = (
        f"The energy lies more than {1e3 * bound:,.0f} meV/atom off what its composition and the other frames say; "
        "remove the frame or repeat its calculation."
    )
    outside = [frame for frame, off in zip(labelled, residual, strict=True) if abs(off) > bound]
    findings = in_frames("energy-outlier", "warning", text, outside)
    if spread > UNEXPLAINED and len(labelled) >= rank + 5:
        text = (
            f"Composition leaves {spread:.1f} eV/atom of the energies unexplained; frames and energies may be in "
            "different orders, or frames of different settings or units are mixed."
        )
        findings.append(in_set("energy-unexplained", "warning", text, labelled))
    if rank < elements:
        text = (
            f"The compositions fix only {rank} of {elements} reference energies; fine within these compositions, but "
            "add others if the model is to compare different ones."
        )
        findings.append(in_set("composition-rank", "note", text, labelled))
    return findings


def _forces(frame: Frame) -> FloatArray:
    assert frame.forces is not None
    return frame.forces
