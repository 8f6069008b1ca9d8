"""Which runs a comparison is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forcetune.adapters.methods import METHODS, option_names
from forcetune.config import RunConfig
from forcetune.errors import InputError
from forcetune.runs.search import Searched, with_settings

Plan = dict[tuple[str, int | None], dict[int, RunConfig]]
"""The configuration of every run by method and number of frames (None for all), and by seed."""


def plan_runs(
    config: RunConfig,
    methods: Sequence[str],
    seeds: int,
    sizes: Sequence[int | None],
    processes: int,
    searched: Mapping[str, Searched],
) -> Plan:
    """The configuration of every run, with the options that searches chose."""
    folder = Path(config.output.run)
    plan: Plan = {}
    for name in methods:
        chosen = searched[name].settings if searched else {}
        for size in sizes:
            runs = {
                seed: config_of_run(config, name, seed, folder, processes, chosen, size)
                for seed in _seeds(config, seeds)
            }
            if size is not None:
                runs = {seed: _as_long(one, size, sizes) for seed, one in runs.items()}
            plan[name, size] = runs
    return plan


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


def _as_long(config: RunConfig, size: int, sizes: Sequence[int | None]) -> RunConfig:
    """With so many epochs that a small set is trained for as many steps as the largest."""
    largest = sizes[-1]
    assert largest is not None
    training = config.with_default_epochs(largest).training
    every = max(1, round(training.valid_every * largest / size))
    epochs = max(1, round(training.epochs * largest / size / every)) * every
    content = config.model_dump(exclude_unset=True)
    changed: dict[str, Any] = {"epochs": epochs, "valid_every": every}
    given = content.get("training", {})
    if training.second_stage.start is not None:
        start = min(epochs, max(1, round(training.second_stage.start * largest / size / every) * every))
        changed["second_stage"] = given["second_stage"] | {"start": start}
    if training.schedule.warmup_epochs:
        warmup = round(training.schedule.warmup_epochs * largest / size)
        changed["schedule"] = given["schedule"] | {"warmup_epochs": warmup}
    content["training"] = given | changed
    return RunConfig.model_validate(content)


def _seeds(config: RunConfig, count: int) -> range:
    return range(config.training.seed, config.training.seed + count)


def config_of_run(
    config: RunConfig,
    name: str,
    seed: int,
    folder: Path,
    processes: int,
    chosen: Mapping[str, Any] | None = None,
    size: int | None = None,
) -> RunConfig:
    """The configuration of one run.

    Args:
        config: of the comparison.
        name, seed: of the method and the run.
        folder: of the comparison.
        processes: runs at the same time, which share the cores.
        chosen: options that a search chose, by dotted name.
        size: training frames; None for all.
    """
    options_set = config.model_dump(exclude_unset=True)
    known = option_names(METHODS[name])
    options = {key: value for key, value in config.method.options().items() if key in known}
    threads = config.training.threads
    if threads is None and processes > 1:
        threads = max(1, (os.cpu_count() or 1) // processes)
    options_set["method"] = {"name": name, "target": config.method.target, **options}
    options_set["training"] = options_set.get("training", {}) | {"seed": seed, "threads": threads}
    place = f"{name}-{seed}" if size is None else f"{name}-{size}-frames-{seed}"
    options_set["output"] = options_set.get("output", {}) | {"run": str(folder / place), "overwrite": True}
    if size is not None:
        options_set["data"] = options_set["data"] | {"train_frames": size, "train_frames_seed": seed}
    return RunConfig.model_validate(with_settings(options_set, chosen or {}))
