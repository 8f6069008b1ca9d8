"""Examining data before they are trained on: what a file says, and what a foundation model says about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forcetune.adapters.attach import get_adapter
from forcetune.backbones.loading import load
from forcetune.backbones.protocol import Backbone
from forcetune.config import TrainingConfig
from forcetune.diagnostics.diagnosis import diagnose
from forcetune.diagnostics.examine import TRAIN, Examined, examine_frames
from forcetune.diagnostics.finding import Finding, in_frames, sort_findings
from forcetune.diagnostics.label_statistics import (
    LabelledPredictions,
    element_agreement,
    energy_agreement,
    force_agreement,
    stress_agreement,
)
from forcetune.diagnostics.memory import step_memory
from forcetune.diagnostics.outliers import find_outliers
from forcetune.diagnostics.reading import read_leniently
from forcetune.errors import InputError, warn
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.frames.frame import Frame, LabelKeys
from forcetune.frames.isolated import compare_isolated
from forcetune.frames.labels import AUTO, Label
from forcetune.frames.splits import separate_isolated
from forcetune.frames.store.stored_frames import StoredFrames
from forcetune.graphs.edges import COINCIDING
from forcetune.graphs.graph import Batch

SAMPLE = 200
"""So many training frames are predicted; of other sets a quarter of that. A run has its own predictions."""
SAMPLE_OF_RUN = 500
SAMPLE_OF_STREAM = 2000
"""Frames of a set on disk that are examined without predictions."""
PREDICTABLE_EDGES = 500_000
"""Frames with more edges are not predicted only to be examined."""

NAMES = {TRAIN: "training data", "valid": "validation data", "test": "test data"}

Sources = str | Path | Sequence[str | Path] | Sequence[Atoms]


@dataclass(frozen=True, slots=True)
class Checkup:
    """Findings, errors first, and the facts that every report has.

    Attributes:
        findings: in order of severity.
        facts: counts, agreement with the model, memory; plain values.
        arrays: labels and predictions of the frames that were predicted, named as in a run's ``predictions.npz``.
    """

    findings: tuple[Finding, ...]
    facts: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_errors(self) -> int:
        return self._count("error")

    @property
    def n_warnings(self) -> int:
        return self._count("warning")

    def _count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def codes(self) -> set[str]:
        """Codes of all findings."""
        return {finding.code for finding in self.findings}

    def to_json(self) -> dict[str, Any]:
        """As ``forcetune doctor --json`` prints it."""
        return {
            "findings": [finding.to_json() for finding in self.findings],
            "n_errors": self.n_errors,
            "n_warnings": self.n_warnings,
            "facts": self.facts,
        }


def doctor(
    data: Sources,
    *,
    model: str | Path | Backbone | None = "mini",
    valid: Sources | None = None,
    test: Sources | None = None,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    stress_key: str = AUTO,
    spins_key: str = AUTO,
    type_map: Sequence[str] = (),
    batch_size: int | None = None,
    head: str | None = None,
    device: str = "auto",
    trust: bool = False,
    console: Console | None = None,
) -> Checkup:
    """Examine frames before they are trained on.

    Reading goes on after a problem, so that one call tells all of them.

    Args:
        data: files or patterns of training frames, or ASE structures with labels.
        model: name, path or loaded backbone to compare the labels with; None leaves these examinations out.
        valid, test: files or structures that are not trained on; examined, and compared with the training frames.
        energy_key, forces_key, stress_key: as :func:`forcetune.read_frames`.
        spins_key: the same; frames that differ in their spins are no duplicates.
        type_map: the same.
        batch_size: frames a batch, for the estimate of memory; by default that of a fit.
        head, device, trust: as :func:`forcetune.load`.
        console: where progress is printed; standard error by default.

    Raises:
        InputError: the model cannot be loaded. Whatever is wrong with the data is a finding.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    named = {TRAIN: data, "valid": valid, "test": test}
    sets, keys, findings = _read(named, LabelKeys(energy_key, forces_key, stress_key, None, spins_key), type_map)
    backbone = None if model is None else _loaded(model, sets, head, device, trust)
    known, unknown = _known(backbone, sets)
    findings += unknown
    with _progress(console, "frames", sum(map(len, known.values()))) as advance:
        examined = examine_frames(known, cutoff=None if backbone is None else backbone.cutoff, progress=advance)
    findings += examined.findings
    facts = _facts(examined, keys)
    arrays: dict[str, np.ndarray] = {}
    if backbone is not None:
        compared, graphs = _predicted(backbone, examined, console, findings)
        facts["model"] = {"name": backbone.base.name, "cutoff_ang": backbone.cutoff, "licence": backbone.base.licence}
        facts["agreement"] = {name: _agreement(predictions) for name, predictions in compared.items()}
        facts["memory"] = _memory(backbone, graphs, batch_size or TrainingConfig().batch_size, findings)
        findings += _isolated(known.get(TRAIN, ()), compared.get(TRAIN), backbone)
        for predictions in compared.values():
            findings += diagnose(predictions) + find_outliers(predictions)
        arrays = {
            f"{name}/{key}": array
            for name, predictions in compared.items()
            for key, array in predictions.arrays().items()
        }
    return Checkup(sort_findings(_without_copies(findings)), facts, arrays)


def check_frames(
    sets: Mapping[str, Sequence[Frame]],
    cutoff: float | None = None,
    *,
    quiet: bool = False,
    progress: Callable[[], None] | None = None,
) -> list[Finding]:
    """For a run: all examinations of its frames that need no predictions; of large sets on disk a sample is examined.

    Args:
        sets: name to frames.
        cutoff: of the model, Å; None before it is loaded.
        quiet: leave warnings to a later call.
        progress: called after each frame.

    Raises:
        InputError: there is an error in them; the message has all of them.
    """
    sampled, untold = _in_memory(sets, quiet)
    findings = examine_frames(sampled, cutoff=cutoff, progress=progress).findings
    return _reported([one for one in findings if one.code not in untold], quiet=quiet)


def check_predictions(frames: Sequence[Frame], predictions: Predictions) -> list[Finding]:
    """For a run: what the foundation model's predictions for its training frames say about their labels.

    Raises:
        InputError: as :func:`check_frames`.
    """
    compared = LabelledPredictions.of(frames, predictions)
    # a verdict on the whole set gains nothing from thousands of frames, and compares all pairs of them
    chosen = compared.select(sample(range(len(frames)), SAMPLE_OF_RUN))
    return _reported(diagnose(chosen) + find_outliers(compared))


def _in_memory(sets: Mapping[str, Sequence[Frame]], quiet: bool) -> tuple[Mapping[str, Sequence[Frame]], set[str]]:
    """Sets with a sample of those that are on disk, and the codes of what a sample cannot tell."""
    large = {name: len(frames) for name, frames in sets.items() if _is_large(frames)}
    if not large:
        return {name: list(frames) for name, frames in sets.items()}, set()
    if not quiet:
        counts = ", ".join(f"{SAMPLE_OF_STREAM:,} of {count:,} ({name})" for name, count in large.items())
        warn(
            f"Streamed data: structures and labels of all frames were checked, but distances, cells, net forces, "
            f"outliers, duplicates and overlaps only on {counts}; `forcetune doctor` examines all frames, in memory."
        )
    sampled = {name: [frames[k] for k in sample(range(len(frames)), SAMPLE_OF_STREAM)] for name, frames in sets.items()}
    return sampled, {"composition-rank"} if TRAIN in large else set()


def _is_large(frames: Sequence[Frame]) -> bool:
    return isinstance(frames, StoredFrames) and len(frames) > SAMPLE_OF_STREAM


def _reported(findings: Sequence[Finding], *, quiet: bool = False) -> list[Finding]:
    ordered = sort_findings(findings)
    for finding in ordered:
        if finding.severity == "warning" and not quiet:
            warn(f"{finding} [{finding.code}]")
    errors = [finding for finding in ordered if finding.severity == "error"]
    if errors:
        messages = " ".join(f"{finding} [{finding.code}]" for finding in errors)
        raise InputError(
            f"{messages} If you know better, `--set data.doctor=off` trains on these data as they are; `forcetune "
            "doctor` tells more."
        )
    return list(ordered)


def _read(
    named: Mapping[str, Sources | None], asked: LabelKeys, type_map: Sequence[str]
) -> tuple[dict[str, tuple[Frame, ...]], dict[str, LabelKeys], list[Finding]]:
    """Frames and label keys of every set that was named, and what was wrong in reading them."""
    sets: dict[str, tuple[Frame, ...]] = {}
    keys: dict[str, LabelKeys] = {}
    findings: list[Finding] = []
    for name, sources in named.items():
        if sources is not None:
            expect: tuple[Label, ...] = ("energy",) if name == "test" else ("energy", "forces")
            sets[name], keys[name], file_findings = read_leniently(
                _listed(sources), asked, expect, NAMES[name], type_map
            )
            findings += file_findings
    return sets, keys, findings


def _listed(sources: Sources) -> Any:
    return [sources] if isinstance(sources, str | Path | Atoms) else list(sources)


def _loaded(
    model: str | Path | Backbone, sets: Mapping[str, Sequence[Frame]], head: str | None, device: str, trust: bool
) -> Backbone:
    backbone = load(model, head=head, device=device, trust=trust)
    # a table cut to the elements of the data makes a large model smaller, as a fit does
    here = {int(z) for frames in sets.values() for frame in frames for z in frame.numbers} & set(backbone.elements)
    if here and get_adapter(backbone) is None:
        backbone = load(backbone, elements=sorted(here))
    return backbone


def _known(
    backbone: Backbone | None, sets: Mapping[str, tuple[Frame, ...]]
) -> tuple[dict[str, tuple[Frame, ...]], list[Finding]]:
    """The frames whose elements the model knows, and the others as findings."""
    if backbone is None:
        return dict(sets), []
    table = set(backbone.elements)
    findings: list[Finding] = []
    known: dict[str, tuple[Frame, ...]] = {}
    for name, frames in sets.items():
        strange = {k: {int(z) for z in frame.numbers} - table for k, frame in enumerate(frames)}
        known[name] = tuple(frame for k, frame in enumerate(frames) if not strange[k])
        for z in sorted(set().union(*strange.values())):
            knows = ", ".join(chemical_symbols[z] for z in backbone.elements)
            findings += in_frames(
                "element-unknown",
                "error",
                f"{chemical_symbols[z]} is unknown to {backbone.base.name} (of these elements it knows {knows}); "
                "leave the frames out or choose a model that knows it.",
                [frame for k, frame in enumerate(frames) if z in strange[k]],
            )
    return known, findings


def _predicted(
    backbone: Backbone, examined: Examined, console: Console, findings: list[Finding]
) -> tuple[dict[str, LabelledPredictions], dict[str, Sequence[Batch]]]:
    """Predictions for a sample of every set."""
    chosen: dict[str, list[Frame]] = {}
    for name, frames in examined.frames.items():
        shapes = examined.shapes[name]
        sound = [
            k
            for k, shape in enumerate(shapes)
            if shape is not None and shape.n_edges < PREDICTABLE_EDGES and shape.nearest.min() >= COINCIDING
        ]
        chosen[name] = [frames[k] for k in sample(sound, SAMPLE if name == TRAIN else SAMPLE // 4)]
    compared: dict[str, LabelledPredictions] = {}
    graphs: dict[str, Sequence[Batch]] = {}
    with _progress(console, backbone.base.name, sum(map(len, chosen.values()))) as advance:
        for name, frames in chosen.items():
            if not frames:
                continue
            graphs[name] = build_graphs(backbone, frames)
            predictions = LabelledPredictions.of(frames, predict(backbone, graphs[name], progress=advance))
            compared[name], broken = _finite(predictions)
            findings += broken
    return compared, graphs


def _finite(predictions: LabelledPredictions) -> tuple[LabelledPredictions, list[Finding]]:
    sound = [
        bool(np.isfinite(e)) and bool(np.isfinite(f).all())
        for e, f in zip(predictions.energy, predictions.forces, strict=True)
    ]
    broken = in_frames(
        "prediction-not-finite",
        "error",
        "The model's energy or forces are not finite; look for atoms on top of each other.",
        [frame for frame, fine in zip(predictions.frames, sound, strict=True) if not fine],
    )
    return predictions.select([k for k, fine in enumerate(sound) if fine]), broken


def sample(indices: Sequence[int], most: int) -> list[int]:
    """At most so many, in runs of neighbours spread evenly: what belongs to the frame before is found beside it."""
    if len(indices) <= most:
        return list(indices)
    length = max(1, most // 10)
    starts = np.linspace(0, len(indices) - length, most // length).astype(int)
    return [indices[k] for k in sorted({int(start) + i for start in starts for i in range(length)})]


def _isolated(frames: Sequence[Frame], compared: LabelledPredictions | None, backbone: Backbone) -> list[Finding]:
    """What isolated atoms among the training frames say against the others."""
    _, alone = separate_isolated(frames)
    others, energies = ((), ()) if compared is None else (compared.frames, compared.energy)
    isolated = compare_isolated(alone, others, energies, backbone.reference_energies)
    if isolated is None:
        return []
    severity = "warning" if isolated.disagree else "note"
    return [Finding("isolated-energies", severity, isolated.sentence("estimate"), alone[0].origin.file)]


def _without_copies(findings: Sequence[Finding]) -> list[Finding]:
    """A frame that stands out with and without the model is reported once, by the finding with more frames."""
    best: dict[tuple[str, str | None], Finding] = {}
    distinct = []
    for finding in findings:
        if not finding.code.endswith("-outlier"):
            distinct.append(finding)
            continue
        key = (finding.code, finding.file)
        if key not in best or finding.n_frames > best[key].n_frames:
            best[key] = finding
    return distinct + list(best.values())


def _facts(examined: Examined, keys: Mapping[str, LabelKeys]) -> dict[str, Any]:
    facts: dict[str, Any] = {"sets": {}}
    for name, frames in examined.frames.items():
        sizes = [len(frame) for frame in frames]
        facts["sets"][name] = {
            "files": list(dict.fromkeys(frame.origin.file for frame in frames)),
            "n_frames": len(frames),
            "keys": keys[name]._asdict(),
            "elements": [chemical_symbols[z] for z in sorted({int(z) for frame in frames for z in frame.numbers})],
            "n_atoms": [min(sizes), max(sizes)] if sizes else None,
            "largest_frame": str(max(frames, key=len).origin) if frames else None,
            "periodic": sum(bool(frame.pbc.any()) for frame in frames),
        }
    return facts


def _agreement(predictions: LabelledPredictions) -> dict[str, Any]:
    measures = {"energy": energy_agreement, "forces": force_agreement, "stress": stress_agreement}
    measured = {name: measure(predictions) for name, measure in measures.items()}
    return {
        **{name: None if agreement is None else agreement.to_json() for name, agreement in measured.items()},
        "elements": [
            {
                "symbol": row.symbol,
                "n_atoms": row.n_atoms,
                "label_rms_mev_per_ang": row.label_rms,
                "error_rms_mev_per_ang": row.error_rms,
            }
            for row in element_agreement(predictions)
        ],
    }


def _memory(
    backbone: Backbone, graphs: Mapping[str, Sequence[Batch]], batch_size: int, findings: list[Finding]
) -> dict[str, Any] | None:
    estimate = step_memory(backbone, graphs.get(TRAIN, []), batch_size)
    if estimate is None:
        return None
    available = _available(backbone.device)
    if available is not None and estimate.estimate_bytes > available:
        text = (
            f"A step with the {batch_size} largest frames is estimated at {estimate.estimate_bytes / 1e9:.1f} GB, more "
            f"than the {available / 1e9:.1f} GB of this machine; set training.batch_size or training.batch_edges lower."
        )
        findings.append(Finding("memory", "warning", text))
    return {
        **estimate.to_json(),
        "batch_size": batch_size,
        "available_bytes": available,
        "device": str(backbone.device),
    }


def _available(device: torch.device) -> int | None:
    """Memory of the device, bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


@contextmanager
def _progress(console: Console, label: str, total: int) -> Iterator[Callable[..., None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done=1: bar.advance(task, done)
