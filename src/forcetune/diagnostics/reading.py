"""Reading that goes on after a problem: every file and frame that can be read is read, the rest is reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from ase import Atoms

from forcetune.diagnostics.finding import Finding, Severity, in_frames
from forcetune.errors import ForcetuneNote, ForcetuneWarning, InputError
from forcetune.frames.formats import say_conversions
from forcetune.frames.frame import Frame, LabelKeys, Origin
from forcetune.frames.hessians import describe_drift
from forcetune.frames.labels import (
    LABELS,
    NONE,
    Label,
    RawFrame,
    choose_key,
    label_under,
    lacking,
    raw_frame,
)
from forcetune.frames.read import check_structure, labelled_frame
from forcetune.frames.sources import expand, file_format
from forcetune.frames.store.chunks import iterate_structures
from forcetune.frames.unread import describe_unread
from forcetune.frames.weights import WeightTally, is_left_out
from forcetune.frames.xyz import XYZ_FORMATS

Source = str | Path


def read_leniently(
    sources: Sequence[Source] | Sequence[Atoms],
    asked: LabelKeys,
    expect: Sequence[Label],
    name: str,
    type_map: Sequence[str] = (),
) -> tuple[tuple[Frame, ...], LabelKeys, list[Finding]]:
    """Read what can be read.

    Args:
        sources: files and patterns, or structures in memory.
        asked: for each label a key, ``auto``, ``none`` or ``calculator``.
        expect: labels that some frame must have, unless their key is ``none``; it is an error where none has, and a
            warning where one lacks it.
        name: what the data are, for messages.
        type_map: as :func:`forcetune.frames.read.read_frames`.

    Returns:
        the frames that could be read, the label keys, and what was wrong with the others.
    """
    findings: list[Finding] = []
    raws, tally = [], WeightTally()
    with _told("reading", findings):
        everything = list(_raw_frames(sources, type_map, findings))
    for raw in everything:
        refusal = _refusal("structure-broken", raw.origin, lambda raw=raw: check_structure(raw))
        refusal += _refusal("weight-broken", raw.origin, lambda raw=raw: tally.add(raw))
        findings += refusal
        if not refusal and not is_left_out(raw):
            raws.append(raw)
    keys = _keys(raws, asked, expect, name, findings)
    for code, text in (("weights", tally.sentence()), ("labels-unread", describe_unread(raws, keys, asked))):
        if text is not None:
            severity: Severity = "note" if code == "weights" else "warning"
            findings.append(Finding(code, severity, f"{name}: {text}", _shared_file(raws)))
    frames = []
    for raw in raws:
        labels, broken = _sound_labels(raw, keys)
        findings += broken
        frames.append(labelled_frame(raw, labels))
    with_hessian = sum(frame.hessian is not None for frame in frames)
    if with_hessian:
        text = f"{name}: {with_hessian} of {len(frames)} frames have a Hessian under '{keys.hessian}'."
        findings.append(Finding("hessians", "note", text, _shared_file(raws)))
    drift = describe_drift(frames)
    if drift is not None:
        findings.append(Finding("hessian-drift", "warning", f"{name}: {drift}", _shared_file(raws)))
    return tuple(frames), keys, _gathered(findings)


def _raw_frames(
    sources: Sequence[Source] | Sequence[Atoms], type_map: Sequence[str], findings: list[Finding]
) -> Iterator[RawFrame]:
    for source in sources:
        if isinstance(source, Atoms):
            yield from (
                raw_frame(atoms, Origin("<atoms>", index), in_memory=True)
                for index, atoms in enumerate(atoms for atoms in sources if isinstance(atoms, Atoms))
            )
            return
    files: dict[Path, None] = {}
    with _told("file-repeated", findings):
        try:
            files = dict.fromkeys(expand([source for source in sources if not isinstance(source, Atoms)]))
        except InputError:
            # one of several is not there: the others are read all the same
            for source in sources:
                try:
                    files |= dict.fromkeys(expand([str(source)]))
                except InputError as error:
                    findings.append(Finding("file-unreadable", "error", _without(str(error), str(source)), str(source)))
    kinds: list[tuple[Path, str]] = []
    for file in files:
        reached = 0
        try:
            format_name = file_format(file)
            for index, atoms in enumerate(iterate_structures(file, format_name, type_map)):
                reached = index + 1
                yield raw_frame(atoms, Origin(str(file), index), moved=format_name in XYZ_FORMATS)
        except InputError as error:
            message = _without(str(error), str(Origin(str(file), reached)), str(file))
            findings.append(Finding("file-unreadable", "error", message, str(file)))
        else:
            kinds.append((file, format_name))
    say_conversions(kinds)


def _keys(
    raws: Sequence[RawFrame], asked: LabelKeys, expect: Sequence[Label], name: str, findings: list[Finding]
) -> LabelKeys:
    chosen: dict[str, str | None] = {}
    for label in LABELS:
        wanted = getattr(asked, label) or NONE
        expected = label in expect and wanted != NONE
        key = None
        with _told("label-keys", findings):
            try:
                key = choose_key(label, wanted, raws, expected, name) if raws else None
            except InputError as error:
                findings.append(Finding(f"{label}-missing", "error", str(error), _shared_file(raws), (), len(raws)))
        chosen[label] = key
        if key is None:
            continue
        severity: Severity = "warning" if expected else "note"
        without = lacking(label, key, raws)
        findings += in_frames(
            f"{label}-missing",
            severity,
            f"No {label} under '{key}' ({len(without)} of {len(raws)} frames of the {name}); they count by the labels "
            f"that they have. If some were to have it, repeat their calculation or set {label}_key.",
            [raw.origin for raw in without],
        )
    return LabelKeys(**chosen)


def _sound_labels(raw: RawFrame, keys: LabelKeys) -> tuple[LabelKeys, list[Finding]]:
    """The keys under which this frame's labels can be used, and what is wrong with the others."""
    sound: dict[str, str | None] = {}
    findings: list[Finding] = []
    nothing = LabelKeys(None, None, None)
    for label, key in zip(LABELS, keys, strict=True):
        code = f"{label}-not-finite" if _is_not_finite(raw, label, key) else f"{label}-broken"
        alone = nothing._replace(**{label: key})
        refusal = _refusal(code, raw.origin, lambda alone=alone: labelled_frame(raw, alone))
        findings += refusal
        sound[label] = None if refusal else key
    return LabelKeys(**sound), findings


def _is_not_finite(raw: RawFrame, label: Label, key: str | None) -> bool:
    try:
        values = np.asarray(None if key is None else label_under(raw, label, key), dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return not bool(np.isfinite(values).all())


def _refusal(code: str, origin: Origin, check: Callable[[], object]) -> list[Finding]:
    try:
        check()
    except InputError as error:
        return in_frames(code, "error", _without(str(error), str(origin)), [origin])
    return []


def _gathered(findings: Sequence[Finding]) -> list[Finding]:
    """Findings of one kind in one file become one, with the message of the first."""
    gathered: list[Finding] = []
    by_kind: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.frames and finding.file is not None:
            by_kind.setdefault((finding.code, finding.file), []).append(finding)
        else:
            gathered.append(finding)
    for (code, file), group in by_kind.items():
        first = group[0]
        if len(group) == 1:
            gathered.append(first)
            continue
        origins = [Origin(file, index) for finding in group for index in finding.frames]
        message = f"In the first of them {first.message[0].lower()}{first.message[1:]}"
        gathered += in_frames(code, first.severity, message, origins)
    return gathered


@contextmanager
def _told(code: str, findings: list[Finding]) -> Iterator[None]:
    """Within this context our warnings become findings."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", ForcetuneWarning)
        warnings.simplefilter("always", ForcetuneNote)
        yield
    severities: dict[type[Warning], Severity] = {ForcetuneWarning: "warning", ForcetuneNote: "note"}
    findings += [
        Finding(code, severity, str(item.message))
        for item in heard
        for kind, severity in severities.items()
        if issubclass(item.category, kind)
    ]


def _without(message: str, *starts: str) -> str:
    """A message without the place that the finding names anyway, as a sentence."""
    for start in starts:
        message = message.removeprefix(start).lstrip(":, ")
    return message[:1].upper() + message[1:]


def _shared_file(raws: Sequence[RawFrame]) -> str | None:
    files = list(dict.fromkeys(raw.origin.file for raw in raws))
    return files[0] if len(files) == 1 else None
