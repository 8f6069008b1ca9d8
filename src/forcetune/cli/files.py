"""Commands that write or fetch files: merge, export, push, report, models, datasets."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from forcetune.cli.app import app, errors_to
from forcetune.cli.options import (
    ExportedDtype,
    Json,
    MergedDtype,
    Trust,
    UntrainedHead,
    finite,
)
from forcetune.errors import InputError

if TYPE_CHECKING:
    from forcetune.deployment.approximate import Approximation
    from forcetune.deployment.merge import Merged


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="Run folder, adapter folder or hub:owner/name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plain model to write, such as tuned.model.")],
    base: Annotated[str | None, typer.Option("--model", help="The base model, if its file has moved.")] = None,
    modality: Annotated[
        str | None,
        typer.Option(help="Name of the modality that method `modality` adds; that of the run's folder if not given."),
    ] = None,
    dtype: MergedDtype = None,
    trust: Trust = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Where gates do not merge: the nearest plain model, within --bound.")
    ] = False,
    bound: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=finite,
            help="With --approximate: largest mean absolute difference of forces on test frames, meV/Å; by default a "
            "fifth of the run's own error, or 5 where the frames have no labels.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="With --approximate: rank of the updates; by default all weights change.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="With --approximate: frames to fit it to, if not the run's own.")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="With --approximate: frames to test it on, if not the run's own.")
    ] = None,
) -> None:
    """Write base + adapter as a plain model of the base's own library, after proving that they are equal."""
    if approximate:
        if dtype is not None or modality is not None:
            raise InputError(
                "--approximate: writes in the base's own precision and modality; leave out --dtype and --modality."
            )
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
        _print_approximation(approximation)
        return
    if bound is not None or rank is not None or data or test:
        raise InputError("--bound, --rank, --data and --test belong to --approximate; add it, or leave them out.")
    from forcetune.deployment.merge import merge as merge_run

    _print_merged(merge_run(run, output, model=base, dtype=dtype, trust=trust, modality=modality))


def _print_merged(merged: Merged) -> None:
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


def _print_approximation(approximation: Approximation) -> None:
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
        str | None, typer.Argument(help="Run folder, adapter folder, hub:owner/name, or a model; nothing for a list.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="The program, such as lammps-mliap.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write, or folder for targets of several files.")
    ] = None,
    base: Annotated[str | None, typer.Option("--model", help="The base model, if its file has moved.")] = None,
    python: Annotated[
        str | None,
        typer.Option(help="Interpreter that has the library whose converter is called; by default forcetune's own."),
    ] = None,
    head: UntrainedHead = None,
    dtype: ExportedDtype = None,
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
def push(
    run: Annotated[str, typer.Argument(help="Run folder or adapter folder.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; created where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    branch: Annotated[str | None, typer.Option(help="Branch to write to; the main one if not given.")] = None,
) -> None:
    """Write an adapter to a hub with a model card, from where `hub:owner/name` reads it (HF_TOKEN, HF_ENDPOINT)."""
    from forcetune.deployment.hub import push as push_run

    pushed = push_run(run, repository, private=private, message=message, branch=branch)
    print(f"{pushed.url}\ncommit   {pushed.commit}\nin ASE   forcetune.calculator({pushed.reference!r})")


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
    folder: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
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
