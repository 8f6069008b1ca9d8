"""Runs of several methods and seeds side by side, in numbers, and which method they speak for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forcetune.config import load_config
from forcetune.errors import InputError
from forcetune.reports.texts import number_text
from forcetune.runs.metrics import Metrics, read_metrics
from forcetune.runs.results import Results, read_results

ERRORS = (
    "energy_mae_mev_per_atom",
    "energy_rmse_mev_per_atom",
    "forces_mae_mev_per_ang",
    "forces_rmse_mev_per_ang",
)
ALIKE = 0.05
"""With one seed, methods whose validation losses differ by less than this share are called alike."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Values over seeds with their mean and standard deviation (None with one seed)."""

    mean: float
    spread: float | None
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(map(float, values))
        )

    def text(self) -> str:
        """``12.3 ± 0.4``."""
        return number_text(self.mean) + ("" if self.spread is None else f" ± {number_text(self.spread)}")


@dataclass(frozen=True, slots=True)
class MethodRuns:
    """What the runs of one method gave.

    Attributes:
        name: of the method.
        seeds: in the order of the values.
        errors: on the compared frames, by key.
        valid_loss: lowest of each run.
        epochs_to_target: epoch at which each run first reached the target loss.
        seconds_per_step: median, validation included.
        trainable, adapter_bytes, mergeable, learning_rate, steps: of the first run.
    """

    name: str
    seeds: tuple[int, ...]
    errors: dict[str, Spread]
    valid_loss: Spread
    epochs_to_target: Spread | None
    seconds_per_step: float
    trainable: int
    adapter_bytes: int
    mergeable: bool
    learning_rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Methods on one split of the data with equal budgets.

    Attributes:
        split: the frames whose errors are compared: ``test``, or ``valid`` without test frames.
        zero_shot: errors there of the foundation model with re-estimated reference energies.
        methods: in the order asked for.
        target_loss: the lowest validation loss that every run reached.
        recommended: name of the method with the lowest mean validation loss.
        reason: why, in a sentence or two.
    """

    split: str
    zero_shot: dict[str, float]
    methods: tuple[MethodRuns, ...]
    target_loss: float
    recommended: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Run:
    folder: Path
    results: Results
    metrics: Metrics

    @property
    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and losses of all validations."""
        loss = self.metrics["valid_loss"]
        known = np.isfinite(loss)
        return self.metrics["epoch"][known], loss[known]


def _read(folder: Path) -> _Run:
    results = read_results(folder, load_config(folder / "config.yaml"))
    metrics = read_metrics(folder / "metrics.csv")
    if metrics is None or not results.errors or results.training is None:
        raise InputError(f"{folder}: is not finished, so it cannot be compared; run the comparison again.")
    return _Run(folder, results, metrics)


def read_comparison(runs: Mapping[str, Mapping[int, Path]]) -> Comparison:
    """Gather finished runs.

    Args:
        runs: method → seed → run folder.

    Raises:
        InputError: a run is not finished or damaged.
    """
    members = {name: {seed: _read(folder) for seed, folder in seeds.items()} for name, seeds in runs.items()}
    everyone = [run for seeds in members.values() for run in seeds.values()]
    first = everyone[0].results
    split = next((name for name in first.errors if name.startswith("test")), "valid")
    target = max(float(run.losses[1].min()) for run in everyone)
    methods = tuple(_method(name, seeds, split, target) for name, seeds in members.items())
    best, reason = _recommendation(methods)
    pair = first.errors[split]
    before = (pair and pair.before) or {}
    zero_shot = {key: float(value) for key, value in before.items() if key in ERRORS and value is not None}
    return Comparison(split, zero_shot, methods, target, best.name, reason)


def _method(name: str, runs: Mapping[int, _Run], split: str, target: float) -> MethodRuns:
    members = list(runs.values())
    first = members[0].results
    trainings = [run.results.training for run in members if run.results.training is not None]
    errors: dict[str, Spread] = {}
    for key in ERRORS:
        values = [(pair.after or {}).get(key) for run in members if (pair := run.results.errors[split]) is not None]
        if values and all(value is not None for value in values):
            errors[key] = Spread.of([float(value) for value in values if value is not None])
    reached = [run.losses[0][run.losses[1] <= target * (1 + 1e-12)] for run in members]
    return MethodRuns(
        name=name,
        seeds=tuple(runs),
        errors=errors,
        valid_loss=Spread.of([float(run.losses[1].min()) for run in members]),
        epochs_to_target=Spread.of([float(epochs[0]) for epochs in reached]) if all(map(len, reached)) else None,
        seconds_per_step=statistics.median(training.seconds_per_step for training in trainings),
        trainable=first.parameters.trainable or 0,
        adapter_bytes=first.adapter_bytes or 0,
        mergeable=bool(first.method.mergeable),
        learning_rate=trainings[0].learning_rate,
        steps=trainings[0].steps,
    )


def _recommendation(methods: Sequence[MethodRuns]) -> tuple[MethodRuns, str]:
    best = min(methods, key=lambda method: method.valid_loss.mean)
    seeds = "over one seed" if best.valid_loss.spread is None else f"over {len(best.seeds)} seeds"
    reason = f"{best.name} has the lowest validation loss, {best.valid_loss.text()} {seeds}."
    margin = ALIKE * best.valid_loss.mean if best.valid_loss.spread is None else best.valid_loss.spread
    alike = [m for m in methods if m is not best and m.valid_loss.mean <= best.valid_loss.mean + margin]
    for other in alike:
        merits = [
            text
            for text, better in (
                ("merges into the model", other.mergeable and not best.mergeable),
                (
                    f"trains {other.trainable:,} parameters instead of {best.trainable:,}",
                    other.trainable < best.trainable,
                ),
            )
            if better
        ]
        if merits:
            reason += f" {other.name} is as good within that uncertainty and {' and '.join(merits)}."
    return best, reason
