"""Calibrating the uncertainty of a run or of an ensemble, and comparing it with the errors on other frames."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from forcetune.adapters.config import AdapterConfig
from forcetune.backbones.protocol import Backbone
from forcetune.config import RunConfig, load_config
from forcetune.deployment.ensemble import Ensemble, average_predictions, load_ensemble, spread
from forcetune.deployment.loading import adapter_folder, deploy
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Predictions, build_graphs, check_finite
from forcetune.frames.dataset import read_dataset
from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.labels import NONE
from forcetune.frames.read import read_frames
from forcetune.frames.store.stored_frames import StoredFrames
from forcetune.runs.folder import ADAPTER_NAME, CONFIG_NAME
from forcetune.runs.preparation import counting
from forcetune.uncertainty.calibration import (
    Calibration,
    Reliability,
    calibrate_all,
    collect_deviations,
    measure_reliability,
)
from forcetune.uncertainty.file import (
    CalibrationRecord,
    Uncertainty,
    UncertaintyRecord,
    identify_adapter,
    save_uncertainty,
)
from forcetune.uncertainty.fit import fit_last_layer
from forcetune.uncertainty.last_layer import require_network

MOST_FRAMES = 2000
"""Training and validation frames each that a calibration looks at by default."""


@dataclass(frozen=True, slots=True)
class CalibratedRun:
    """A calibration that was written.

    Attributes:
        file: its JSON.
        record: its content.
        seconds: it took.
    """

    file: Path
    record: UncertaintyRecord
    seconds: float


def calibrate(
    run: str | Path,
    valid: str | Path | Sequence[str | Path] | None = None,
    *,
    ensemble: Sequence[str | Path] = (),
    frames: int = MOST_FRAMES,
    base: str | Path | Backbone | None = None,
    device: str = "auto",
    trust: bool = False,
    console: Console | None = None,
) -> CalibratedRun:
    """Learn how sure a run is from its training frames, calibrate it on validation frames, write both into its folder.

    Args:
        run: run folder.
        valid: files of labelled frames that were not trained on; by default the validation frames of the run. These
            chose the best epoch, too, so that frames of their own are slightly more honest.
        ensemble: further runs on the same base; calibrates the spread of all instead of the last layer of one.
        frames: most training and validation frames that are looked at; of more, so many at random.
        base: the base, where it has moved.
        device: ``cpu``, ``cuda`` … or ``auto``.
        trust: allow a model file to run its own code where it cannot be rebuilt without.
        console: for progress; standard error by default.

    Raises:
        InputError: no run folder, frames that are missing or changed, or a model whose last layer is not known.
    """
    console, started = console or Console(stderr=True, soft_wrap=True, emoji=False), time.perf_counter()
    folder = run_folder(run)
    config = load_config(folder / CONFIG_NAME)
    if ensemble:
        record = _calibrate_ensemble([folder, *ensemble], config, valid, frames, base, device, trust, console)
        return CalibratedRun(*save_uncertainty(folder, record, None), time.perf_counter() - started)
    deployed = deploy(base, folder, device=device, trust=trust)
    backbone = deployed.backbone
    require_network(backbone)
    train_frames, valid_frames, files = _frames(config, valid, deployed.adapter, console)
    sets = [_sample(train_frames, frames, "training", console), _sample(valid_frames, frames, "validation", console)]
    graphs = [build_graphs(backbone, frames) for frames in sets]
    with counting(console, "uncertainty", sum(map(len, sets))) as advance:
        fitted = fit_last_layer(backbone, *graphs, progress=advance)
    record = UncertaintyRecord(
        kind="last layer",
        adapters=[identify_adapter(folder / ADAPTER_NAME)],
        features=len(fitted.posterior.eigenvalues),
        ridge=fitted.posterior.ridge,
        relative_ridge=fitted.relative_ridge,
        n_train=len(sets[0]),
        n_valid=len(sets[1]),
        valid=list(files),
        calibrations=_records(fitted.calibrations),
    )
    return CalibratedRun(*save_uncertainty(folder, record, fitted.posterior), time.perf_counter() - started)


def run_folder(run: str | Path) -> Path:
    """
    Raises:
        InputError: not the folder of a run with an adapter.
    """
    folder = Path(run)
    if not (folder / CONFIG_NAME).is_file() or adapter_folder(folder) != folder / ADAPTER_NAME:
        raise InputError(f"{folder}: is no run folder with an adapter; name the folder that `forcetune fit` wrote.")
    return folder


def _records(calibrations: dict[str, Calibration]) -> dict[str, CalibrationRecord]:
    return {name: CalibrationRecord.from_calibration(calibration) for name, calibration in calibrations.items()}


def _frames(
    config: RunConfig, valid: str | Path | Sequence[str | Path] | None, adapter: AdapterConfig | None, console: Console
) -> tuple[Sequence[Frame], Sequence[Frame], tuple[str, ...]]:
    """Training frames as the run had them, validation frames, and the files of these.

    Raises:
        InputError: the training frames are no longer those of the run.
    """
    data = config.data.model_copy(update={"test": []})
    with counting(console, "frames read") as advance:
        dataset = read_dataset(data, config.magnetism, advance)
    trained = None if adapter is None else adapter.training_data_sha256
    if not config.replay.data and trained is not None and trained != dataset.train.sha256:
        raise InputError(
            f"{', '.join(data.train)}: changed since the run; calibrate with the frames it was trained on."
        )
    if valid is None:
        return dataset.train.frames, dataset.valid.frames, dataset.valid.files
    keys = {f"{label}_key": getattr(data, f"{label}_key") for label in ("energy", "forces")}
    named = [valid] if isinstance(valid, (str, Path)) else list(valid)
    valid_set = read_frames(named, **keys, stress_key=NONE, require=(), name="validation data", type_map=data.type_map)
    return dataset.train.frames, valid_set.frames, valid_set.files


def _sample(frames: Sequence[Frame], most: int, name: str, console: Console) -> Sequence[Frame]:
    """All frames, or so many of them that the calibration ends."""
    if most < 2:
        raise InputError(f"--frames {most}: calibrate on two frames at least.")
    if len(frames) <= most:
        return frames
    console.print(f"looking at {most:,} of {len(frames):,} {name} frames, chosen at random", highlight=False)
    chosen = np.sort(np.random.default_rng(0).choice(len(frames), most, replace=False))
    if isinstance(frames, StoredFrames):
        return frames.take(frames.indices[chosen])
    return [frames[int(index)] for index in chosen]


def _calibrate_ensemble(
    members: Sequence[str | Path],
    config: RunConfig,
    valid: str | Path | Sequence[str | Path] | None,
    most: int,
    base: str | Path | Backbone | None,
    device: str,
    trust: bool,
    console: Console,
) -> UncertaintyRecord:
    ensemble = load_ensemble(members, base, device=device, trust=trust)
    _, frames, files = _frames(config, valid, None, console)
    frames = _sample(frames, most, "validation", console)
    mean, energy, forces = ensemble_deviations(ensemble, frames)
    return UncertaintyRecord(
        kind="ensemble",
        adapters=[identify_adapter(folder) for folder, *_ in ensemble.members],
        n_valid=len(frames),
        valid=list(files),
        calibrations=_records(calibrate_all(collect_deviations(mean, energy, forces))),
    )


def ensemble_deviations(ensemble: Ensemble, frames: Sequence[Frame]) -> tuple[Predictions, FloatArray, FloatArray]:
    """The mean of an ensemble, and its spread: (frames,) eV, (atoms, 3) eV/Å.

    Raises:
        InputError: a prediction is not finite.
    """
    predictions = ensemble.predict(build_graphs(ensemble.backbone, frames))
    for member in predictions:
        check_finite(member, frames)
    return (
        average_predictions(predictions),
        spread([member.energy for member in predictions]),
        spread([member.forces for member in predictions]),
    )


def describe_reliability(
    predictions: Predictions, energy: FloatArray, forces: FloatArray | None, uncertainty: Uncertainty
) -> dict[str, Any]:
    """The part ``uncertainty`` of what ``evaluate --uncertainty --json`` prints; eV/atom and eV/Å."""
    measured: dict[str, Reliability | None] = {}
    for name, deviations in collect_deviations(predictions, energy, forces).items():
        calibration = uncertainty.calibrations.get(name)
        measured[name] = None if calibration is None else measure_reliability(deviations, calibration)
    return {
        "kind": uncertainty.record.kind,
        "calibrated_on": uncertainty.record.n_valid,
        **{name: None if reliability is None else asdict(reliability) for name, reliability in measured.items()},
    }
