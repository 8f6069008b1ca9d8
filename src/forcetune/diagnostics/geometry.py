"""Cells, distances and units of length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forcetune.diagnostics.finding import Finding, in_frames, in_set
from forcetune.diagnostics.shape import SMALLEST_VOLUME, Shape, cell_problem, is_dense
from forcetune.frames.frame import Frame

COLLAPSED = 0.2
"""Å; two atoms nearer than this are one atom written twice."""
TOO_NEAR = 0.5
"""Of the sum of covalent radii; nearer than this is no bond but a collision."""
BOHR_RANGE = (1.65, 2.2)
"""Distances over covalent radii when Bohr are read as Å: 1.89 times too long."""
SHORT_RANGE = (0.4, 0.62)
"""The same when Å are taken for Bohr and converted: 0.53 times too short."""
DENSE_CELL = 4.0
"""Å³ an atom; diamond has 5.7."""
_NOBLE = (2, 10, 18, 36, 54, 86)


def check_cells(frames: Sequence[Frame], cutoff: float | None) -> list[Finding]:
    """Cells that are missing, singular, tiny, left-handed, or at odds with the periodic directions.

    Args:
        frames: any.
        cutoff: of the model, Å; None without one.
    """
    problems = [cell_problem(frame) for frame in frames]

    def having(problem: str) -> list[Frame]:
        return [frame for frame, frame_problem in zip(frames, problems, strict=True) if frame_problem == problem]

    sound = [frame for frame, frame_problem in zip(frames, problems, strict=True) if frame_problem is None]
    periodic = [frame for frame in sound if frame.pbc.all()]
    crowded = [f for f in periodic if abs(float(np.linalg.det(f.cell))) / len(f) < DENSE_CELL]
    findings = in_frames(
        "cell-missing",
        "error",
        "Periodic, but a lattice vector is zero; give the frame its cell or set pbc to F F F.",
        having("missing"),
    )
    findings += in_frames(
        "cell-singular",
        "error",
        "Periodic, but the lattice vectors lie in one plane, so that the cell has no volume; fix the cell.",
        having("singular"),
    )
    findings += in_frames(
        "cell-tiny",
        "error",
        f"The cell has less than {SMALLEST_VOLUME:g} Å³ for an atom; is it in another unit, or is pbc set for a "
        "molecule without a box?",
        having("tiny"),
    )
    findings += in_frames(
        "cell-tiny",
        "warning",
        f"The cell has less than {DENSE_CELL:g} Å³ for an atom, denser than diamond; is the cell that of these atoms, "
        "in Å?",
        crowded,
    )
    findings += in_frames(
        "cell-left-handed",
        "note",
        "The lattice vectors are left-handed; this is allowed and changes nothing.",
        [frame for frame in periodic if np.linalg.det(frame.cell) < 0],
    )
    findings += in_frames(
        "pbc-missing",
        "warning",
        "Atoms fill a cell, but pbc is F F F, so that the cell is ignored; set pbc if this is a crystal or a liquid.",
        [frame for frame in sound if not frame.pbc.any() and len(frame) > 1 and is_dense(frame)],
    )
    if cutoff is not None:
        findings += in_frames(
            "cell-below-cutoff",
            "note",
            f"The cell is thinner than the model's cutoff of {cutoff:g} Å, so that atoms see their own images; right "
            "for a crystal, wrong for a molecule in a box.",
            [frame for frame in sound if _thickness(frame) < cutoff],
        )
    return findings


def _thickness(frame: Frame) -> float:
    """Smallest distance of opposite faces over the periodic directions, Å; infinite for a molecule."""
    vectors = frame.cell[frame.pbc]
    if not len(vectors):
        return np.inf
    # the dual vectors of the periodic ones have the inverse thickness as length
    return float(1 / np.linalg.norm(np.linalg.pinv(vectors), axis=0).max())


def check_distances(frames: Sequence[Frame], shapes: Sequence[Shape | None]) -> list[Finding]:
    """Atoms on top of each other, colliding, or alone; frames that could not be measured at all.

    Args:
        frames: any.
        shapes: of each frame; None where it cannot be measured.
    """
    collapsed, near, alone = [], [], []
    scattered = [f for f, shape in zip(frames, shapes, strict=True) if shape is None and cell_problem(f) is None]
    for frame, shape in zip(frames, shapes, strict=True):
        if shape is None or len(frame) == 1:
            continue
        if shape.nearest.min() < COLLAPSED:
            collapsed.append(frame)
        elif shape.tightness.min() < TOO_NEAR:
            near.append(frame)
        if np.isinf(shape.nearest).any():
            alone.append(frame)
    findings = in_frames(
        "atoms-overlap",
        "error",
        f"Two atoms are less than {COLLAPSED:g} Å apart, perhaps one atom written twice or a wrong cell; remove the "
        "frame.",
        collapsed,
    )
    findings += in_frames(
        "atoms-too-near",
        "warning",
        f"Two atoms are nearer than {TOO_NEAR:g} times the sum of their covalent radii; remove the frame unless such "
        "collisions are wanted.",
        near,
    )
    findings += in_frames(
        "atom-alone",
        "warning",
        "An atom has no other within 5 Å although the frame has several atoms; look whether the structure has come "
        "apart.",
        alone,
    )
    findings += in_frames(
        "positions-overflow", "error", "Atoms are more than 1000 Å apart; the positions are broken.", scattered
    )
    return findings


def check_length_unit(frames: Sequence[Frame], shapes: Sequence[Shape | None]) -> list[Finding]:
    """Positions in Bohr, by every bond of a set being 1.89 times too long, or 0.53 times too short.

    Noble gases have no bonds and are left out; a single odd structure never decides.
    """
    suspects = [
        shape.tightness[~np.isin(frame.numbers, _NOBLE)]
        for frame, shape in zip(frames, shapes, strict=True)
        if shape is not None and len(frame) > 1
    ]
    bonds = np.concatenate(suspects) if suspects else np.array([])
    if len(bonds) < 10 or np.isinf(bonds).mean() > 0.5:
        return []
    low, middle, high = np.quantile(bonds, (0.1, 0.5, 0.9), method="nearest")
    if low > BOHR_RANGE[0] - 0.1 and BOHR_RANGE[0] < middle < BOHR_RANGE[1]:
        text = (
            f"Neighbouring atoms are {middle:.2f} times as far apart as covalent radii say: the positions are in Bohr, "
            "not in Å; multiply positions and cell by 0.529177."
        )
        return [in_set("positions-bohr", "error", text, frames)]
    if high < SHORT_RANGE[1] + 0.1 and SHORT_RANGE[0] < middle < SHORT_RANGE[1]:
        text = (
            f"Neighbouring atoms are {middle:.2f} times as far apart as covalent radii say: positions in Å were "
            "converted from Bohr once too often; divide positions and cell by 0.529177."
        )
        return [in_set("positions-bohr", "error", text, frames)]
    return []
