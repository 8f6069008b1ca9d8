"""``results.json``: the one schema by which a run writes its results and everything else reads them.

What rooms below describe in dataclasses of their own (coverage, changes, how the training went, what was forgotten)
stands in it as it is; what a run puts together has a section here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from forcetune._version import __version__
from forcetune.adapters.summaries import PathChange, SiteCoverage, Sparsity
from forcetune.config import RunConfig
from forcetune.errors import InputError
from forcetune.evaluation.summaries import Forgetting, Phonons, RotationError, Softening
from forcetune.training.outcome import PenaltyTerms, Refinement, TrainingOutcome
from forcetune.utils.files import write_json

RESULTS_NAME = "results.json"
ErrorTable = dict[str, int | float | None]
"""Errors of one split by key (``forces_mae_mev_per_ang`` …)."""


class Summary(BaseModel):
    """A part of the results; keys of later versions are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ModelSummary(Summary):
    """The foundation model."""

    name: str = "model"
    sha256: str | None = None
    fingerprint: str | None = None
    licence: str | None = None
    library: str | None = None
    head: str | None = None
    elements: list[str] = []
    cutoff_ang: float | None = None
    dtype: str | None = None
    kernels: str | None = None


class MethodSummary(Summary):
    """What is trained, in words."""

    name: str = "method"
    description: str = ""
    rank: int | None = None
    mergeable: bool | None = None


class ParameterSummary(Summary):
    """What is trained, in numbers; ``share`` is trainable / total."""

    trainable: int | None = None
    total: int | None = None
    share: float | None = None
    coverage: list[SiteCoverage] = []


class ElementReference(Summary):
    """Reference energy of one element in the foundation model and in the run, eV."""

    symbol: str
    before_ev: float | None = None
    after_ev: float | None = None


class ReferenceSummary(Summary):
    """Reference energies, and how far they leave the labels from the foundation model."""

    mode: str | None = None
    offset_before_mev_per_atom: float | None = None
    offset_after_mev_per_atom: float | None = None
    rank: int | None = None
    n_elements: int | None = None
    elements: list[ElementReference] = []


class DataSummary(Summary):
    """One set of frames; ``n_atoms`` of the smallest and of the largest frame."""

    files: list[str] = []
    n_frames: int | None = None
    sha256: str | None = None
    keys: dict[str, str | None] = {}
    elements: list[str] = []
    n_atoms: list[int] = []
    streamed: bool | None = None


class ErrorPair(Summary):
    """Errors of one split before and after training."""

    before: ErrorTable | None = None
    after: ErrorTable | None = None

    def tables(self) -> dict[str, ErrorTable]:
        """Both by name, empty where there is none."""
        return {"before": self.before or {}, "after": self.after or {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary(TrainingOutcome):
    """How the training went, with the options that decide how long it takes and what it minimises.

    Attributes:
        epochs, optimizer, learning_rate, batch_size, seed: options of the run, defaults filled in.
        loss: as ``training.loss`` of the configuration; empty where an earlier version did not write it.
        refinement: what L-BFGS did after it, None where it did nothing.
    """

    epochs: int
    optimizer: str
    learning_rate: float
    batch_size: int
    seed: int
    loss: dict[str, Any] = field(default_factory=dict)
    refinement: Refinement | None = None


class DynamicsSummary(Summary):
    """Dynamics at constant energy with the tuned potential; energies in meV/atom from the start."""

    ensemble: str = "NVE"
    picoseconds: float
    timestep_fs: float
    n_atoms: int
    drift_mev_per_atom_per_ps: float
    fluctuation_mev_per_atom: float
    mean_temperature_k: float
    time_ps: list[float]
    total_mev_per_atom: list[float]
    potential_mev_per_atom: list[float]


class ReplaySummary(Summary):
    """Frames that were mixed into the training."""

    files: list[str] = []
    n_frames: int
    n_held: int
    sha256: str | None = None
    labels: str
    ratio: float
    weight: float
    head: str = "shared"


class Results(Summary):
    """All of ``results.json``."""

    forcetune: str = __version__
    created: str | None = None
    status: str = "not finished"
    model: ModelSummary = ModelSummary()
    method: MethodSummary = MethodSummary()
    parameters: ParameterSummary = ParameterSummary()
    reference_energies: ReferenceSummary | None = None
    data: dict[str, DataSummary | None] = {}
    training: TrainingSummary | None = None
    environment: dict[str, Any] = {}
    adapter_bytes: int | None = None
    rotation_error: RotationError | None = None
    changes: list[PathChange] = []
    sparsity: Sparsity | None = None
    replay: ReplaySummary | None = None
    penalty: PenaltyTerms | None = None
    forgetting: Forgetting | None = None
    softening: dict[str, Softening] = {}
    phonons: Phonons | None = None
    warnings: list[str] = []
    errors: dict[str, ErrorPair | None] = {}
    dynamics: DynamicsSummary | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; what was not set is left out."""
        return self.model_dump(exclude_unset=True)


def write_results(run: Path, results: Results) -> None:
    """Write ``results.json`` into a run folder, atomically."""
    write_json(run / RESULTS_NAME, results.to_json())


def read_results(run: Path, config: RunConfig) -> Results:
    """Read ``results.json``, or gather what the configuration says when the run has not come so far.

    Raises:
        InputError: no JSON, or not of the expected form.
    """
    path = run / RESULTS_NAME
    if not path.exists():
        splits = {"train": config.data.train, "valid": config.data.valid, "test": config.data.test}
        data: dict[str, DataSummary | None] = {
            name: DataSummary(files=files) for name, files in splits.items() if isinstance(files, list) and files
        }
        model = ModelSummary(name=config.model.model, head=config.model.head, dtype=config.model.dtype)
        method = MethodSummary(name=config.method.name, rank=config.method.options().get("rank"))
        return Results(model=model, method=method, data=data)
    try:
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc'])) or 'its content'}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "it is not valid JSON") from error


def damaged(path: Path, what: str) -> InputError:
    """The error for a file of the run folder that cannot be used."""
    return InputError(f"{path}: is damaged ({what}); move it away to get a report without it, or run again.")
