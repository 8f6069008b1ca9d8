"""Calibrated uncertainty as tables for the terminal and as a plot, and what was selected to be labelled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from forcetune.errors import InputError
from forcetune.reports.plots import AFTER, BEFORE, style
from forcetune.reports.tables import rich_table
from forcetune.reports.texts import MISSING, count_text, number_text
from forcetune.utils.files import atomic_path

QUANTITIES = (
    ("energy_per_atom", "Energy", "meV/atom"),
    ("forces", "Force components", "meV/Å"),
    ("forces_of_atoms", "Force lengths", "meV/Å"),
)
PLOT_FORMATS = (".png", ".svg", ".pdf")


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.0f} %"


def scales_table(record: Mapping[str, Any]) -> Table:
    """What a calibration learned, for the terminal.

    Args:
        record: as ``forcetune calibrate --json`` prints it.
    """
    title = f"{record['kind']}, calibrated on {count_text(record['n_valid'])} frames"
    table = rich_table(title, ("quantity",), ("scale α", "frames", "intervals up to"))
    for key, name, _ in QUANTITIES:
        one = record["calibrations"].get(key)
        if one is not None:
            known = [float(level) for level, value in one["quantiles"].items() if value is not None]
            reached = _percent(max(known, default=None))
            table.add_row(name, number_text(one["scale"]), count_text(one["n_frames"]), reached)
    return table


def coverage_table(uncertainty: Mapping[str, Any]) -> Table:
    """How many errors lie within intervals that shall hold a given share, for the terminal.

    Args:
        uncertainty: that part of what ``forcetune evaluate --uncertainty --json`` prints. The last columns are the
            mean half width of conformal intervals in meV, rank correlation, and error over deviation.
    """
    title = f"{uncertainty['kind']}, calibrated on {count_text(uncertainty['calibrated_on'])} frames"
    columns = ("level", "raw", "scaled", "conformal", "±", "rank", "RMSE/σ")
    table = rich_table(title, ("quantity",), columns)
    for key, name, unit in QUANTITIES:
        one = uncertainty.get(key)
        if one is None:
            continue
        first = [number_text(one["correlation"]), number_text(one["ratio"])]
        heads = [name, unit]
        for row in one["coverage"]:
            width = MISSING if row["half_width"] is None else number_text(1e3 * row["half_width"])
            cells = [_percent(row[part]) for part in ("level", "before", "after", "conformal")]
            table.add_row(heads.pop(0) if heads else "", *cells, width, *first)
            first = ["", ""]
        table.add_section()
    return table


def check_plot(path: Path) -> None:
    """
    Raises:
        InputError: the file's ending is none of a plot.
    """
    if path.suffix.lower() not in PLOT_FORMATS:
        raise InputError(f"{path}: a plot is written as {', '.join(PLOT_FORMATS)}; choose one of these endings.")


def reliability_figure(uncertainty: Mapping[str, Any]) -> Figure:
    """Share of errors within normal intervals against the share that these shall hold."""
    shown = [(key, name) for key, name, _ in QUANTITIES if uncertainty.get(key) is not None]
    with style():
        figure = Figure(figsize=(3.0 * max(1, len(shown)), 3.1), layout="constrained")
        for axes, (key, name) in zip(figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown, strict=False):
            levels, before, after = zip(*uncertainty[key]["curve"], strict=True)
            axes.plot((0, 1), (0, 1), color="#777777", linewidth=0.8)
            axes.plot(levels, before, color=BEFORE, label="uncalibrated")
            axes.plot(levels, after, color=AFTER, label="calibrated")
            points = [(row["level"], row["conformal"]) for row in uncertainty[key]["coverage"]]
            points = [point for point in points if point[1] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o", color=AFTER, markersize=4, label="conformal")
            axes.set(xlabel="share asked for", ylabel="share within", xlim=(0, 1), ylim=(0, 1), title=name)
            axes.set_aspect("equal")
            axes.legend(loc="upper left")
    return figure


def write_reliability(path: Path, uncertainty: Mapping[str, Any]) -> None:
    """Write :func:`reliability_figure` to a file, atomically.

    Raises:
        InputError: as :func:`check_plot`, or the file cannot be written.
    """
    check_plot(path)
    figure = reliability_figure(uncertainty)
    with style(), atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def selection_table(selection: Mapping[str, Any]) -> Table:
    """What was chosen, for the terminal.

    Args:
        selection: as ``forcetune select --json`` prints it.
    """
    title = (
        f"{count_text(len(selection['chosen']))} of {count_text(selection['n_pool'])} structures; "
        f"{count_text(selection['n_labelled'])} labelled before, {count_text(selection['n_excluded'])} of the pool "
        "among them"
    )
    table = rich_table(title, ("rank", "structure", "composition"), ("score", "to labelled", "σ, meV/atom"))
    for one in selection["chosen"]:
        deviation = MISSING if one["energy_std"] is None else number_text(1e3 * one["energy_std"])
        where = Text(f"{Path(one['file']).name} {one['frame']}")
        distance = number_text(one["nearest_labelled"])
        table.add_row(str(one["rank"]), where, one["composition"], number_text(one["score"]), distance, deviation)
    return table
