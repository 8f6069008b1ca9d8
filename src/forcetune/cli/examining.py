"""Commands that look at models, data and runs: evaluate, doctor, methods, inspect."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from forcetune import config as configuration
from forcetune.cli.app import app
from forcetune.cli.options import (
    Device,
    EnergyKey,
    ForcesKey,
    Head,
    HessianKey,
    Json,
    MagforcesKey,
    Model,
    MomentsKey,
    PredictionDtype,
    Rank,
    SpinsKey,
    StressKey,
    Trust,
    TypeMap,
    UntrainedHead,
    about,
    split_names,
    without_none,
)
from forcetune.errors import InputError


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, adapter folder, hub:owner/name, model name or model file.")],
    data: Annotated[list[str], typer.Argument(help="Files of frames with labels; everything ASE reads.")],
    adapter: Annotated[
        str | None, typer.Option(help="Adapter on MODEL: run folder, adapter folder or hub:owner/name[@revision].")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--model", help="The base model of an adapter, if its file has moved.")
    ] = None,
    ensemble: Annotated[
        list[str] | None, typer.Option(help="Further runs on the same base: mean and spread of all, or a comparison.")
    ] = None,
    uncertainty: Annotated[
        bool,
        typer.Option("--uncertainty", help="Coverage of the intervals of a calibrated run (`forcetune calibrate`)."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --uncertainty: reliability plot to write, .png, .svg or .pdf.")
    ] = None,
    as_json: Json = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    moments_key: MomentsKey = None,
    spins_key: SpinsKey = None,
    magforces_key: MagforcesKey = None,
    hessian_key: HessianKey = None,
    type_map: TypeMap = None,
    head: UntrainedHead = None,
    device: Device = None,
    dtype: PredictionDtype = None,
    trust: Trust = False,
) -> None:
    """Errors of a model, or of base + adapter, on labelled frames."""
    from forcetune.reports.tables import calibration_table, evaluation_table
    from forcetune.runs.evaluate import evaluate as evaluate_model
    from forcetune.runs.evaluate import evaluate_ensemble

    options = without_none(
        base=base,
        energy_key=energy_key,
        forces_key=forces_key,
        stress_key=stress_key,
        moments_key=moments_key,
        spins_key=spins_key,
        magforces_key=magforces_key,
        type_map=split_names(type_map),
        device=device,
        dtype=dtype,
        trust=trust,
    )
    errors: dict[str, Any]
    several = bool(ensemble) or (Path(model) / "comparison.json").is_file()
    not_with_uncertainty = {
        "--head": head,
        "--stress-key": stress_key,
        "--moments-key": moments_key,
        "--spins-key": spins_key,
        "--magforces-key": magforces_key,
        "--hessian-key": hessian_key,
    }
    _check_evaluation(uncertainty, several, plot, adapter, head, hessian_key, not_with_uncertainty)
    if uncertainty:
        _evaluate_uncertainty(model, data, ensemble or (), options, plot, as_json)
        return
    if several:
        errors = evaluate_ensemble([model, *(ensemble or ())], data, **options)
    else:
        options |= without_none(hessian_key=hessian_key)
        errors = evaluate_model(model, data, adapter=adapter, head=head, **options).to_json()
    if as_json:
        print(json.dumps(errors))
        return
    Console().print(evaluation_table(errors))
    if "ensemble" in errors:
        Console().print(calibration_table(errors["ensemble"]))


def _check_evaluation(
    uncertainty: bool,
    several: bool,
    plot: Path | None,
    adapter: str | None,
    head: str | None,
    hessian_key: str | None,
    not_with_uncertainty: dict[str, Any],
) -> None:
    """
    Raises:
        InputError: options of `evaluate` that exclude each other.
    """
    if plot is not None and not uncertainty:
        raise InputError("--plot: shows how reliable uncertainties are; add --uncertainty.")
    if uncertainty:
        if adapter is not None:
            raise InputError("--adapter: with --uncertainty name the run in place of MODEL, and its base by --model.")
        for name, value in not_with_uncertainty.items():
            if value is not None:
                raise InputError(f"{name}: has no meaning with --uncertainty, which is of energies and forces.")
    elif several:
        if hessian_key is not None:
            raise InputError("--hessian-key: Hessians are those of one model; leave it out with --ensemble.")
        if head is not None:
            raise InputError("--head: adapters know their head; leave it out with --ensemble.")
        if adapter is not None:
            raise InputError("--adapter: name the adapter itself in place of MODEL, and its base by --model.")


def _evaluate_uncertainty(
    run: str, data: list[str], ensemble: Sequence[str], options: dict[str, Any], plot: Path | None, as_json: bool
) -> None:
    from forcetune.reports.tables import evaluation_table
    from forcetune.reports.uncertainty import check_plot, coverage_table, write_reliability
    from forcetune.runs.evaluate import evaluate_uncertainty

    if plot is not None:
        check_plot(plot)
    used = {
        name: value
        for name, value in options.items()
        if not name.startswith(("stress", "moments", "spins", "magforces"))
    }
    errors = evaluate_uncertainty(run, data, ensemble=ensemble, **used)
    if plot is not None:
        write_reliability(plot, errors["uncertainty"])
    if as_json:
        print(json.dumps(errors))
        return
    Console().print(evaluation_table(errors))
    Console().print(coverage_table(errors["uncertainty"]))
    print(f"cost     {errors['uncertainty']['cost_ratio']:.1f} plain predictions for energies and forces together")
    if plot is not None:
        print(f"plot     {plot}")


@app.command()
def doctor(
    data: Annotated[list[str], typer.Argument(help="Files of frames to train on; everything ASE reads.")],
    model: Annotated[
        str, typer.Option("--model", help=about(configuration.ModelConfig, "model", default=False))
    ] = "mini",
    valid: Annotated[list[str] | None, typer.Option(help="Files of frames to validate on.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Files of frames to test on.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Frames a batch, to estimate memory for.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Also write a report page to this file.")] = None,
    as_json: Json = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    spins_key: SpinsKey = None,
    hessian_key: HessianKey = None,
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
        **without_none(
            model=model,
            valid=valid or None,
            test=test or None,
            energy_key=energy_key,
            forces_key=forces_key,
            stress_key=stress_key,
            spins_key=spins_key,
            hessian_key=hessian_key,
            type_map=split_names(type_map),
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

    rows = compare_methods(model, elements=split_names(elements) or None, rank=rank, head=head, trust=trust)
    if as_json:
        print(json.dumps(rows))
    else:
        Console().print(methods_table(rows))


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(help="Run folder, adapter folder or hub:owner/name.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Frames to watch gates on; the training frames if not given.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Another run on the same base, to compare with.")] = None,
    base: Annotated[str | None, typer.Option("--model", help="The base model, if its file has moved.")] = None,
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
        print(
            f"of the weights changed by either run {alike['shared']:.1%} were changed by both "
            f"({alike['shared_by_chance']:.1%} expected by chance)"
        )
