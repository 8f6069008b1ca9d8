"""What a run folder holds, read and checked for the report.

Everything but the configuration may be missing: a report is written of unfinished runs, too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from forcetune._version import __version__
from forcetune.config import RunConfig
from forcetune.errors import InputError
from forcetune.utils.parsing import check_archive

FloatArray = NDArray[np.float64]


class Part(BaseModel):
    """A part of the results; keys of later versions are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ModelPart(Part):
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


class MethodPart(Part):
    """What is trained, in words."""

    name: str = "method"
    rank: int | None = None
    mergeable: bool | None = None
    description: str = ""


class CoveragePart(Part):
    """What is trained at the sites of one kind."""

    kind: str
    update: str = ""
    sites: int | None = None
    covered: int | None = None
    total: int | None = None
    trainable: int | None = None


class ParametersPart(Part):
    """What is trained, in numbers."""

    trainable: int | None = None
    total: int | None = None
    coverage: list[CoveragePart] = []


class ElementPart(Part):
    """Reference energy of one element, eV."""

    symbol: str
    before_ev: float | None = None
    after_ev: float | None = None


class ReferencePart(Part):
    """Reference energies."""

    mode: str | None = None
    offset_before_mev_per_atom: float | None = None
    offset_after_mev_per_atom: float | None = None
    elements: list[ElementPart] = []
    rank: int | None = None
    n_elements: int | None = None


class DataPart(Part):
    """One set of frames."""

    files: list[str] = []
    n_frames: int | None = None
    sha256: str | None = None
    keys: dict[str, str | None] = {}
    elements: list[str] = []
    n_atoms: list[int] = []


class PairPart(Part):
    """Errors of one split before and after training."""

    before: dict[str, float | None] | None = None
    after: dict[str, float | None] | None = None

    def pair(self) -> dict[str, dict[str, float | None]]:
        """As the tables take them."""
        return {"before": self.before or {}, "after": self.after or {}}


class ChangePart(Part):
    """The change of one path of a weight."""

    site: str
    kind: str
    path: str
    size: int
    relative: float
    changed: float
    stable_rank: float
    elements: dict[str, float] = {}


class RotationPart(Part):
    """Largest differences between structures and the same structures rotated."""

    energy_mev_per_atom: float
    forces_mev_per_ang: float


class DynamicsPart(Part):
    """Dynamics at constant energy with the tuned potential; energies in meV/atom from the start."""

    picoseconds: float
    timestep_fs: float
    n_atoms: int
    drift_mev_per_atom_per_ps: float
    fluctuation_mev_per_atom: float
    mean_temperature_k: float
    time_ps: list[float]
    total_mev_per_atom: list[float]
    potential_mev_per_atom: list[float]


class ReplayPart(Part):
    """Frames that were mixed into the training."""

    files: list[str] = []
    n_frames: int
    n_held: int
    labels: str
    ratio: float
    weight: float
    head: str = "shared"


class DistancePart(Part):
    """How far the tuned model is from its base on other structures."""

    source: str
    n_frames: int
    energy_mev_per_atom: float
    forces_mev_per_ang: float


class DimerPart(Part):
    """Two atoms at short distances."""

    pair: str
    closest_ang: float
    base_wall_ev: float
    tuned_wall_ev: float
    base_hole_ang: float | None = None
    tuned_hole_ang: float | None = None
    tuned_barrier_ev: float | None = None


class StabilityPart(Part):
    """A short run at constant energy."""

    picoseconds: float
    drift_mev_per_atom_per_ps: float | None = None
    fluctuation_mev_per_atom: float | None = None
    failure: str | None = None


class ForgettingPart(Part):
    """What the tuned model forgot."""

    distance: DistancePart
    dimers: list[DimerPart] = []
    stability: StabilityPart


class Results(Part):
    """``results.json``."""

    forcetune: str = __version__
    created: str | None = None
    status: str = "not finished"
    model: ModelPart = ModelPart()
    method: MethodPart = MethodPart()
    parameters: ParametersPart = ParametersPart()
    reference_energies: ReferencePart | None = None
    data: dict[str, DataPart | None] = {}
    errors: dict[str, PairPart | None] = {}
    training: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    warnings: list[str] = []
    adapter_bytes: int | None = None
    dynamics: DynamicsPart | None = None
    changes: list[ChangePart] = []
    rotation_error: RotationPart | None = None
    forgetting: ForgettingPart | None = None
    replay: ReplayPart | None = None


def read_results(run: Path, config: RunConfig) -> Results:
    """Read ``results.json``, or tell what the configuration knows when the run has not come so far.

    Raises:
        InputError: no JSON, or not of the expected form.
    """
    path = run / "results.json"
    if not path.exists():
        named = {"train": config.data.train, "valid": config.data.valid, "test": config.data.test}
        data: dict[str, DataPart | None] = {k: DataPart(files=v) for k, v in named.items() if isinstance(v, list) and v}
        model = ModelPart(name=config.model.model, head=config.model.head, dtype=config.model.dtype)
        method = MethodPart(name=config.method.name, rank=config.method.rank)
        return Results(model=model, method=method, data=data)
    try:
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc'])) or 'its content'}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "it is not valid JSON") from error


@dataclass(frozen=True, slots=True, eq=False)
class Metrics:
    """The columns of ``metrics.csv``.

    Attributes:
        columns: name to (rows,) values, NaN where the file has none.
        stages: (rows,) names of the training stage.
    """

    columns: Mapping[str, FloatArray]
    stages: Sequence[str]

    def __getitem__(self, name: str) -> FloatArray:
        return self.columns.get(name, np.full(len(self.stages), np.nan))

    @property
    def second_stage(self) -> float | None:
        """Epoch at which the second stage starts, None when there is none."""
        changed = [i for i, stage in enumerate(self.stages) if stage and stage != self.stages[0]]
        return float(self["epoch"][changed[0]]) if changed else None


def damaged(path: Path, what: str) -> InputError:
    """The error for a file of the run folder that cannot be used."""
    return InputError(f"{path}: is damaged ({what}); move it away to get a report without it, or run again.")


def read_metrics(path: Path) -> Metrics | None:
    """Read ``metrics.csv``; None when it is absent or has no rows yet.

    A last line without its end is left out: the run is writing it just now, or was stopped while it did.

    Raises:
        InputError: not a table with an ``epoch`` column, or a value that is no number.
    """
    if not path.exists():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, "it cannot be read as text") from error
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    try:
        table = list(csv.reader(lines))
    except csv.Error as error:
        raise damaged(path, f"it is no table ({error})") from error
    if not table:
        return None
    head, *rows = table
    if "epoch" not in head:
        raise damaged(path, "it has no column 'epoch'")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(head):
            raise damaged(path, f"line {line} has {len(row)} values for {len(head)} columns")
    if not rows:
        return None
    columns: dict[str, FloatArray] = {}
    stages = [""] * len(rows)
    for name, texts in zip(head, zip(*rows, strict=True), strict=True):
        if name == "stage":
            stages = [text.strip() for text in texts]
            continue
        try:
            columns[name] = np.array([float(text) if text.strip() else np.nan for text in texts])
        except ValueError as error:
            raise damaged(path, f"column {name!r} holds something that is no number") from error
    return Metrics(columns, stages)


def read_predictions(path: Path) -> dict[str, NDArray] | None:
    """Read ``predictions.npz``; None when it is absent.

    Raises:
        InputError: no NPZ file, or arrays of a set that do not fit together.
    """
    if not path.exists():
        return None
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        # whatever zlib, zipfile and NumPy's reader of headers raise for damaged bytes, MemoryError included
        raise damaged(path, "it is not a complete NPZ file") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise damaged(path, f"{name} has no numbers")
        split, _, rest = name.partition("/")
        source, _, quantity = rest.partition("/")
        reference = arrays.get(f"{split}/reference/{quantity}")
        if source in ("before", "after") and reference is not None and array.shape != reference.shape:
            raise damaged(path, f"{name} has shape {array.shape}, its reference {reference.shape}")
        forces = arrays.get(f"{split}/reference/forces")
        if rest == "forces_element" and forces is not None and array.shape != forces.shape[:1]:
            raise damaged(path, f"{name} has shape {array.shape} for {len(forces)} atoms")
    return arrays
