"""Commands that train: demo, fit, resume, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from forcetune import config as configuration
from forcetune.cli.app import app
from forcetune.cli.options import (
    Device,
    Dtype,
    EnergyKey,
    Epochs,
    ForcesKey,
    Head,
    Json,
    Rank,
    Settings,
    StressKey,
    TypeMap,
    about,
    data_options,
    finite,
    read_sizes,
    split_names,
)
from forcetune.errors import InputError

if TYPE_CHECKING:
    from forcetune.runs.fit import Run


@app.command()
def demo(
    out: Annotated[str, typer.Option(help=about(configuration.OutputConfig, "run", default=False))] = "demo",
    method: Annotated[str, typer.Option(help=about(configuration.MethodConfig, "name", default=False))] = "elora",
    picoseconds: Annotated[float, typer.Option(min=0.01, callback=finite, help="Length of the dynamics.")] = 2.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help=about(configuration.OutputConfig, "overwrite"))
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
    train: Annotated[list[str] | None, typer.Argument(help=about(configuration.DataConfig, "train"))] = None,
    valid: Annotated[list[str] | None, typer.Option(help=about(configuration.DataConfig, "valid"))] = None,
    test: Annotated[list[str] | None, typer.Option(help=about(configuration.DataConfig, "test"))] = None,
    model: Annotated[str | None, typer.Option(help=about(configuration.ModelConfig, "model"))] = None,
    method: Annotated[str | None, typer.Option(help=about(configuration.MethodConfig, "name"))] = None,
    rank: Rank = None,
    epochs: Epochs = None,
    batch_size: Annotated[int | None, typer.Option(help=about(configuration.TrainingConfig, "batch_size"))] = None,
    optimizer: Annotated[str | None, typer.Option(help=about(configuration.TrainingConfig, "optimizer"))] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=about(configuration.TrainingConfig, "learning_rate"))
    ] = None,
    seed: Annotated[int | None, typer.Option(help=about(configuration.TrainingConfig, "seed"))] = None,
    compile_: Annotated[
        str | None, typer.Option("--compile", help=about(configuration.TrainingConfig, "compile"))
    ] = None,
    references: Annotated[str | None, typer.Option(help=about(configuration.ReferenceConfig, "mode"))] = None,
    magnetic: Annotated[
        bool | None, typer.Option("--magnetic", help="With a spin layer: moments and exchange (magnetism.layer=spin).")
    ] = None,
    out: Annotated[str | None, typer.Option(help=about(configuration.OutputConfig, "run"))] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help=about(configuration.OutputConfig, "overwrite"))
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
    trust: Annotated[bool | None, typer.Option("--trust", help=about(configuration.ModelConfig, "trust"))] = None,
) -> None:
    """Fine-tune a foundation model on the frames of TRAIN and write a run folder with adapter and report."""
    options: dict[str, Any] = {
        "data": data_options(
            *(train, valid, test),
            energy_key=energy_key,
            forces_key=forces_key,
            stress_key=stress_key,
            type_map=type_map,
        ),
        "model": {"model": model, "head": head, "device": device, "dtype": dtype, "trust": trust},
        "references": {"mode": references},
        "method": {"name": method, "rank": rank},
        "magnetism": {"layer": "spin" if magnetic else None},
        "training": {
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": optimizer,
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


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="Folder of a run that was interrupted.")]) -> None:
    """Go on with an interrupted run, to the same result as if it had not been interrupted."""
    from forcetune.runs.fit import resume as resume_run

    _print_run(resume_run(run))


@app.command()
def compare(
    train: Annotated[list[str] | None, typer.Argument(help=about(configuration.DataConfig, "train"))] = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "full,elora,mmea",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds counted up.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    search: Annotated[
        int | None,
        typer.Option(min=1, help="Trials for each method to choose learning rate, rank and loss weight (Optuna)."),
    ] = None,
    learning_curve: Annotated[
        str | None,
        typer.Option(
            help="Numbers of training frames such as 10,20,50,100: how the error falls, and what a target takes."
        ),
    ] = None,
    target_forces: Annotated[
        float | None, typer.Option(help="With --learning-curve: force error to reach, meV/Å (mean absolute).")
    ] = None,
    target_energy: Annotated[
        float | None, typer.Option(help="With --learning-curve: energy error to reach, meV/atom (mean absolute).")
    ] = None,
    valid: Annotated[list[str] | None, typer.Option(help=about(configuration.DataConfig, "valid"))] = None,
    test: Annotated[list[str] | None, typer.Option(help=about(configuration.DataConfig, "test"))] = None,
    model: Annotated[str | None, typer.Option(help=about(configuration.ModelConfig, "model"))] = None,
    head: Head = None,
    epochs: Epochs = None,
    out: Annotated[str, typer.Option(help="Folder of all runs, the table and the report.")] = "comparison",
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of the options; what is set here wins.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Methods side by side: the same frames and steps, several seeds, one table and a recommendation."""
    options: dict[str, Any] = {
        "data": data_options(train, valid, test),
        "model": {"model": model, "head": head},
        "training": {"epochs": epochs},
        "output": {"run": out},
    }
    resolved = configuration.load_config(config, settings or (), options)
    from forcetune.reports.comparison_page import learning_table, table, target_note
    from forcetune.runs.compare import compare as compare_runs

    names = split_names(methods)
    inputs = () if config is None else (config,)
    sizes = read_sizes(learning_curve)
    given = {"forces_mae_mev_per_ang": target_forces, "energy_mae_mev_per_atom": target_energy}
    targets = {name: [value] for name, value in given.items() if value is not None}
    if targets and not sizes:
        raise InputError("--target-forces and --target-energy: need a --learning-curve such as 10,20,50,100.")
    run = compare_runs(
        resolved,
        names,
        seeds=seeds,
        processes=processes,
        search=search,
        learning_curve=sizes,
        targets=targets,
        inputs=inputs,
    )
    if as_json:
        print(json.dumps(run.to_json()))
        return
    Console().print(table(run.comparison))
    if run.curves:
        Console().print(learning_table(run.curves))
    print(f"{target_note(run.comparison)}\n{run.comparison.reason}\nreport   {run.page}")
