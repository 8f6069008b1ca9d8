"""Frames on which a plain model is fitted to one with gates, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from forcetune.backbones.protocol import Backbone
from forcetune.config import DataConfig, RunConfig, load_config
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.frames.dataset import read_dataset
from forcetune.frames.frame import Frame

COPIES = 1
"""Shaken copies of each frame."""

SHAKEN = 0.05
"""Å; standard deviation of each coordinate of a shaken copy."""

STRAINED = 0.01
"""Standard deviation of the strain of a shaken copy with a cell."""


@dataclass(frozen=True, slots=True)
class ApproximationFrames:
    """Frames to find a plain model on, and to measure it on.

    Attributes:
        train, test: frames.
        test_files: that the latter are from; empty where they were held out from the former.
    """

    train: list[Frame]
    test: list[Frame]
    test_files: tuple[str, ...]


def read_frames(run: str | Path, train: Any, test: Any) -> ApproximationFrames:
    """The frames that are named, else those of the run around the adapter.

    Args:
        run: run folder or adapter folder.
        train, test: a file or several; None for those of the run.

    Raises:
        InputError: there is no configuration and no frames were named, or too few are left.
    """
    named = _named(train), _named(test)
    data = _read_data(run)
    if data is None:
        if named[0] is None:
            raise InputError(f"{run}: the adapter alone has no frames to find a plain model on; name some with --data.")
        data = DataConfig(train=named[0])
    changes: dict[str, Any] = {"train": named[0] or data.train, "test": data.test if named[1] is None else named[1]}
    if named[0] is not None:
        changes |= {"valid": 0.1, "train_only": []}
    dataset = read_dataset(data.model_copy(update=changes))
    training = [*dataset.train.frames, *dataset.valid.frames]
    tests = [frame for part in dataset.tests.values() for frame in part.frames]
    files = tuple(file for part in dataset.tests.values() for file in part.files)
    if not tests:
        tests, training = training[::5], [frame for index, frame in enumerate(training) if index % 5]
    if not training or not tests:
        raise InputError(f"{run}: too few frames to find a plain model on and to measure it; name some with --data.")
    return ApproximationFrames(training, tests, files)


def _named(value: Any) -> list[str] | None:
    if value is None:
        return None
    return [str(value)] if isinstance(value, (str, Path)) else [str(item) for item in value]


def _read_data(run: str | Path) -> DataConfig | None:
    """The frames of the run around an adapter; None where it stands alone."""
    for folder in (Path(run), Path(run).parent):
        if (folder / "config.yaml").is_file():
            config: RunConfig = load_config(folder / "config.yaml")
            return config.data
    return None


def with_shaken_copies(frames: Sequence[Frame], seed: int) -> list[Frame]:
    """The frames, and copies with displaced atoms and strained cells."""
    rng = np.random.default_rng(seed)
    copies = list(frames)
    for frame in frames:
        for _ in range(COPIES):
            moved = frame.positions + SHAKEN * rng.standard_normal(frame.positions.shape)
            cell = frame.cell
            if frame.pbc.all():
                strain = STRAINED * rng.standard_normal((3, 3))
                change = np.eye(3) + (strain + strain.T) / 2
                moved, cell = moved @ change, cell @ change
            copies.append(replace(frame, positions=moved, cell=cell))
    return copies


def label_frames(backbone: Backbone, frames: Sequence[Frame]) -> list[Frame]:
    """The frames with what a model predicts as their labels, all of the same weight."""
    prediction = predict(backbone, build_graphs(backbone, frames), stress=True)
    forces = np.split(prediction.forces, np.cumsum(prediction.atoms)[:-1])
    assert prediction.stress is not None
    weights = dict.fromkeys(("energy_weight", "forces_weight", "stress_weight"), 1.0)
    return [
        replace(
            frame,
            energy=float(prediction.energy[index]),
            forces=forces[index],
            stress=prediction.stress[index] if frame.has_volume else None,
            **weights,
        )
        for index, frame in enumerate(frames)
    ]
