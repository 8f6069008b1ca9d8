"""Commands about what the model does not know: calibrate, select, learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from forcetune import config as configuration
from forcetune.cli.app import app
from forcetune.cli.options import (
    Device,
    EnergyKey,
    Epochs,
    ForcesKey,
    Head,
    Json,
    Rank,
    Settings,
    StressKey,
    Trust,
    TypeMap,
    about,
    data_options,
    split_names,
    without_none,
)


@app.command()
def calibrate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    valid: Annotated[
        list[str] | None, typer.Option(help="Labelled frames not trained on; the run's validation frames if not given.")
    ] = None,
    ensemble: Annotated[
        list[str] | None, typer.Option(help="Further runs on the same base: calibrate the spread of all instead.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=2, help="Most training and validation frames to look at. Default: 2000 each.")
    ] = None,
    base: Annotated[str | None, typer.Option("--model", help="The base model, if its file has moved.")] = None,
    as_json: Json = False,
    device: Device = None,
    trust: Trust = False,
) -> None:
    """Learn how sure a run is of its energies and forces, and calibrate that on validation frames."""
    from forcetune.reports.uncertainty import scales_table
    from forcetune.runs.uncertainty import calibrate as calibrate_run

    options = without_none(base=base, device=device, frames=frames)
    done = calibrate_run(run, valid or None, ensemble=ensemble or (), trust=trust, **options)
    content = done.record.model_dump()
    if as_json:
        print(json.dumps(content))
        return
    Console().print(scales_table(content))
    print(f"took     {done.seconds:.0f} s\nwritten  {done.file}")
    if ensemble:
        print(f"next     forcetune evaluate {run} DATA --ensemble {' --ensemble '.join(ensemble)} --uncertainty")
    else:
        print(f"next     forcetune evaluate {run} DATA --uncertainty")


@app.command()
def select(
    pool: Annotated[list[str], typer.Argument(help="Files of structures to choose from; no labels needed.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Structures to choose.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Extended XYZ to write, in the order of choice.")],
    model: Annotated[str, typer.Option("--model", help="Run folder, model name or model file.")] = "mini",
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Files of frames that are labelled already, besides the training frames of a run."),
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="farthest: largest distance to all that is labelled or chosen, times the uncertainty of a calibrated "
            "run; determinant: largest volume of the features; random: a baseline."
        ),
    ] = "farthest",
    uncertainty: Annotated[
        str,
        typer.Option(
            help="Uncertainty that counts: energy, forces (slower) or off; auto is energy for a calibrated run."
        ),
    ] = "auto",
    quota: Annotated[
        str | None,
        typer.Option(help="Shares of compositions: proportional, equal, or counts such as C2H6O=20,H2O=10."),
    ] = None,
    apart: Annotated[
        float,
        typer.Option(help="Least distance to all that is labelled or chosen; two random ones are about 1.4 apart."),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(help="Seed of the first choice where nothing is labelled, and of strategy random.")
    ] = 0,
    as_json: Json = False,
    head: Head = None,
    type_map: TypeMap = None,
    device: Device = None,
    trust: Trust = False,
) -> None:
    """Which of many unlabelled structures to compute next: uncertain, unlike what is labelled, unlike each other."""
    from forcetune.reports.uncertainty import selection_table
    from forcetune.runs.select import select as select_frames

    chosen = select_frames(
        pool,
        n=n,
        model=model,
        output=output,
        exclude=exclude or (),
        strategy=strategy,
        uncertainty=uncertainty,
        quota=quota,
        apart=apart,
        seed=seed,
        trust=trust,
        **without_none(head=head, device=device, type_map=split_names(type_map)),
    )
    content = chosen.to_json()
    if as_json:
        print(json.dumps(content))
        return
    Console().print(selection_table(content))
    print(f"written  {output}")


_LEARN = configuration.LearnConfig


@app.command()
def learn(
    train: Annotated[list[str] | None, typer.Argument(help=about(configuration.DataConfig, "train"))] = None,
    start: Annotated[list[str] | None, typer.Option(help=about(_LEARN, "start"))] = None,
    labeller: Annotated[str | None, typer.Option(help=about(_LEARN, "labeller"))] = None,
    valid: Annotated[list[str] | None, typer.Option(help=about(configuration.DataConfig, "valid"))] = None,
    test: Annotated[list[str] | None, typer.Option(help=about(configuration.DataConfig, "test"))] = None,
    model: Annotated[str | None, typer.Option(help=about(configuration.ModelConfig, "model"))] = None,
    method: Annotated[str | None, typer.Option(help=about(configuration.MethodConfig, "name"))] = None,
    rank: Rank = None,
    epochs: Epochs = None,
    rounds: Annotated[int | None, typer.Option(help=about(_LEARN, "rounds"))] = None,
    labels: Annotated[int | None, typer.Option(help=about(_LEARN, "labels"))] = None,
    batch: Annotated[int | None, typer.Option(help=about(_LEARN, "batch"))] = None,
    target_forces: Annotated[float | None, typer.Option(help=about(_LEARN, "target_forces"))] = None,
    forces_std: Annotated[float | None, typer.Option(help=about(_LEARN, "forces_std"))] = None,
    temperature: Annotated[float | None, typer.Option(help=about(_LEARN, "temperature"))] = None,
    final_temperature: Annotated[float | None, typer.Option(help=about(_LEARN, "final_temperature"))] = None,
    picoseconds: Annotated[float | None, typer.Option(help=about(_LEARN, "picoseconds"))] = None,
    out: Annotated[str, typer.Option(help="Folder of all rounds, the runs in them and the report.")] = "learned",
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
    as_json: Json = False,
) -> None:
    """Dynamics, labels where the model is not sure, and training, in turns.

    The same command goes on after an interruption.
    """
    options: dict[str, Any] = {
        "data": data_options(
            *(train, valid, test),
            energy_key=energy_key,
            forces_key=forces_key,
            stress_key=stress_key,
            type_map=type_map,
        ),
        "model": {"model": model, "head": head, "device": device},
        "method": {"name": method, "rank": rank},
        "training": {"epochs": epochs},
        "output": {"run": out},
        "learn": {
            "start": start or None,
            "labeller": labeller,
            "rounds": rounds,
            "labels": labels,
            "batch": batch,
            "target_forces": target_forces,
            "forces_std": forces_std,
            "temperature": temperature,
            "final_temperature": final_temperature,
            "picoseconds": picoseconds,
        },
    }
    resolved = configuration.load_config(config, settings or (), options)
    from forcetune.reports.learn_page import round_table
    from forcetune.runs.learn import run_learn, to_json

    learned = run_learn(resolved, inputs=() if config is None else (config,))
    if as_json:
        print(to_json(learned))
        return
    Console().print(round_table(learned.record))
    print(f"ended    {learned.record.status}: {learned.record.reason}\nreport   {learned.page}")
    print(f"in ASE   forcetune.calculator({str(learned.run)!r}, uncertainty=True)")
