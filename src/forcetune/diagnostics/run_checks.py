"""Examinations of a run's own frames and predictions, before it trains: warnings are printed, errors end it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from forcetune.diagnostics.diagnosis import diagnose
from forcetune.diagnostics.examine import TRAIN, examine_frames, sample_evenly
from forcetune.diagnostics.finding import Finding, sort_findings
from forcetune.diagnostics.label_statistics import LabelledPredictions
from forcetune.diagnostics.outliers import find_outliers
from forcetune.errors import InputError, warn
from forcetune.evaluation.metrics import Predictions
from forcetune.frames.frame import Frame
from forcetune.frames.store.stored_frames import StoredFrames

SAMPLE_OF_RUN = 500
"""Training frames whose predictions are compared as a whole."""
SAMPLE_OF_STREAM = 2000
"""Frames of a set on disk that are examined without predictions."""


def check_frames(
    sets: Mapping[str, Sequence[Frame]],
    cutoff: float | None = None,
    *,
    quiet: bool = False,
    progress: Callable[[], None] | None = None,
) -> list[Finding]:
    """All examinations of frames that need no predictions; of large sets on disk a sample is examined.

    Args:
        sets: name to frames.
        cutoff: of the model, Å; None before it is loaded.
        quiet: leave warnings to a later call.
        progress: called after each frame.

    Raises:
        InputError: there is an error in them; the message has all of them.
    """
    sampled, unknowable = _sample_large_sets(sets, quiet)
    findings = examine_frames(sampled, cutoff=cutoff, progress=progress).findings
    return _report([finding for finding in findings if finding.code not in unknowable], quiet=quiet)


def check_predictions(frames: Sequence[Frame], predictions: Predictions) -> list[Finding]:
    """What the foundation model's predictions for the training frames say about their labels.

    Raises:
        InputError: as :func:`check_frames`.
    """
    labelled = LabelledPredictions.split(frames, predictions)
    # a verdict on the whole set gains nothing from thousands of frames, and compares all pairs of them
    chosen = labelled.select(sample_evenly(range(len(frames)), SAMPLE_OF_RUN))
    return _report(diagnose(chosen) + find_outliers(labelled))


def _sample_large_sets(
    sets: Mapping[str, Sequence[Frame]], quiet: bool
) -> tuple[Mapping[str, Sequence[Frame]], set[str]]:
    """Sets with a sample of those that are on disk, and the codes of findings that a sample cannot decide."""
    large = {name: len(frames) for name, frames in sets.items() if _is_large(frames)}
    if not large:
        return {name: list(frames) for name, frames in sets.items()}, set()
    if not quiet:
        counts = ", ".join(f"{SAMPLE_OF_STREAM:,} of {count:,} ({name})" for name, count in large.items())
        warn(
            f"Streamed data: structures and labels of all frames were checked, but distances, cells, net forces, "
            f"outliers, duplicates and overlaps only on {counts}; `forcetune doctor` examines all frames, in memory."
        )
    sampled = {
        name: [frames[index] for index in sample_evenly(range(len(frames)), SAMPLE_OF_STREAM)]
        for name, frames in sets.items()
    }
    return sampled, {"composition-rank"} if TRAIN in large else set()


def _is_large(frames: Sequence[Frame]) -> bool:
    return isinstance(frames, StoredFrames) and len(frames) > SAMPLE_OF_STREAM


def _report(findings: Sequence[Finding], *, quiet: bool = False) -> list[Finding]:
    """Print warnings, unless quiet.

    Raises:
        InputError: there are errors; the message has all of them.
    """
    ordered = sort_findings(findings)
    for finding in ordered:
        if finding.severity == "warning" and not quiet:
            warn(f"{finding} [{finding.code}]")
    errors = [finding for finding in ordered if finding.severity == "error"]
    if errors:
        messages = " ".join(f"{finding} [{finding.code}]" for finding in errors)
        raise InputError(
            f"{messages} If you know better, `--set data.doctor=off` trains on these data as they are; `forcetune "
            "doctor` shows the details."
        )
    return list(ordered)
