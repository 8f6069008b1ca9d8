"""Commands that write or fetch files: merge, report, models, datasets."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from forcetune.cli.app import app
from forcetune.cli.options import (
    Dtype,
    Json,
    Trust,
)
from forcetune.errors import InputError


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
) -> None:
    """Write base + adapter as a plain model of the base's own library, after proving that they are equal."""
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
