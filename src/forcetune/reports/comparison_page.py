"""A comparison of methods as a table for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from forcetune._version import __version__
from forcetune.reports.comparison import ERRORS, Comparison
from forcetune.reports.comparison_plots import comparison_curves, comparison_parity
from forcetune.reports.learning_curve import Curve, curve_head, curve_plots, curve_rows
from forcetune.reports.page import render_page
from forcetune.reports.tables import comparison_table, rich_table
from forcetune.reports.texts import MISSING, bytes_text, count_text, number_text
from forcetune.runs.metrics import read_metrics
from forcetune.runs.predictions import read_predictions
from forcetune.utils.files import write_text

PAGE_NAME = "comparison.html"


def table(comparison: Comparison) -> Table:
    """For the terminal."""
    return comparison_table(_title(comparison), _head(comparison), _rows(comparison))


def target_note(comparison: Comparison) -> str:
    """What the star in the table means."""
    return f"* until the validation loss was {number_text(comparison.target_loss)}, the lowest that all runs reached."


def _title(comparison: Comparison) -> str:
    named = {"test": "test frames", "valid": "validation frames"}
    frames = named.get(comparison.split, f"frames of {comparison.split}")
    return f"Mean absolute errors on the {frames}"


def _head(comparison: Comparison) -> list[str]:
    return ["method", "E, meV/atom", "F, meV/Å", "trained", "adapter", "s/step", "epochs*"]


def _rows(comparison: Comparison) -> list[list[str]]:
    zero = comparison.zero_shot
    energy, forces = (zero.get(key) for key in (ERRORS[0], ERRORS[2]))
    rows = [["zero-shot", *(MISSING if v is None else number_text(v) for v in (energy, forces)), "0", "", "", ""]]
    for method in comparison.methods:
        errors = [method.errors[key].text() if key in method.errors else MISSING for key in (ERRORS[0], ERRORS[2])]
        epochs = method.epochs_to_target
        rows.append(
            [
                method.name,
                *errors,
                count_text(method.trainable),
                bytes_text(method.adapter_bytes),
                number_text(method.seconds_per_step),
                MISSING if epochs is None else f"{epochs.mean:.0f}",
            ]
        )
    return rows


def learning_table(curves: Sequence[Curve]) -> Table:
    """Learning curves, for the terminal."""
    table = rich_table("Errors by the number of training frames", curve_head()[:4], curve_head()[4:])
    for row in curve_rows(curves):
        table.add_row(*row)
    return table


def write_comparison(
    folder: Path, comparison: Comparison, runs: Mapping[str, Mapping[int, Path]], learning: Sequence[Curve] = ()
) -> Path:
    """Write ``comparison.html``, one page that opens offline, and return its path.

    Args:
        folder: of the comparison.
        comparison: its figures.
        runs: method → seed → run folder, in ``folder``.
        learning: errors by the number of training frames.
    """
    first = comparison.methods[0]
    spread = "" if len(first.seeds) == 1 else f", mean ± standard deviation over {len(first.seeds)} seeds"
    page = render_page(
        "comparison.html",
        title="Comparison of methods",
        brand="Comparison of methods",
        methods=[method.name for method in comparison.methods],
        reason=comparison.reason,
        errors_title=_title(comparison),
        head=_head(comparison),
        rows=_rows(comparison),
        table_note=f"{first.steps:,} steps each{spread}. {target_note(comparison)}",
        curves=_curves(comparison, runs),
        learning_head=curve_head(),
        learning_rows=curve_rows(learning),
        learning_plots=curve_plots(learning),
        parity=_parity(comparison, runs),
        runs=[
            (path.relative_to(folder).as_posix(), f"{name}, seed {seed}")
            for name, seeds in runs.items()
            for seed, path in seeds.items()
        ],
        footer=f"Written by forcetune {__version__}.",
    )
    write_text(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def _curves(comparison: Comparison, runs: Mapping[str, Mapping[int, Path]]) -> list[Any]:
    metrics = {
        name: [table for path in seeds.values() if (table := read_metrics(path / "metrics.csv")) is not None]
        for name, seeds in runs.items()
    }
    return comparison_curves(metrics, comparison.target_loss)


def _parity(comparison: Comparison, runs: Mapping[str, Mapping[int, Path]]) -> list[tuple[Any, str]]:
    """A plot of the first seed of each method, with the method's name."""
    plots = []
    for name, seeds in runs.items():
        predictions = read_predictions(next(iter(seeds.values())) / "predictions.npz")
        plot = None if predictions is None else comparison_parity(predictions, comparison.split, name)
        if plot is not None:
            plots.append((plot, name))
    return plots
