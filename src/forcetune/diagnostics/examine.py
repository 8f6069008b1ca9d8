"""Every examination of frames that needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    """Frames of every set with their geometry, and what was found.

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
        findings += [one for one in labels if name == TRAIN or one.code != "composition-rank"]
        findings += check_duplicates(set_frames, shapes[name], trained_on=not name.startswith("test"))
    if TRAIN in frames:
        for name, set_frames in frames.items():
            if name != TRAIN:
                findings += check_overlap(frames[TRAIN], shapes[TRAIN], set_frames, shapes[name], name)
    return Examined(frames, shapes, findings)
