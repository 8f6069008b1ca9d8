"""Several methods and seeds on one split of the data, with equal budgets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from forcetune.adapters.attach import get_adapter
from forcetune.adapters.methods import METHODS, build_method, option_names
from forcetune.backbones.loading import asked_of_loaded, load, store_base, with_loaded
from forcetune.backbones.protocol import Backbone
from forcetune.config import RunConfig, load_config
from forcetune.diagnostics.doctor import check_frames
from forcetune.errors import ForcetuneError, InputError
from forcetune.frames.dataset import read_dataset
from forcetune.reports.comparison import Comparison, read_comparison
from forcetune.reports.comparison_page import write_comparison
from forcetune.reports.learning_curve import Curve, read_curves
from forcetune.runs.fit import resume, run_fit
from forcetune.runs.folder import CONFIG_NAME, FINISHED, input_files, read_status
from forcetune.runs.search import Searched, check_search, search_options, with_settings
from forcetune.utils.files import is_inside, write_json
from forcetune.utils.option_defaults import LOSS, SECOND_LOSS, is_given, remove_value
from forcetune.utils.processes import WorkerDiedError, as_they_end

COMPARISON_NAME = "comparison.json"
MARK_NAME = "comparison.yaml"
MODEL_NAME = "comparison.model"
"""The foundation model of all runs, where it came from memory and no name or path gives it."""
SEARCH_NAME = "search"


@dataclass(frozen=True, slots=True)
class ComparisonRun:
    """A finished comparison.

    Attributes:
        folder: holds a run folder for every method and seed, ``comparison.json`` and ``comparison.html``.
        comparison: the figures.
        page: the report.
        curves: errors by the number of training frames, where these were asked for.
    """

    folder: Path
    comparison: Comparison
    page: Path
    curves: tuple[Curve, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As ``forcetune compare --json`` prints it."""
        content = self.comparison.to_json()
        if self.curves:
            content["learning_curve"] = [curve.to_json() for curve in self.curves]
        return content


def compare(
    config: RunConfig,
    methods: Sequence[str],
    *,
    seeds: int = 1,
    processes: int = 1,
    search: int | None = None,
    learning_curve: Sequence[int] = (),
    targets: Mapping[str, Sequence[float]] | None = None,
    model: str | Path | Backbone | None = None,
    inputs: Sequence[str | Path] = (),
    console: Console | None = None,
) -> ComparisonRun:
    """Run every method with every seed and set them side by side.

    All runs have the same frames, split, loss, epochs and batches; each method has its own learning rate and optimizer
    unless the configuration names one, or searches for its own options first. Options of ``config.method`` go to the
    methods that have them. A run that is finished with the same configuration is not repeated and one that was
    interrupted goes on, so that the same command continues a comparison; with another configuration the run is made
    again.

    Args:
        config: as for one run; ``config.output.run`` is the folder of the comparison, ``config.method.name`` and
            ``config.training.seed`` are overridden.
        methods: names.
        seeds: so many, counted from ``config.training.seed``.
        processes: runs at the same time, each with its share of the cores.
        search: so many trials for each method to choose learning rate, rank and weight of the forces on the
            validation frames (:func:`forcetune.runs.search.search_options`), with the first seed.
        learning_curve: numbers of training frames. Every method and seed is trained on each of them, for as many
            steps, and how the errors fall is fitted; the largest one stands in the table.
        targets: errors whose number of frames is wanted, by their key (``forces_mae_mev_per_ang``).
        model: instead of the one in ``config``: name, path or loaded backbone, which stays as it is; one that its file
            does not give is stored in the folder.
        inputs: further files that the configuration came from; a folder with one of them is refused.
        console: where progress is printed; standard error by default.

    Raises:
        InputError: an unknown method, a name twice, an option no method has, bad data, or a folder of something else.
        ForcetuneError: a run failed; the others are kept.
    """
    console = console or Console(stderr=True, soft_wrap=True)
    config.require_no_learning()
    _check_methods(config, methods)
    _check_targets(targets or {})
    folder = Path(config.output.run)
    config, stored = _with_model(config, model, folder)
    first = [_config_of(config, name, config.training.seed, folder, processes) for name in methods]
    _check_runs(first, searches=search is not None)
    _check_inputs(config, inputs, folder)
    sizes = _check_sizes(learning_curve, _count_frames(config), seeds)
    _check_folder(folder)
    config.save(folder / MARK_NAME)
    if stored is not None:
        store_base(stored, folder / MODEL_NAME)
    searched: dict[str, Searched] = {}
    if search is not None:
        searched = _search_all(first, folder, search, processes, console)
    plan = {
        (name, size): {
            seed: _config_of(config, name, seed, folder, processes, searched[name].settings if searched else {}, size)
            for seed in _seeds(config, seeds)
        }
        for name in methods
        for size in sizes
    }
    if learning_curve:
        plan = {key: {seed: _as_long(one, key[1], sizes) for seed, one in runs.items()} for key, runs in plan.items()}
    _run_all([one for by_seed in plan.values() for one in by_seed.values()], processes, console)
    places = {key: {seed: Path(one.output.run) for seed, one in by_seed.items()} for key, by_seed in plan.items()}
    runs = {name: places[name, sizes[-1]] for name in methods}
    comparison = read_comparison(runs)
    curves: tuple[Curve, ...] = ()
    if learning_curve:
        by_size = {name: {size: places[name, size] for size in sizes if size is not None} for name in methods}
        curves = tuple(read_curves(by_size, comparison.split, targets or {}))
    page = write_comparison(folder, comparison, runs, curves)
    run = ComparisonRun(folder, comparison, page, curves)
    content = run.to_json()
    if searched:
        content["search"] = {name: asdict(one) for name, one in searched.items()}
    write_json(folder / COMPARISON_NAME, content)
    return run


def _check_sizes(sizes: Sequence[int], available: int, seeds: int) -> list[int | None]:
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


def _as_long(config: RunConfig, size: int | None, sizes: Sequence[int | None]) -> RunConfig:
    """With so many epochs that a small set is trained for as many steps as the largest."""
    largest = sizes[-1]
    assert size is not None
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


def _check_methods(config: RunConfig, methods: Sequence[str]) -> None:
    """
    Raises:
        InputError: a method is unknown or named twice, none is named, there is a table, or an option is known to none
            of the methods.
    """
    if not methods or len(set(methods)) != len(methods):
        raise InputError(f"--methods {','.join(methods)}: name every method once.")
    for name in methods:
        if name not in METHODS:
            raise InputError(f"there is no method {name!r}; methods are {', '.join(METHODS)}.")
    for option in config.method.options():
        if not any(option in option_names(METHODS[name]) for name in methods):
            raise InputError(f"method.{option}: none of the methods {', '.join(methods)} has this option.")
    if config.method.table is not None:
        raise InputError("method.table: a comparison is of named methods; leave the table out, or fit it by itself.")


def _check_runs(configs: Iterable[RunConfig], *, searches: bool) -> None:
    """
    Raises:
        InputError: a method has no use for its options, or a search has nothing to choose by.
    """
    for config in configs:
        build_method(config.method)
        if searches:
            check_search(config)


def _check_targets(targets: Mapping[str, Sequence[float]]) -> None:
    """
    Raises:
        InputError: an error that is never reached.
    """
    for target in (value for values in targets.values() for value in values):
        if not target > 0:
            raise InputError(f"a target error of {target:g} is never reached; give a positive one.")


def _count_frames(config: RunConfig) -> int:
    """Training frames; all frames are read before the first run.

    Raises:
        InputError: they cannot be read, or the doctor sees an error in them.
    """
    dataset = read_dataset(config.data)
    if config.data.doctor == "on":
        check_frames({name: part.frames for name, part in dataset.splits.items()}, quiet=True)
    return len(dataset.train.frames)


def _config_of(
    config: RunConfig,
    name: str,
    seed: int,
    folder: Path,
    processes: int,
    chosen: Mapping[str, Any] | None = None,
    size: int | None = None,
) -> RunConfig:
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


def _resolved(config: RunConfig) -> dict[str, Any]:
    """All that decides the result of a run of this configuration."""
    chosen = build_method(config.method)
    full = config.with_defaults_of(chosen.learning_rate, chosen.optimizer)
    content = full.model_dump(mode="json")
    content["training"].pop("threads", None)
    content["output"].pop("overwrite")
    for name in (f"{LOSS}.stress", f"{SECOND_LOSS}.stress", "training.learning_rate", "training.epochs"):
        if not is_given(full, name):
            remove_value(content, name)  # the labels, the model and the number of frames decide
    return content


def _is_finished(config: RunConfig) -> bool:
    return _is_begun(config) and read_status(Path(config.output.run)) in FINISHED


def _is_begun(config: RunConfig) -> bool:
    """Whether the run folder is of this very configuration."""
    run = Path(config.output.run)
    if not (run / CONFIG_NAME).is_file():
        return False
    return _resolved(load_config(run / CONFIG_NAME)) == _resolved(config)


def _check_folder(folder: Path) -> None:
    """
    Raises:
        InputError: the folder holds what is not of a comparison.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another folder with --out.")
    ours = (folder / MARK_NAME).is_file()
    for path in folder.iterdir() if folder.is_dir() else ():
        known = path.name.startswith("comparison.") or path.name == SEARCH_NAME or (path / CONFIG_NAME).is_file()
        empty = path.is_dir() and not any(path.iterdir())
        if not (ours and (known or empty)):
            raise InputError(f"{path}: is not of a comparison; choose another folder with --out.")


def _run_one(config: RunConfig) -> str | None:
    """Carry out one run in a process of its own; returns what went wrong."""
    quiet = Console(quiet=True)
    try:
        if _is_begun(config):
            resume(config.output.run, console=quiet)
        else:
            run_fit(config, console=quiet)
    except ForcetuneError as error:
        return f"{Path(config.output.run).name}: {error}"
    return None


def _search_one(job: tuple[RunConfig, Path, int]) -> Searched:
    return search_options(*job)


def _in_processes(
    work: Callable[[Any], Any], jobs: Sequence[Any], processes: int, console: Console, title: str
) -> Iterator[tuple[Any, Any]]:
    """Each job with what ``work`` returns for it, as they end; a :class:`WorkerDiedError` for a process that died."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=len(jobs))
        ended: Iterator[tuple[Any, Any]] = ((job, work(job)) for job in jobs)
        if processes > 1 and jobs:
            # fresh interpreters: a fork of PyTorch's threads hangs, and the user's script is not to be run again
            ended = as_they_end(work, jobs, min(processes, len(jobs)), option="processes")
        for job, result in ended:
            yield job, result
            bar.advance(task)


def _search_all(
    configs: Sequence[RunConfig], folder: Path, trials: int, processes: int, console: Console
) -> dict[str, Searched]:
    """The options that the searches chose, by method.

    Raises:
        WorkerDiedError: a process died.
    """
    jobs = [(config, folder / SEARCH_NAME, trials) for config in configs]
    searched: dict[str, Searched] = {}
    for _, result in _in_processes(_search_one, jobs, processes, console, "searches"):
        if isinstance(result, WorkerDiedError):
            raise result
        searched[result.method] = result
    for config in configs:
        result = searched[config.method.name]
        chosen = ", ".join(f"{key}={value:g}" for key, value in result.settings.items())
        console.print(f"{result.method}: {chosen}, the best of {len(result.trials)} trials", highlight=False)
    return searched


def _run_all(configs: Sequence[RunConfig], processes: int, console: Console) -> None:
    """Carry out the runs that are not finished.

    Raises:
        ForcetuneError: some failed; the others are kept.
    """
    missing = [config for config in configs if not _is_finished(config)]
    if len(missing) < len(configs):
        console.print(f"{len(configs) - len(missing)} of {len(configs)} runs are finished already")
    failures = []
    for config, failure in _in_processes(_run_one, missing, processes, console, "runs"):
        if isinstance(failure, WorkerDiedError):
            failure = f"{Path(config.output.run).name}: {str(failure).rstrip('.')}"
        if failure:
            failures.append(failure)
    if failures:
        raise ForcetuneError("; ".join(failures) + ". The other runs are kept; run the same command again to resume.")


def _with_model(
    config: RunConfig, model: str | Path | Backbone | None, folder: Path
) -> tuple[RunConfig, Backbone | None]:
    """The configuration with a model given beside it, and the model if it must be stored to be found by the runs.

    Raises:
        InputError: it carries an adapter, or is not what the configuration asks for.
    """
    if model is None:
        return config, None
    if not isinstance(model, Backbone):
        return _with_options(config, {"model": str(model)}), None
    if get_adapter(model) is not None:
        raise InputError("this model already carries an adapter; detach it first.")
    load(model, **asked_of_loaded(config.model))
    changed, stored = with_loaded(config, model, folder / MODEL_NAME)
    if "elements" in config.model.model_fields_set:
        changed = _with_options(changed, {"elements": config.model.elements})
    return changed, model if stored else None


def _with_options(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=dict(options))})


def _check_inputs(config: RunConfig, inputs: Sequence[str | Path], folder: Path) -> None:
    """
    Raises:
        InputError: the folder of the comparison holds a file that the runs read.
    """
    for file in input_files(config, inputs):
        if is_inside(file, folder) and file != folder / MODEL_NAME:
            raise InputError(f"{folder}: holds {file}, which the runs read; choose another folder with --out.")
