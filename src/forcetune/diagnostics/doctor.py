"""Examining data before they are trained on: what a file says, and what a foundation model says about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forcetune.adapters.attach import get_adapter
from forcetune.backbones.loading import load
from forcetune.backbones.protocol import Backbone
from forcetune.config import TrainingConfig
from forcetune.diagnostics.diagnosis import diagnose
from forcetune.diagnostics.examine import TRAIN, Examined, examine_frames, sample_evenly
from forcetune.diagnostics.facts import describe_agreement, describe_sets, estimate_memory
from forcetune.diagnostics.finding import Finding, in_frames, sort_findings
from forcetune.diagnostics.label_statistics import LabelledPredictions
from forcetune.diagnostics.outliers import find_outliers
from forcetune.diagnostics.reading import read_leniently
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.frames.frame import Frame, LabelKeys
from forcetune.frames.isolated import compare_isolated
from forcetune.frames.labels import AUTO, Label
from forcetune.frames.splits import separate_isolated
from forcetune.graphs.edges import COINCIDING
from forcetune.graphs.graph import Batch

SAMPLE = 200
"""So many training frames are predicted; of other sets a quarter of that. A run has its own predictions."""
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
    hessian_key: str = AUTO,
    type_map: Sequence[str] = (),
    batch_size: int | None = None,
    head: str | None = None,
    device: str = "auto",
    trust: bool = False,
    console: Console | None = None,
) -> Checkup:
    """Examine frames before they are trained on.

    Reading goes on after a problem, so that one call reports all of them.

    Args:
        data: files or patterns of training frames, or ASE structures with labels.
        model: name, path or loaded backbone to compare the labels with; None leaves these examinations out.
        valid, test: files or structures that are not trained on; examined, and compared with the training frames.
        energy_key, forces_key, stress_key: as :func:`forcetune.read_frames`.
        spins_key: the same; frames that differ in their spins are no duplicates.
        hessian_key: the same; Hessians are checked and counted, and not compared with the model.
        type_map: the same.
        batch_size: frames a batch, for the estimate of memory; by default that of a fit.
        head, device, trust: as :func:`forcetune.load`.
        console: where progress is printed; standard error by default.

    Raises:
        InputError: the model cannot be loaded. Whatever is wrong with the data is a finding.
    """
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)
    sources = {TRAIN: data, "valid": valid, "test": test}
    keys_asked = LabelKeys(energy_key, forces_key, stress_key, None, spins_key, hessian_key)
    sets, keys, findings = _read(sources, keys_asked, type_map)
    backbone = None if model is None else _load(model, sets, head, device, trust)
    known, unknown_elements = _separate_unknown_elements(backbone, sets)
    findings += unknown_elements
    with _progress(console, "frames", sum(map(len, known.values()))) as advance:
        examined = examine_frames(known, cutoff=None if backbone is None else backbone.cutoff, progress=advance)
    findings += examined.findings
    facts = describe_sets(examined, keys)
    arrays: dict[str, np.ndarray] = {}
    if backbone is not None:
        labelled, graphs = _predict(backbone, examined, console, findings)
        facts["model"] = {"name": backbone.base.name, "cutoff_ang": backbone.cutoff, "licence": backbone.base.licence}
        facts["agreement"] = {name: describe_agreement(predictions) for name, predictions in labelled.items()}
        facts["memory"] = estimate_memory(backbone, graphs, batch_size or TrainingConfig().batch_size, findings)
        findings += _check_isolated(known.get(TRAIN, ()), labelled.get(TRAIN), backbone)
        for predictions in labelled.values():
            findings += diagnose(predictions) + find_outliers(predictions)
        arrays = {
            f"{name}/{key}": array
            for name, predictions in labelled.items()
            for key, array in predictions.arrays().items()
        }
    return Checkup(sort_findings(_merge_outliers(findings)), facts, arrays)


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
                _as_list(sources), asked, expect, NAMES[name], type_map
            )
            findings += file_findings
    return sets, keys, findings


def _as_list(sources: Sources) -> Any:
    return [sources] if isinstance(sources, str | Path | Atoms) else list(sources)


def _load(
    model: str | Path | Backbone, sets: Mapping[str, Sequence[Frame]], head: str | None, device: str, trust: bool
) -> Backbone:
    backbone = load(model, head=head, device=device, trust=trust)
    # a table cut to the elements of the data makes a large model smaller, as a fit does
    present = {int(z) for frames in sets.values() for frame in frames for z in frame.numbers}
    elements = present & set(backbone.elements)
    if elements and get_adapter(backbone) is None:
        backbone = load(backbone, elements=sorted(elements))
    return backbone


def _separate_unknown_elements(
    backbone: Backbone | None, sets: Mapping[str, tuple[Frame, ...]]
) -> tuple[dict[str, tuple[Frame, ...]], list[Finding]]:
    """The frames whose elements the model knows, and the others as findings."""
    if backbone is None:
        return dict(sets), []
    findings: list[Finding] = []
    known: dict[str, tuple[Frame, ...]] = {}
    for name, frames in sets.items():
        unknown = [{int(z) for z in frame.numbers} - set(backbone.elements) for frame in frames]
        known[name] = tuple(frame for frame, elements in zip(frames, unknown, strict=True) if not elements)
        for z in sorted(set().union(*unknown)):
            table = ", ".join(chemical_symbols[z] for z in backbone.elements)
            findings += in_frames(
                "element-unknown",
                "error",
                f"{chemical_symbols[z]} is unknown to {backbone.base.name} (of these elements it knows {table}); "
                "leave the frames out or choose a model that knows it.",
                [frame for frame, elements in zip(frames, unknown, strict=True) if z in elements],
            )
    return known, findings


def _predict(
    backbone: Backbone, examined: Examined, console: Console, findings: list[Finding]
) -> tuple[dict[str, LabelledPredictions], dict[str, Sequence[Batch]]]:
    """Predictions for a sample of every set."""
    chosen: dict[str, list[Frame]] = {}
    for name, frames in examined.frames.items():
        predictable = [
            index
            for index, shape in enumerate(examined.shapes[name])
            if shape is not None and shape.n_edges < PREDICTABLE_EDGES and shape.nearest.min() >= COINCIDING
        ]
        most = SAMPLE if name == TRAIN else SAMPLE // 4
        chosen[name] = [frames[index] for index in sample_evenly(predictable, most)]
    labelled: dict[str, LabelledPredictions] = {}
    graphs: dict[str, Sequence[Batch]] = {}
    with _progress(console, backbone.base.name, sum(map(len, chosen.values()))) as advance:
        for name, frames in chosen.items():
            if not frames:
                continue
            graphs[name] = build_graphs(backbone, frames)
            predictions = LabelledPredictions.split(frames, predict(backbone, graphs[name], progress=advance))
            labelled[name], not_finite = _separate_not_finite(predictions)
            findings += not_finite
    return labelled, graphs


def _separate_not_finite(predictions: LabelledPredictions) -> tuple[LabelledPredictions, list[Finding]]:
    """The finite predictions, and the others as findings."""
    finite = [
        bool(np.isfinite(energy)) and bool(np.isfinite(forces).all())
        for energy, forces in zip(predictions.energy, predictions.forces, strict=True)
    ]
    findings = in_frames(
        "prediction-not-finite",
        "error",
        "The model's energy or forces are not finite; look for atoms on top of each other.",
        [frame for frame, is_finite in zip(predictions.frames, finite, strict=True) if not is_finite],
    )
    return predictions.select([index for index, is_finite in enumerate(finite) if is_finite]), findings


def _check_isolated(frames: Sequence[Frame], labelled: LabelledPredictions | None, backbone: Backbone) -> list[Finding]:
    """What isolated atoms among the training frames say against the others."""
    _, atoms = separate_isolated(frames)
    others, energies = ((), ()) if labelled is None else (labelled.frames, labelled.energy)
    isolated = compare_isolated(atoms, others, energies, backbone.reference_energies)
    if isolated is None:
        return []
    severity = "warning" if isolated.disagree else "note"
    return [Finding("isolated-energies", severity, isolated.sentence("estimate"), atoms[0].origin.file)]


def _merge_outliers(findings: Sequence[Finding]) -> list[Finding]:
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


@contextmanager
def _progress(console: Console, label: str, total: int) -> Iterator[Callable[..., None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done=1: bar.advance(task, done)
