"""The command ``forcetune mace-train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from forcetune.cli.app import app, errors_to
from forcetune.utils.parsing import printable

if TYPE_CHECKING:
    from forcetune.cli.mace_train.translate import Translation
    from forcetune.runs.fit import Run


@app.command(
    "mace-train",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def mace_train(context: typer.Context) -> None:
    """Fine-tune with the arguments of mace_run_train; --help lists them and what becomes of each."""
    from forcetune.cli.mace_train.equivalent import fit_line, fit_yaml
    from forcetune.cli.mace_train.parsing import build_parser, parse_arguments

    if not context.args or {"-h", "--help"} & set(context.args):
        print(build_parser().format_help(), end="")
        return
    arguments = parse_arguments(context.args)
    from forcetune.cli.mace_train.translate import translate

    translation = translate(arguments)
    for sentence in translation.notes:
        errors_to.print(f"note: {printable(sentence)}", markup=False, highlight=False)
    print(f"equivalent command:\n{fit_line(translation.options)}\n\nequivalent configuration (--config):")
    print(fit_yaml(translation.options), flush=True)
    if translation.dry_run:
        return
    run = _run(translation)
    _print_errors(translation, run)
    _write_plain_model(translation, run)


def _run(translation: Translation) -> Run:
    """Train, or resume what an earlier call began."""
    from forcetune.cli.mace_train.restart import check_same_run
    from forcetune.runs.fit import resume, run_fit
    from forcetune.runs.folder import is_run_folder

    folder = Path(translation.config.output.run)
    if translation.resume and is_run_folder(folder):
        check_same_run(folder, translation.options)
        return resume(folder)
    return run_fit(translation.config)


def _print_errors(translation: Translation, run: Run) -> None:
    from forcetune.cli.mace_train.errors_table import table_in_mace_form
    from forcetune.reports.tables import error_table
    from forcetune.runs.predictions import PREDICTIONS_NAME, read_predictions

    console, errors = Console(), run.results["errors"]
    console.print(error_table(errors))
    labels = read_predictions(run.folder / PREDICTIONS_NAME)
    console.print(table_in_mace_form(translation.error_table, errors, labels))
    print(f"report   {run.folder / 'report.html'}\nadapter  {run.adapter}")


def _write_plain_model(translation: Translation, run: Run) -> None:
    """The file that mace would write, of methods that merge.

    Raises:
        ForcetuneError: it cannot be written.
    """
    from forcetune.adapters.methods import build_method
    from forcetune.deployment.merge import merge
    from forcetune.errors import ForcetuneError
    from forcetune.utils.distributed import place

    if not place().leads:
        return
    method, path = build_method(translation.config.method), translation.model_file
    if not method.mergeable:
        print(
            f"model    {path} is not written: gates of {method.name} do not merge. "
            f"In ASE: forcetune.calculator({str(run.folder)!r}); for LAMMPS and others: forcetune export"
        )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = merge(run.folder, path, trust=translation.config.model.trust)
    except (ForcetuneError, OSError) as error:
        # the adapter is there, but a script that goes on with the model must not
        raise ForcetuneError(
            f"{path}: is not written ({error}); the run is complete, so write it by `forcetune merge {run.folder} "
            f"--output {path}`."
        ) from error
    print(f"model    {merged.path}")
