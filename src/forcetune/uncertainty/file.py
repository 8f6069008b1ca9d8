"""``uncertainty.json`` and ``uncertainty.safetensors`` in a run folder: the covariance and its calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from forcetune._version import __version__
from forcetune.adapters.config import read_adapter_config
from forcetune.adapters.file import TENSORS_NAME
from forcetune.errors import InputError
from forcetune.uncertainty.calibration import Calibration
from forcetune.uncertainty.last_layer import Posterior
from forcetune.utils.files import atomic_path, compute_sha256, write_json

FORMAT_VERSION = 1
JSON_NAME = "uncertainty.json"
ARRAYS_NAME = "uncertainty.safetensors"
ENSEMBLE_NAME = "uncertainty_ensemble.json"
FILE_NAMES = (JSON_NAME, ARRAYS_NAME, ENSEMBLE_NAME)
"""All that a calibration leaves in a run folder."""


class CalibrationRecord(BaseModel):
    """As :class:`~forcetune.uncertainty.calibration.Calibration`; quantiles by the coverage as text."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    scale: float
    quantiles: dict[str, float | None]
    n_frames: int
    n_values: int

    @staticmethod
    def from_calibration(calibration: Calibration) -> CalibrationRecord:
        content = asdict(calibration)
        content["quantiles"] = {f"{level:g}": value for level, value in calibration.quantiles.items()}
        return CalibrationRecord(**content)

    @property
    def calibration(self) -> Calibration:
        return Calibration(
            self.scale,
            {float(level): value for level, value in self.quantiles.items()},
            self.n_frames,
            self.n_values,
        )


class UncertaintyRecord(BaseModel):
    """Content of ``uncertainty.json`` and ``uncertainty_ensemble.json``.

    Attributes:
        kind: ``last layer`` of one run, or ``ensemble`` of several.
        adapters: of each adapter the SHA-256 over its tensors, reference energies and base
            (:func:`identify_adapter`); where one of these changes, another calibration is needed.
        arrays_sha256: of ``uncertainty.safetensors``; None for an ensemble, and in files of earlier versions.
        features, ridge, relative_ridge: of the last layer: numbers of g, ς², ς² over the mean eigenvalue of GᵀG.
        n_train, n_valid: frames.
        valid: files of the validation frames.
        calibrations: by quantity.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    format_version: int = FORMAT_VERSION
    forcetune: str = __version__
    kind: Literal["last layer", "ensemble"]
    adapters: list[str]
    features: int | None = None
    ridge: float | None = None
    relative_ridge: float | None = None
    n_train: int | None = None
    n_valid: int
    valid: list[str] = []
    arrays_sha256: str | None = None
    calibrations: dict[str, CalibrationRecord]


@dataclass(frozen=True, slots=True, eq=False)
class Uncertainty:
    """A calibration that was read.

    Attributes:
        calibrations: by quantity.
        posterior: of the last layer; None for an ensemble.
        record: all that the file says.
    """

    calibrations: Mapping[str, Calibration]
    posterior: Posterior | None
    record: UncertaintyRecord

    def scale(self, quantity: str) -> float | None:
        """α of a quantity; None where it was not calibrated."""
        calibration = self.calibrations.get(quantity)
        return None if calibration is None else calibration.scale


def identify_adapter(folder: Path) -> str:
    """SHA-256 over that of an adapter's tensors, its reference energies and the fingerprint of its base.

    Raises:
        InputError: a file of the adapter is missing or damaged.
    """
    config, path = read_adapter_config(folder), folder / TENSORS_NAME
    try:
        tensors = compute_sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); copy the adapter folder again.") from error
    identity = [tensors, config.reference_energies_ev, config.base.fingerprint]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def save_uncertainty(
    run: Path, record: UncertaintyRecord, posterior: Posterior | None
) -> tuple[Path, UncertaintyRecord]:
    """Write a calibration into a run folder, atomically; the arrays come first, as the JSON is what is looked for.

    Args:
        run: folder of the run.
        record: content of the JSON, which the SHA-256 of the arrays is added to.
        posterior: of the last layer; None for an ensemble.

    Returns:
        the JSON file, and what it holds.
    """
    if posterior is not None:
        arrays = {"eigenvalues": posterior.eigenvalues, "eigenvectors": np.ascontiguousarray(posterior.eigenvectors)}
        with atomic_path(run / ARRAYS_NAME) as temporary:
            save_file(arrays, str(temporary))
            record = record.model_copy(update={"arrays_sha256": compute_sha256(temporary)})
    path = run / (JSON_NAME if posterior is not None else ENSEMBLE_NAME)
    write_json(path, record.model_dump())
    return path, record


def has_calibration(run: Path) -> bool:
    """Whether the run was calibrated by itself."""
    return (run / JSON_NAME).is_file()


def load_uncertainty(run: Path, adapters: Sequence[Path]) -> Uncertainty:
    """Read the calibration of a run, or of an ensemble whose first member it is.

    Args:
        run: folder with the calibration.
        adapters: adapter folders in use; several for an ensemble, in any order.

    Raises:
        InputError: there is none, it is damaged, or it belongs to other adapters.
    """
    ensemble = len(adapters) > 1
    path = run / (ENSEMBLE_NAME if ensemble else JSON_NAME)
    command = f"forcetune calibrate {run}" + (" --ensemble …" if ensemble else "")
    if not path.is_file():
        raise InputError(f"{run}: is not calibrated yet; run `{command}` first.")
    try:
        record = UncertaintyRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise InputError(f"{path}: cannot be read; run `{command}` again.") from error
    if record.format_version > FORMAT_VERSION:
        raise InputError(f"{path}: has format version {record.format_version}; update forcetune to read it.")
    if sorted(record.adapters) != sorted(map(identify_adapter, adapters)):
        raise InputError(f"{path}: belongs to other adapters than those in use; run `{command}` again.")
    posterior = None if ensemble else _read_posterior(run / ARRAYS_NAME, record, command)
    calibrations = {name: quantity.calibration for name, quantity in record.calibrations.items()}
    return Uncertainty(calibrations, posterior, record)


def _read_posterior(path: Path, record: UncertaintyRecord, command: str) -> Posterior:
    """
    Raises:
        InputError: missing, damaged, or not what the JSON describes.
    """
    try:
        matches = record.arrays_sha256 in (None, compute_sha256(path))
        arrays: dict[str, Any] = load_file(path)
        values, vectors = arrays["eigenvalues"], arrays["eigenvectors"]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read; run `{command}` again.") from error
    size = record.features
    matches &= values.shape == (size,) and vectors.shape == (size, size) and values.dtype == vectors.dtype == np.float64
    if not matches or record.ridge is None or not (np.isfinite(values).all() and np.isfinite(vectors).all()):
        raise InputError(f"{path}: does not fit {JSON_NAME}; run `{command}` again.")
    return Posterior(values, vectors, record.ridge)
