"""Every examination of frames that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from forcetune.diagnostics.duplicates import check_duplicates, check_overlap
from forcetune.diagnostics.finding import Finding, in_frames
from forcetune.diagnostics.geometry import check_cells, check_distances, check_length_unit
from forcetune.diagnostics.label_checks import check_labels
from forcetune.diagnostics.shape import Shape, can_be_measured, measure_shape
from forcetune.frames.frame import Frame
from forcetune.frames.splits import separate_isolated

TRAIN = "train"


@dataclass(frozen=True, slots=True, eq=False)
class Examined:
    """Frames of every set with their geometry and findings.

    Attributes:
        frames: by name of the set; isolated atoms taken out.
        shapes: of each frame; None where it cannot be measured.
        findings: in no particular order.
    """

    frames: dict[str, Sequence[Frame]]
    shapes: dict[str, list[Shape | None]]
    findings: list[Finding]


def examine_frames(
    sets: Mapping[str, Sequence[Frame]],
    *,
    cutoff: float | None = None,
    progress: Callable[[], None] | None = None,
) -> Examined:
    """Examine sets of frames, each by itself, and those that are not trained on against those that are.

    Args:
        sets: name to frames; ``train`` is what is trained on.
        cutoff: of the model, Å; None without one.
        progress: called after each frame that was measured.
    """
    frames: dict[str, Sequence[Frame]] = {}
    findings: list[Finding] = []
    for name, set_frames in sets.items():
        frames[name], isolated = separate_isolated(set_frames)
        findings += in_frames(
            "isolated-atoms",
            "note",
            "An isolated atom; it is kept out of the training and gives a reference energy (--references isolated).",
            isolated,
        )
    shapes: dict[str, list[Shape | None]] = {}
    for name, set_frames in frames.items():
        shapes[name] = []
        for frame in set_frames:
            shapes[name].append(measure_shape(frame) if can_be_measured(frame) else None)
            if progress is not None:
                progress()
    for name, set_frames in frames.items():
        findings += check_cells(set_frames, cutoff)
        findings += check_distances(set_frames, shapes[name])
        findings += check_length_unit(set_frames, shapes[name])
        labels = check_labels(set_frames, shapes[name])
        # only what is trained on decides reference energies
        findings += [finding for finding in labels if name == TRAIN or finding.code != "composition-rank"]
        findings += check_duplicates(set_frames, shapes[name], trained_on=not name.startswith("test"))
    if TRAIN in frames:
        for name, set_frames in frames.items():
            if name != TRAIN:
                findings += check_overlap(frames[TRAIN], shapes[TRAIN], set_frames, shapes[name], name)
    return Examined(frames, shapes, findings)


def sample_evenly(indices: Sequence[int], most: int) -> list[int]:
    """At most so many, in runs of neighbours spread evenly, as an error may show only beside the frame before."""
    if len(indices) <= most:
        return list(indices)
    length = max(1, most // 10)
    starts = np.linspace(0, len(indices) - length, most // length).astype(int)
    places = sorted({int(start) + offset for start in starts for offset in range(length)})
    return [indices[place] for place in places]
