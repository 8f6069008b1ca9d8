"""The command line: one thin function per command over the Python API."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from forcetune import config as configuration
from forcetune._version import __version__
from forcetune.errors import ForcetuneError, ForcetuneNote, InputError
from forcetune.utils.parsing import printable

if TYPE_CHECKING:
    from forcetune.deployment.approximate import Approximation
    from forcetune.runs.fit import Run

# PyTorch and the model libraries take seconds to import: each command imports what it needs, so that help is instant.

app = typer.Typer(
    name="forcetune",
    help="Fine-tune pretrained equivariant interatomic potentials on your own DFT data by training a small adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors_to = Console(stderr=True, soft_wrap=True)


def _about(section: type[BaseModel], field: str, *, default: bool = True) -> str:
    """Description and default of an option, which stand in the configuration; not if the command has its own."""
    option = section.model_fields[field]
    description = option.description or ""
    if not default or option.is_required() or option.default in (None, [], False):
        return description
    return f"{description} Default: {option.default}."


Model = Annotated[str, typer.Option("--model", help=_about(configuration.ModelConfig, "model"))]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Trust = Annotated[bool, typer.Option("--trust", help=_about(configuration.ModelConfig, "trust"))]
Head = Annotated[str | None, typer.Option("--head", help=_about(configuration.ModelConfig, "head"))]
Device = Annotated[str | None, typer.Option("--device", help=_about(configuration.ModelConfig, "device"))]
Dtype = Annotated[str | None, typer.Option("--dtype", help=_about(configuration.ModelConfig, "dtype"))]
EnergyKey = Annotated[str | None, typer.Option("--energy-key", help=_about(configuration.DataConfig, "energy_key"))]
ForcesKey = Annotated[str | None, typer.Option("--forces-key", help=_about(configuration.DataConfig, "forces_key"))]
StressKey = Annotated[str | None, typer.Option("--stress-key", help=_about(configuration.DataConfig, "stress_key"))]
MomentsKey = Annotated[str | None, typer.Option("--moments-key", help=_about(configuration.DataConfig, "moments_key"))]
TypeMap = Annotated[str | None, typer.Option("--type-map", help=_about(configuration.DataConfig, "type_map"))]
SpinsKey = Annotated[str | None, typer.Option("--spins-key", help=_about(configuration.DataConfig, "spins_key"))]
Rank = Annotated[int | None, typer.Option(help="Rank of the updates of methods that have one (method.rank).")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any option: section.key=value.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"forcetune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[str, typer.Option(help=_about(configuration.OutputConfig, "run", default=False))] = "demo",
    method: Annotated[str, typer.Option(help=_about(configuration.MethodConfig, "name", default=False))] = "mmea",
    picoseconds: Annotated[float, typer.Option(min=0.01, help="Length of the dynamics.")] = 2.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help=_about(configuration.OutputConfig, "overwrite"))
    ] = False,
    settings: Settings = None,
) -> None:
    """The whole job in two minutes: the embedded model, the embedded DFT data, a report, dynamics."""
    chosen = {".".join(keys): value for keys, value in map(configuration.parse_setting, settings or ())}
    from forcetune.reports.tables import demo_table
    from forcetune.runs.demo import demo as run_demo

    finished = run_demo(out, method=method, picoseconds=picoseconds, overwrite=overwrite, settings=chosen)
    Console().print(demo_table(finished.run.results["errors"]))
    nve = finished.dynamics
    print(
        f"dynamics {nve.time[-1]:g} ps at constant energy, mean {nve.temperature.mean():.0f} K: drift {nve.drift:+.2g} "
        f"meV/atom/ps, fluctuation {nve.fluctuation:.2g} meV/atom"
    )
    memory = "" if finished.peak_memory is None else f", at most {finished.peak_memory / 1e9:.1f} GB of memory"
    print(f"took     {finished.seconds:.0f} s{memory}\nreport   {finished.run.folder / 'report.html'}")
    print(f"in ASE   forcetune.calculator({str(finished.run.folder)!r})")
    print("next     forcetune fit YOUR.xyz          your own frames with energies and forces, same small model")
    print("         forcetune fit YOUR.xyz --model mace-off23-medium          from a larger one (downloaded)")


@app.command()
def fit(
    train: Annotated[list[str] | None, typer.Argument(help=_about(configuration.DataConfig, "train"))] = None,
    valid: Annotated[list[str] | None, typer.Option(help=_about(configuration.DataConfig, "valid"))] = None,
    test: Annotated[list[str] | None, typer.Option(help=_about(configuration.DataConfig, "test"))] = None,
    model: Annotated[str | None, typer.Option(help=_about(configuration.ModelConfig, "model"))] = None,
    method: Annotated[str | None, typer.Option(help=_about(configuration.MethodConfig, "name"))] = None,
    rank: Rank = None,
    epochs: Annotated[int | None, typer.Option(help=_about(configuration.TrainingConfig, "epochs"))] = None,
    batch_size: Annotated[int | None, typer.Option(help=_about(configuration.TrainingConfig, "batch_size"))] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=_about(configuration.TrainingConfig, "learning_rate"))
    ] = None,
    seed: Annotated[int | None, typer.Option(help=_about(configuration.TrainingConfig, "seed"))] = None,
    compile_: Annotated[
        str | None, typer.Option("--compile", help=_about(configuration.TrainingConfig, "compile"))
    ] = None,
    references: Annotated[str | None, typer.Option(help=_about(configuration.ReferenceConfig, "mode"))] = None,
    magnetic: Annotated[
        bool | None, typer.Option("--magnetic", help="With a spin layer: moments and exchange (magnetism.layer=spin).")
    ] = None,
    out: Annotated[str | None, typer.Option(help=_about(configuration.OutputConfig, "run"))] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help=_about(configuration.OutputConfig, "overwrite"))
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of the options; what is set here wins.")
    ] = None,
    settings: Settings = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    type_map: TypeMap = None,
    head: Head = None,
    device: Device = None,
    dtype: Dtype = None,
    trust: Annotated[bool | None, typer.Option("--trust", help=_about(configuration.ModelConfig, "trust"))] = None,
) -> None:
    """Fine-tune a foundation model on the frames of TRAIN and write a run folder with adapter and report."""
    options: dict[str, Any] = {
        "data": {
            "train": train or None,
            "valid": _read_valid(valid),
            "test": test or None,
            "energy_key": energy_key,
            "forces_key": forces_key,
            "stress_key": stress_key,
            "type_map": type_map,
        },
        "model": {"model": model, "head": head, "device": device, "dtype": dtype, "trust": trust},
        "references": {"mode": references},
        "method": {"name": method, "rank": rank},
        "magnetism": {"layer": "spin" if magnetic else None},
        "training": {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
            "compile": compile_,
        },
        "output": {"run": out, "overwrite": overwrite},
    }
    resolved = configuration.load_config(config, settings or (), options)
    from forcetune.runs.fit import run_fit

    _print_run(run_fit(resolved, inputs=() if config is None else (config,)))


def _print_run(run: Run) -> None:
    from forcetune.reports.tables import error_table

    Console().print(error_table(run.results["errors"]))
    print(
        f"report   {run.folder / 'report.html'}\nadapter  {run.adapter} ({run.results['adapter_bytes'] / 1e3:.0f} kB)"
    )
    print(f"in ASE   forcetune.calculator({str(run.folder)!r})")


def _read_valid(texts: Sequence[str] | None) -> list[str] | float | int | None:
    """Files, or a single number."""
    if not texts:
        return None
    if len(texts) == 1:
        for number in (int, float):
            try:
                return number(texts[0])
            except ValueError:
                continue
    return list(texts)


def _split_names(text: str | None) -> list[str]:
    """Names that are separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _without_none(**options: Any) -> dict[str, Any]:
    """Options that were set; the others keep the defaults of what they are passed to."""
    return {name: value for name, value in options.items() if value is not None}


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="Folder of a run that was interrupted.")]) -> None:
    """Go on with an interrupted run, to the same result as if it had not been interrupted."""
    from forcetune.runs.fit import resume as resume_run

    _print_run(resume_run(run))


@app.command()
def compare(
    train: Annotated[list[str] | None, typer.Argument(help=_about(configuration.DataConfig, "train"))] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "full,elora,mmea",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds counted up.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    search: Annotated[
        int | None,
        typer.Option(min=1, help="Trials for each method to choose learning rate, rank and loss weight (Optuna)."),
    ] = None,
    valid: Annotated[list[str] | None, typer.Option(help=_about(configuration.DataConfig, "valid"))] = None,
    test: Annotated[list[str] | None, typer.Option(help=_about(configuration.DataConfig, "test"))] = None,
    model: Annotated[str | None, typer.Option(help=_about(configuration.ModelConfig, "model"))] = None,
    head: Head = None,
    epochs: Annotated[int | None, typer.Option(help=_about(configuration.TrainingConfig, "epochs"))] = None,
    out: Annotated[str, typer.Option(help="Folder of all runs, the table and the report.")] = "comparison",
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of the options; what is set here wins.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Methods side by side: the same frames and steps, several seeds, one table and a recommendation."""
    options: dict[str, Any] = {
        "data": {"train": train or None, "valid": _read_valid(valid), "test": test or None},
        "model": {"model": model, "head": head},
        "training": {"epochs": epochs},
        "output": {"run": out},
    }
    resolved = configuration.load_config(config, settings or (), options)
    from forcetune.reports.comparison_page import table, target_note
    from forcetune.runs.compare import compare as compare_runs

    names = _split_names(methods)
    inputs = () if config is None else (config,)
    run = compare_runs(resolved, names, seeds=seeds, processes=processes, search=search, inputs=inputs)
    if as_json:
        print(json.dumps(run.comparison.to_json()))
        return
    Console().print(table(run.comparison))
    print(f"{target_note(run.comparison)}\n{run.comparison.reason}\nreport   {run.page}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, adapter folder, model name or model file.")],
    data: Annotated[list[str], typer.Argument(help="Files of frames with labels; everything ASE reads.")],
    base: Annotated[str | None, typer.Option("--model", help="The base of an adapter, where it has moved.")] = None,
    ensemble: Annotated[
        list[str] | None, typer.Option(help="Further runs on the same base: mean and spread of all, or a comparison.")
    ] = None,
    as_json: Json = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    moments_key: MomentsKey = None,
    spins_key: SpinsKey = None,
    type_map: TypeMap = None,
    head: Head = None,
    device: Device = None,
    dtype: Dtype = None,
    trust: Trust = False,
) -> None:
    """Errors of a model, or of base + adapter, on labelled frames."""
    from forcetune.reports.tables import calibration_table, evaluation_table
    from forcetune.runs.evaluate import evaluate as evaluate_model
    from forcetune.runs.evaluate import evaluate_ensemble

    options = _without_none(
        base=base,
        energy_key=energy_key,
        forces_key=forces_key,
        stress_key=stress_key,
        moments_key=moments_key,
        spins_key=spins_key,
        type_map=_split_names(type_map),
        device=device,
        dtype=dtype,
        trust=trust,
    )
    errors: dict[str, Any]
    if ensemble or (Path(model) / "comparison.json").is_file():
        if head is not None:
            raise InputError("--head: adapters know their head; leave it out with --ensemble.")
        errors = evaluate_ensemble([model, *(ensemble or ())], data, **options)
    else:
        errors = evaluate_model(model, data, head=head, **options).to_json()
    if as_json:
        print(json.dumps(errors))
        return
    Console().print(evaluation_table(errors))
    if "ensemble" in errors:
        Console().print(calibration_table(errors["ensemble"]))


@app.command()
def doctor(
    data: Annotated[list[str], typer.Argument(help="Files of frames to train on; everything ASE reads.")],
    model: Annotated[str, typer.Option("--model", help=_about(configuration.ModelConfig, "model"))] = "mini",
    valid: Annotated[list[str] | None, typer.Option(help="Files of frames to validate on.")] = None,
    test: Annotated[list[str] | None, typer.Option(help=_about(configuration.DataConfig, "test"))] = None,
    batch_size: Annotated[int | None, typer.Option(help="Frames a batch, to estimate memory for.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Also write a page.")] = None,
    as_json: Json = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    spins_key: SpinsKey = None,
    type_map: TypeMap = None,
    head: Head = None,
    device: Device = None,
    trust: Trust = False,
) -> None:
    """Examine frames and labels before training: units, signs, order, duplicates, outliers, cells, memory."""
    from forcetune.diagnostics.doctor import doctor as examine
    from forcetune.diagnostics.page import check_page, write_checkup
    from forcetune.diagnostics.report import print_checkup

    if page is not None:
        check_page(page)
    checkup = examine(
        data,
        **_without_none(
            model=model,
            valid=valid or None,
            test=test or None,
            energy_key=energy_key,
            forces_key=forces_key,
            stress_key=stress_key,
            spins_key=spins_key,
            type_map=_split_names(type_map),
            batch_size=batch_size,
            head=head,
            device=device,
            trust=trust,
        ),
    )
    content = checkup.to_json()
    if page is not None:
        write_checkup(page, content, checkup.arrays)
    if as_json:
        print(json.dumps(content))
    else:
        print_checkup(content, Console())
        if page is not None:
            print(f"page     {page}")
    if content["n_errors"]:
        sys.exit(2)


@app.command()
def methods(
    model: Model,
    elements: Annotated[str | None, typer.Option(help="Cut the element table to these, such as H,C,O.")] = None,
    rank: Rank = None,
    as_json: Json = False,
    head: Head = None,
    trust: Trust = False,
) -> None:
    """What each method would train on a model: parameters, share, and coverage by site kind."""
    from forcetune.reports.tables import methods_table
    from forcetune.runs.methods import compare_methods

    rows = compare_methods(model, elements=_split_names(elements) or None, rank=rank, head=head, trust=trust)
    if as_json:
        print(json.dumps(rows))
    else:
        Console().print(methods_table(rows))


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(help="Run folder or adapter folder.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Frames to watch gates on; the training frames if not given.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another run on the same base, to compare with.")] = None,
    base: Annotated[str | None, typer.Option("--model", help="The base, where it has moved.")] = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """What a run changed: by layer, path, order and element; what its gates do; how like another run it is."""
    from forcetune.reports.tables import change_tables
    from forcetune.runs.inspect import inspect as inspect_run

    changes = inspect_run(run, data=data or None, against=against, model=base, trust=trust).to_json()
    if as_json:
        print(json.dumps(changes))
        return
    for table in change_tables(changes):
        Console().print(table)
    if changes["likeness"] is not None:
        alike = changes["likeness"]
        print(f"1 − R² against {against}: {alike['weights']:.3f} over weights, {alike['paths']:.3f} over layers")


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="Run folder or adapter folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plain model to write, such as tuned.model.")],
    base: Annotated[str | None, typer.Option("--model", help="The base, where it has moved.")] = None,
    modality: Annotated[
        str | None,
        typer.Option(help="Name of the modality that method `modality` adds; that of the run's folder if not given."),
    ] = None,
    dtype: Dtype = None,
    trust: Trust = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Where gates do not merge: the nearest plain model, within --bound.")
    ] = False,
    bound: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With --approximate: largest mean absolute difference of forces on test frames, meV/Å; by default a "
            "fifth of the run's own error.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --approximate: of low-rank updates; by default all weights change.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="With --approximate: frames to find it on, if not the run's own.")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="With --approximate: frames to measure it on, if not the run's own.")
    ] = None,
) -> None:
    """Write base + adapter as a plain model of the base's own library, after proving that they are equal."""
    if approximate:
        if dtype is not None or modality is not None:
            raise InputError("--approximate: writes in the base's own precision and modality; leave out the other.")
        from forcetune.deployment.approximate import ITERATIONS, merge_approximately

        approximation = merge_approximately(
            run,
            output,
            model=base,
            train=data or None,
            test=test or None,
            bound=bound,
            rank=rank,
            trust=trust,
            progress=lambda done: errors_to.print(f"iteration {done} of at most {ITERATIONS}", highlight=False),
        )
        _say_approximation(approximation)
        return
    if bound is not None or rank is not None or data or test:
        raise InputError("--bound, --rank, --data and --test belong to --approximate; add it, or leave them out.")
    from forcetune.deployment.merge import merge as merge_run

    merged = merge_run(run, output, model=base, dtype=dtype, trust=trust, modality=modality)
    print(
        f"{merged.path}: differs from base + adapter on {merged.n_probes} random structures by at most "
        f"{merged.energy_difference:.1e} in energy and {merged.forces_difference:.1e} in forces and stress (relative)"
    )
    if merged.added:
        print(f"modality {merged.modality} was added; the others are what they were")
    elif merged.modality is not None:
        print(f"modality {merged.modality} was replaced; the others share its layers and are no longer what they were")
    if merged.references_difference > 1e-6:
        print(
            f"reference energies differ by at most {merged.references_difference:.1e} eV an atom, as float32 rounds "
            "them; --dtype float64 keeps them"
        )


def _say_approximation(approximation: Approximation) -> None:
    from forcetune.deployment.approximate import note_path
    from forcetune.reports.tables import error_table

    errors = {"before": approximation.before.to_json(), "after": approximation.after.to_json()}
    print("the run (before) and the plain model (after):")
    Console().print(error_table({"test": errors}))
    for name, difference in (
        ("without gates", approximation.dropped),
        ("layer by layer", approximation.regressed),
        ("distilled", approximation.distilled),
    ):
        print(
            f"{name:15} differs from the run by {difference.energy_mev_per_atom:.3g} meV/atom, "
            f"{difference.forces_mev_per_ang:.3g} meV/Å on {approximation.n_test} test frames"
        )
    merged = approximation.merged.path
    print(f"model    {merged} (bound {approximation.bound:.3g} meV/Å)\nstored   {note_path(merged)}")


@app.command()
def export(
    run: Annotated[
        str | None, typer.Argument(help="Run folder, adapter folder, or a model by name or path; nothing for a list.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="The program, such as lammps-mliap.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, or folder for targets of several files.")
    ] = None,
    base: Annotated[str | None, typer.Option("--model", help="The base, where it has moved.")] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Interpreter that has the library whose converter is called; by default forcetune's own."),
    ] = None,
    head: Head = None,
    dtype: Dtype = None,
    trust: Trust = False,
) -> None:
    """Write base + adapter for a program that simulates, after comparing; without arguments, list the targets."""
    from forcetune.deployment.export.exporting import export as export_run
    from forcetune.deployment.export.registry import TARGETS

    if run is None and to is None:
        table = Table("target", "models", "gates", "what runs it", box=None)
        for target in TARGETS.values():
            table.add_row(target.name, ", ".join(target.libraries), "yes" if target.gates else "no", target.about)
        Console().print(table)
        return
    if run is None or to is None or output is None:
        raise InputError("write `forcetune export RUN --to TARGET -o FILE`, or `forcetune export` for the targets.")
    written = export_run(run, to, output, model=base, head=head, dtype=dtype, trust=trust, python=python)
    parity = written.parity
    print(
        f"{written.path}: differs from base + adapter on {parity.n_probes} random structures by at most "
        f"{parity.energy:.1e} in energy and {parity.forces:.1e} in forces and stress (relative)\n"
        f"compared by {parity.checked_by}\nruns by     {written.target.about}"
    )


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write the report of a run again."""
    from forcetune.reports.run_page import write_report

    print(write_report(run))


@app.command()
def models(
    action: Annotated[str | None, typer.Argument(help="`download`, or nothing for the list.")] = None,
    name: Annotated[str | None, typer.Argument(help="Model to download.")] = None,
    as_json: Json = False,
) -> None:
    """List the published foundation models, or download one."""
    from forcetune.backbones.registry import download_model, list_models
    from forcetune.utils.download import progress_bar

    if action is None:
        if as_json:
            print(json.dumps([asdict(model) for model in list_models()]))
            return
        table = Table("name", "licence", "elements", "for", box=None)
        for model in list_models():
            table.add_row(model.name, model.licence, model.elements, model.description)
        Console().print(table)
        return
    if action != "download" or name is None:
        raise InputError("write `forcetune models` or `forcetune models download NAME`.")
    with progress_bar(name) as progress:
        path = download_model(name, progress=progress)
    print(path)


@app.command()
def datasets(
    action: Annotated[str | None, typer.Argument(help="`download`, or nothing for the list.")] = None,
    name: Annotated[str | None, typer.Argument(help="Data set to download.")] = None,
    folder: Annotated[Path, typer.Option(help="Where to.")] = Path(),
    as_json: Json = False,
) -> None:
    """List published data sets, or download one."""
    from forcetune.frames.published import download_dataset, list_datasets

    if action is None:
        if as_json:
            print(json.dumps([asdict(dataset) for dataset in list_datasets()]))
            return
        table = Table("name", "licence", "size", "what", "page", box=None)
        for dataset in list_datasets():
            size = f"{dataset.size / 1e9:.1f} GB"
            table.add_row(dataset.name, dataset.licence, size, dataset.description, dataset.page)
        Console().print(table)
        return
    if action != "download" or name is None:
        raise InputError("write `forcetune datasets` or `forcetune datasets download NAME`.")
    print(download_dataset(name, folder))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, ForcetuneNote):
        errors_to.print(f"note: {printable(str(message))}", markup=False, highlight=False)
        return
    errors_to.print(f"warning: {printable(str(message))}", style="yellow", markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 for bad input, 1 for a failure of ours."""
    from forcetune.errors import ForcetuneWarning
    from forcetune.utils.distributed import place

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", ForcetuneWarning)
    warnings.simplefilter("always", ForcetuneNote)
    warnings.showwarning = _show_warning
    if not place().leads:  # the first process tells
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        warnings.simplefilter("ignore")
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="forcetune")
    except ForcetuneError as error:
        errors_to.print(f"error: {printable(str(error))}", style="bold red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors_to.print("interrupted", style="bold red")
        sys.exit(130)
