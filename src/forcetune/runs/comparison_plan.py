"""The runs of a comparison: a configuration for every method, number of training frames and seed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcetune.adapters.methods import METHODS, option_names
from forcetune.config import RunConfig
from forcetune.errors import InputError
from forcetune.runs.search import with_settings

Runs = dict[tuple[str, int | None], dict[int, RunConfig]]
"""Configurations by method and number of training frames (None for all), and by seed."""


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """What the runs of a comparison have in common.

    Attributes:
        config: as for one run; its method's name and its seed are overridden.
        folder: of the comparison, in which each run has a folder.
        processes: runs at the same time, which share the cores.
    """

    config: RunConfig
    folder: Path
    processes: int

    def configure(
        self, name: str, seed: int, settings: Mapping[str, Any] | None = None, size: int | None = None
    ) -> RunConfig:
        """The configuration of one run.

        Args:
            name: of the method.
            seed: of the run.
            settings: options that a search chose, by dotted name.
            size: number of training frames; all by default.
        """
        config = self.config
        content = config.model_dump(exclude_unset=True)
        known = option_names(METHODS[name])
        options = {key: value for key, value in config.method.options().items() if key in known}
        threads = config.training.threads
        if threads is None and self.processes > 1:
            threads = max(1, (os.cpu_count() or 1) // self.processes)
        content["method"] = {"name": name, "target": config.method.target, **options}
        content["training"] = content.get("training", {}) | {"seed": seed, "threads": threads}
        run = self.folder / (f"{name}-{seed}" if size is None else f"{name}-{size}-frames-{seed}")
        content["output"] = content.get("output", {}) | {"run": str(run), "overwrite": True}
        if size is not None:
            content["data"] = content["data"] | {"train_frames": size, "train_frames_seed": seed}
        return RunConfig.model_validate(with_settings(content, settings or {}))

    def configure_all(
        self,
        methods: Sequence[str],
        seeds: int,
        sizes: Sequence[int | None],
        settings: Mapping[str, Mapping[str, Any]],
    ) -> Runs:
        """Configurations of all runs by method, number of training frames and seed.

        Args:
            methods: names.
            seeds: so many, counted from the seed of the configuration.
            sizes: numbers of training frames in ascending order; None for all frames.
            settings: of the methods that were searched for.
        """
        first, largest = self.config.training.seed, sizes[-1]
        runs: Runs = {}
        for name in methods:
            for size in sizes:
                runs[name, size] = {}
                for seed in range(first, first + seeds):
                    run = self.configure(name, seed, settings.get(name), size)
                    if size is not None and largest is not None:
                        run = _match_steps(run, size, largest)
                    runs[name, size][seed] = run
        return runs


def check_sizes(sizes: Sequence[int], available: int, seeds: int) -> list[int | None]:
    """Numbers of training frames in ascending order; None alone for all frames.

    Raises:
        InputError: too few numbers for a curve, one twice, or more than there are frames.
    """
    if not sizes:
        return [None]
    text = ",".join(map(str, sizes))
    if len(set(sizes)) < max(2, len(sizes)) or min(sizes) < 1:
        raise InputError(f"--learning-curve {text}: give at least two different numbers of frames.")
    if len(sizes) * seeds < 3:
        raise InputError(f"--learning-curve {text}: a fit needs three runs of a method; add a number or --seeds.")
    if max(sizes) > available:
        raise InputError(
            f"--learning-curve {text}: there are {available} frames to train on; leave out larger numbers or give more."
        )
    return [*sorted(sizes)]


def _match_steps(config: RunConfig, size: int, largest: int) -> RunConfig:
    """The configuration with so many epochs that a small set is trained for as many steps as the largest."""
    training = config.with_default_epochs(largest).training
    every = max(1, round(training.valid_every * largest / size))
    epochs = max(1, round(training.epochs * largest / size / every)) * every
    content = config.model_dump(exclude_unset=True)
    changed: dict[str, Any] = {"epochs": epochs, "valid_every": every}
    options = content.get("training", {})
    if training.second_stage.start is not None:
        start = min(epochs, max(1, round(training.second_stage.start * largest / size / every) * every))
        changed["second_stage"] = options["second_stage"] | {"start": start}
    if training.schedule.warmup_epochs:
        warmup = round(training.schedule.warmup_epochs * largest / size)
        changed["schedule"] = options["schedule"] | {"warmup_epochs": warmup}
    content["training"] = options | changed
    return RunConfig.model_validate(content)
