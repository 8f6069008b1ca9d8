"""Tables for the terminal (rich)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from forcetune.reports.texts import (
    MISSING,
    QUANTITIES,
    count_text,
    error_rows,
    finite,
    layer_text,
    number_text,
    ratio,
    ratio_text,
    share_text,
    sort_splits,
)

GATE_COLUMNS = ("mean", "std", "low", "high")


def rich_table(title: str | None, left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table with columns of text on the left and of numbers on the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def error_table(errors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Errors before and after, for the terminal.

    Args:
        errors: split → ``before`` and ``after`` → errors, as in ``results.json``.
    """
    table = rich_table("Errors before and after", ("split", "error", "unit"), ("before", "after", "after/before"))
    for split in sort_splits(errors):
        name = split
        for quantity, unit, before, after in error_rows(errors[split]):
            ratio_cell = ratio_text(ratio(before, after))
            after_cell = Text(number_text(after), style="bold")
            table.add_row(Text(name), quantity, unit, number_text(before), after_cell, ratio_cell)
            name = ""
        table.add_section()
    return table


def demo_table(errors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Mean absolute errors of every test set, zero-shot and tuned, for the terminal.

    Args:
        errors: as in ``results.json``.
    """
    table = rich_table("Frames never trained on", ("set", "mean absolute error"), ("zero-shot", "tuned", "ratio"))
    for split in (name for name in sort_splits(errors) if name.startswith("test")):
        name = f"{split}, {count_text(errors[split]['after'].get('n_frames'))} frames"
        for quantity, unit, before, after in error_rows(errors[split]):
            if quantity.endswith("MAE") and unit != "meV":
                error = f"{quantity.removesuffix(' MAE')}, {unit}"
                bold = Text(number_text(after), style="bold")
                table.add_row(Text(name), error, number_text(before), bold, ratio_text(ratio(before, after)))
                name = ""
    return table


def comparison_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Methods side by side, for the terminal; the first column is text."""
    table = rich_table(title, head[:1], head[1:])
    for row in rows:
        table.add_row(*row)
    return table


def change_tables(changes: Mapping[str, Any]) -> list[Table]:
    """What an adapter changed, for the terminal: paths by relative change, and gates.

    Args:
        changes: as ``forcetune inspect --json`` prints them.
    """
    tables = []
    if changes["paths"]:
        head = ("|ΔW|/|W|", "changed", "stable rank", "weights")
        table = rich_table(f"{changes['method']}: changed weights", ("layer", "path"), head)
        for row in sorted(changes["paths"], key=lambda row: -row["relative"]):
            share = f"{100 * row['changed']:.3g} %"
            numbers = (number_text(row["relative"]), share, f"{row['stable_rank']:.1f}", count_text(row["size"]))
            table.add_row(layer_text(row["site"]), row["path"], *numbers)
        tables.append(table)
    if changes["gates"]:
        table = rich_table(f"{changes['method']}: gates", ("layer", "irrep", "does"), ("mean", "std", "5 %", "95 %"))
        for row in changes["gates"]:
            numbers = (f"{row[key]:+.3f}" if row["quantity"] == "shift" else f"{row[key]:.3f}" for key in GATE_COLUMNS)
            irrep = f"{row['channels']}x{row['irrep']}"
            table.add_row(layer_text(row["site"]), irrep, "×" if row["quantity"] == "gain" else "+", *numbers)
        tables.append(table)
    return tables


def evaluation_table(errors: Mapping[str, Any]) -> Table:
    """Errors of one model on one set of frames, for the terminal.

    Args:
        errors: as ``forcetune evaluate --json`` prints them.
    """
    frames = finite(errors.get("n_frames"))
    counted = None if frames is None else f"{count_text(frames)} frame{'' if frames == 1 else 's'}"
    table = rich_table(counted, ("quantity", "unit"), ("MAE", "RMSE"))
    for name, unit, key in QUANTITIES:
        values = [errors.get(key.format(measure)) for measure in ("mae", "rmse")]
        if any(finite(value) is not None for value in values):
            table.add_row(name, unit, *map(number_text, values))
    if not table.row_count:
        table.add_row("no labels", "", MISSING, MISSING)
    return table


def calibration_table(ensemble: Mapping[str, Any]) -> Table:
    """How well the spread of an ensemble predicts its errors, for the terminal.

    Args:
        ensemble: that part of what ``forcetune evaluate --ensemble --json`` prints.
    """
    columns = ("spread", "RMSE", "RMSE / spread", "rank correlation", "within 1 σ", "within 2 σ")
    table = rich_table(f"spread of {len(ensemble['members'])} adapters", ("quantity", "unit"), columns)
    for name, unit, key in (("Energy", "meV/atom", "energy_per_atom"), ("Forces", "meV/Å", "forces")):
        calibration = ensemble.get(key)
        if calibration is not None:
            values = [
                calibration[part] for part in ("mean_std", "rms_error", "ratio", "correlation", "within_1", "within_2")
            ]
            table.add_row(name, unit, *map(number_text, values))
    return table


def methods_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each method trains on a model, for the terminal: one line a method.

    Args:
        rows: ``method, trainable, total, coverage`` each, as ``forcetune methods --json`` prints them.
    """
    table = rich_table(None, ("method",), ("trainable", "share"))
    table.add_column("weights covered, by kind of site", ratio=1)
    for row in rows:
        trainable = row.get("trainable")
        name = Text(str(row.get("method", MISSING)), style="bold")
        share = share_text(trainable, row.get("total"))
        table.add_row(name, count_text(trainable), share, _coverage_text(row.get("coverage", ())))
    return table


def _coverage_text(coverage: Sequence[Mapping[str, Any]]) -> Text:
    """Kinds of sites by the update they get, with their share where it is not the whole kind."""
    by_update: dict[str, list[str]] = {}
    for entry in coverage:
        if not finite(entry.get("covered")):
            continue
        # hyper-parameters are the same along a method as a rule, and would bury the names
        update = " + ".join(part.split("(")[0].strip() for part in str(entry.get("update", "")).split(" + "))
        share = share_text(entry.get("covered"), entry.get("total"))
        kind = str(entry.get("kind"))
        by_update.setdefault(update, []).append(kind if share == "100 %" else f"{kind} ({share})")
    return Text("; ".join(f"{update} on {', '.join(kinds)}" for update, kinds in by_update.items()) or MISSING)
