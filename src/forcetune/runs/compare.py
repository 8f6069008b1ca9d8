"""Several methods and seeds on one split of the data, with equal budgets."""

from __future__ import annotations

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
from forcetune.config import RunConfig
from forcetune.diagnostics.run_checks import check_frames
from forcetune.errors import ForcetuneError, InputError, warn
from forcetune.frames.dataset import read_dataset
from forcetune.reports.comparison import Comparison, read_comparison
from forcetune.reports.comparison_page import write_comparison
from forcetune.reports.learning_curve import Curve, read_curves
from forcetune.runs.comparison_plan import ComparisonPlan, Runs, check_sizes
from forcetune.runs.continuation import (
    describe_earlier_optimizers,
    is_begun,
    is_finished,
    read_stored_defaults,
    with_stored_defaults,
)
from forcetune.runs.fit import resume, run_fit
from forcetune.runs.folder import CONFIG_NAME, input_files
from forcetune.runs.search import SearchResult, check_search, search_options
from forcetune.utils.file_lock import FolderLock
from forcetune.utils.files import is_inside, write_json
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
    again. Runs that join those of an earlier version have the optimizers, learning rates, epochs and weight of stress
    of these where none are set.

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
        InputError: an unknown method, a name twice, an option no method has, bad data, a folder of something else, or
            of runs whose settings differ by defaults of different versions.
        ForcetuneError: a run failed; the others are kept.
    """
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)
    config.require_no_learning()
    _check_methods(config, methods)
    _check_targets(targets or {})
    folder = Path(config.output.run)
    config, model_to_store = _with_model(config, model, folder)
    plan = ComparisonPlan(config, folder, processes)
    configs = [plan.configure(name, config.training.seed) for name in methods]
    _check_runs(configs, searches=search is not None)
    _check_inputs(config, inputs, folder)
    sizes = check_sizes(learning_curve, _count_frames(config), seeds)
    with FolderLock(folder) as lock:
        _check_folder(folder)
        runs = plan.configure_all(methods, seeds, sizes, {})
        continued = _continue_runs(runs, console) if search is None else []
        lock.create()
        _check_folder(folder)
        config.save(folder / MARK_NAME)
        if model_to_store is not None:
            store_base(model_to_store, folder / MODEL_NAME)
        searches: dict[str, SearchResult] = {}
        if search is not None:
            searches = _search_all(configs, folder, search, processes, console)
            settings = {name: result.settings for name, result in searches.items()}
            runs = plan.configure_all(methods, seeds, sizes, settings)
            continued = _continue_runs(runs, console)
        _run_all(continued, processes, console)
        folders = {key: {seed: Path(run.output.run) for seed, run in by_seed.items()} for key, by_seed in runs.items()}
        return _write_results(folder, methods, sizes, folders, targets or {}, searches)


def _write_results(
    folder: Path,
    methods: Sequence[str],
    sizes: Sequence[int | None],
    folders: Mapping[tuple[str, int | None], Mapping[int, Path]],
    targets: Mapping[str, Sequence[float]],
    searches: Mapping[str, SearchResult],
) -> ComparisonRun:
    """Read the runs, whose folders are by method, number of training frames and seed; write page and figures."""
    largest = {name: folders[name, sizes[-1]] for name in methods}
    comparison = read_comparison(largest)
    curves: tuple[Curve, ...] = ()
    if sizes[-1] is not None:
        by_size = {name: {size: folders[name, size] for size in sizes if size is not None} for name in methods}
        curves = tuple(read_curves(by_size, comparison.split, targets))
    page = write_comparison(folder, comparison, largest, curves)
    run = ComparisonRun(folder, comparison, page, curves)
    content = run.to_json()
    if searches:
        content["search"] = {name: asdict(result) for name, result in searches.items()}
    write_json(folder / COMPARISON_NAME, content)
    return run


def _continue_runs(runs: Runs, console: Console) -> list[RunConfig]:
    """All runs of a comparison, those that are not begun with the defaults of those that are.

    Raises:
        InputError: runs that are begun have different defaults.
    """
    configs = [config for by_seed in runs.values() for config in by_seed.values()]
    defaults = read_stored_defaults(configs)
    continued: list[RunConfig] = []
    texts: dict[str, None] = {}
    for config in configs:
        if is_begun(config):
            continued.append(config)
            continue
        continued.append(with_stored_defaults(config, defaults))
        texts |= dict.fromkeys(defaults.describe(config))
    if texts:
        console.print(f"as in the runs that are there: {', '.join(texts)}", highlight=False)
    if earlier := describe_earlier_optimizers(configs):
        warn(
            f"Runs that are there were trained by another version: {', '.join(earlier)}. Write --set "
            "training.optimizer=… to train all of them alike, or choose another folder with --out."
        )
    return continued


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


def _check_folder(folder: Path) -> None:
    """
    Raises:
        InputError: the folder holds what is not of a comparison.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another folder with --out.")
    is_comparison = (folder / MARK_NAME).is_file()
    for path in folder.iterdir() if folder.is_dir() else ():
        known = path.name.startswith("comparison.") or path.name == SEARCH_NAME or (path / CONFIG_NAME).is_file()
        empty = path.is_dir() and not any(path.iterdir())
        if not (is_comparison and (known or empty)):
            raise InputError(f"{path}: is not of a comparison; choose another folder with --out.")


def _run_one(config: RunConfig) -> str | None:
    """Train or resume one run, in a process of its own; returns what went wrong."""
    quiet = Console(quiet=True)
    try:
        if is_begun(config):
            resume(config.output.run, console=quiet)
        else:
            run_fit(config, console=quiet)
    except ForcetuneError as error:
        return f"{Path(config.output.run).name}: {error}"
    return None


def _search_one(job: tuple[RunConfig, Path, int]) -> SearchResult:
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
) -> dict[str, SearchResult]:
    """The options that the searches chose, by method.

    Raises:
        WorkerDiedError: a process died.
    """
    jobs = [(config, folder / SEARCH_NAME, trials) for config in configs]
    searches: dict[str, SearchResult] = {}
    for _, result in _in_processes(_search_one, jobs, processes, console, "searches"):
        if isinstance(result, WorkerDiedError):
            raise result
        searches[result.method] = result
    for config in configs:
        result = searches[config.method.name]
        chosen = ", ".join(f"{key}={value:g}" for key, value in result.settings.items())
        console.print(f"{result.method}: {chosen}, the best of {len(result.trials)} trials", highlight=False)
    return searches


def _run_all(configs: Sequence[RunConfig], processes: int, console: Console) -> None:
    """Train the runs that are not finished.

    Raises:
        ForcetuneError: some failed; the others are kept.
    """
    unfinished = [config for config in configs if not is_finished(config)]
    if len(unfinished) < len(configs):
        console.print(f"{len(configs) - len(unfinished)} of {len(configs)} runs are finished already")
    failures = []
    for config, failure in _in_processes(_run_one, unfinished, processes, console, "runs"):
        if isinstance(failure, WorkerDiedError):
            failure = f"{Path(config.output.run).name}: {str(failure).rstrip('.')}"
        if failure:
            failures.append(failure)
    if failures:
        raise ForcetuneError("; ".join(failures) + ". The other runs are kept; run the same command again to resume.")


def _with_model(
    config: RunConfig, model: str | Path | Backbone | None, folder: Path
) -> tuple[RunConfig, Backbone | None]:
    """The configuration with a model passed beside it, and the model if it must be stored for the runs to load it.

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
    changed, must_be_stored = with_loaded(config, model, folder / MODEL_NAME)
    if "elements" in config.model.model_fields_set:
        changed = _with_options(changed, {"elements": config.model.elements})
    return changed, model if must_be_stored else None


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
