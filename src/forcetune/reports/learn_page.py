"""The page and the table of `forcetune learn`: error and uncertainty by round, labels, and why dynamics ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from forcetune._version import __version__
from forcetune.config import RunConfig
from forcetune.reports.page import render_page
from forcetune.reports.plots import AFTER, INK, MARK, log_axis, style, svg
from forcetune.reports.tables import rich_table
from forcetune.reports.texts import MISSING, number_text
from forcetune.runs.learn_results import LearnRecord, RoundRecord
from forcetune.utils.files import write_text

PAGE_NAME = "learn.html"
FORCES, ENERGY = "forces_mae_mev_per_ang", "energy_mae_mev_per_atom"
RMSE, EXPECTED = "forces_rmse_mev_per_ang", "forces_std_mev_per_ang"
ENDINGS = {
    "length": "full length",
    "uncertainty": "uncertainty",
    "watch": "watch",
    "broken": "broke down",
}
STATUS_CLASSES = {"target reached": "good", "sure everywhere": "good", "failures": "bad"}


def write_learn_page(folder: Path, record: LearnRecord, config: RunConfig) -> Path:
    """Write ``learn.html``, one page that opens offline, and return its path.

    Args:
        folder: of the loop.
        record: what it did.
        config: its options.
    """
    page = render_page(
        "learn.html",
        title="Learning by dynamics",
        brand="Learning by dynamics",
        chain=[("model", config.model.model), ("method", config.method.name), ("labels by", record.labeller)],
        status=record.status,
        status_class=STATUS_CLASSES.get(record.status, ""),
        facts=[
            f"{len(record.rounds) - 1} rounds after the first fit",
            f"{record.labels} labels",
            record.reason,
        ],
        head=round_head(record),
        rows=round_rows(record),
        plots=[plot for plot in (_error_plot(record), _uncertainty_plot(record)) if plot is not None],
        dynamics=_dynamics_rows(record),
        endings=_endings(record),
        failed=[
            [str(one.number), str(failure.number), failure.reason] for one in record.rounds for failure in one.failed
        ],
        options=_options(record, config),
        runs=[
            (f"rounds/{one.number:02d}/run/report.html", f"round {one.number}")
            for one in record.rounds
            if one.train_frames
        ],
        footer=f"Written by forcetune {__version__}.",
    )
    write_text(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def round_table(record: LearnRecord) -> Table:
    """For the terminal."""
    head, wide = round_head(record), ("failed", "dynamics, ps", "beyond")
    shown = [index for index, name in enumerate(head) if name not in wide]
    table = rich_table("Force errors and uncertainty σ by round, meV/Å", (), [head[index] for index in shown])
    for row in round_rows(record):
        table.add_row(*(row[index] for index in shown))
    return table


def _splits(record: LearnRecord) -> list[str]:
    """Splits with errors of forces, but for training frames."""
    names = dict.fromkeys(name for one in record.rounds for name in one.errors if name != "train")
    return [name for name in names if any(one.errors.get(name, {}).get(FORCES) is not None for one in record.rounds)]


def round_head(record: LearnRecord) -> list[str]:
    """Columns of the table."""
    return [
        "round",
        "frames",
        "labels",
        "failed",
        "dynamics, ps",
        "mean σ",
        "beyond",
        "new, before",
        "expected",
        *_splits(record),
    ]


def round_rows(record: LearnRecord) -> list[list[str]]:
    """For the terminal and the page."""
    rows = []
    for one in record.rounds:
        looks = sum(trajectory.looks for trajectory in one.dynamics)
        beyond = sum(trajectory.beyond for trajectory in one.dynamics)
        length = sum(trajectory.picoseconds for trajectory in one.dynamics)
        rows.append(
            [
                str(one.number),
                str(one.train_frames) if one.train_frames else MISSING,
                str(one.labelled) if one.number else "",
                str(len(one.failed)) if one.number else "",
                f"{length:.2f}" if one.dynamics else "",
                number_text(1000 * _mean_std(one)) if looks else "",
                f"{100 * beyond / looks:.0f} %" if looks else "",
                _error(one.new, RMSE),
                _error(one.new, EXPECTED),
                *(_error(one.errors.get(name, {}), FORCES) for name in _splits(record)),
            ]
        )
    return rows


def _error(errors: dict[str, Any], key: str) -> str:
    value = errors.get(key)
    return "" if value is None else number_text(value)


def _mean_std(one: RoundRecord) -> float:
    """Mean uncertainty over all looks of a round, eV/Å."""
    looks = sum(trajectory.looks for trajectory in one.dynamics)
    return sum(trajectory.mean_std * trajectory.looks for trajectory in one.dynamics) / max(1, looks)


def _error_plot(record: LearnRecord) -> Markup | None:
    """Force errors on every split, and on new frames before they were trained on, by round."""
    series = {
        name: [(one.number, one.errors.get(name, {}).get(FORCES)) for one in record.rounds] for name in _splits(record)
    }
    series["new frames, before training on them"] = [(one.number, one.new.get(FORCES)) for one in record.rounds]
    return _plot(series, "force MAE (meV/Å)", "Force errors by round")


def _uncertainty_plot(record: LearnRecord) -> Markup | None:
    """Mean and largest uncertainty along the dynamics of each round, and the bound."""
    rounds = [one for one in record.rounds if any(trajectory.looks for trajectory in one.dynamics)]
    series = {
        "mean over the dynamics": [(one.number, 1000 * _mean_std(one)) for one in rounds],
        "largest": [(one.number, 1000 * max(part.largest_std for part in one.dynamics)) for one in rounds],
    }
    bound = None if record.bound is None else 1000 * record.bound
    return _plot(series, "uncertainty of a force (meV/Å)", "Uncertainty along the dynamics by round", bound)


def _plot(
    series: dict[str, list[tuple[int, Any]]], title: str, caption: str, bound: float | None = None
) -> Markup | None:
    known = {name: [(x, float(y)) for x, y in points if y is not None and y > 0] for name, points in series.items()}
    known = {name: points for name, points in known.items() if points}
    if not known:
        return None
    with style():
        figure = Figure(figsize=(4.9, 3.7), layout="constrained")
        axes = figure.subplots()
        for (name, points), colour in zip(known.items(), (AFTER, MARK, INK, "#009e73", "#cc79a7") * 4, strict=False):
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=name)
        if bound is not None:
            axes.axhline(bound, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), label="bound")
        log_axis(axes)
        axes.set(xlabel="round", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.margins(y=0.25)
        axes.legend(loc="best", handlelength=1.6)
        return svg(figure, caption)


def _dynamics_rows(record: LearnRecord) -> list[list[str]]:
    return [
        [
            f"round {one.number}, {trajectory.number}",
            ENDINGS[trajectory.ended] + (f": {trajectory.reason}" if trajectory.reason else ""),
            str(trajectory.start),
            f"{trajectory.picoseconds:.2f}",
            f"{trajectory.final_temperature_k:.0f}",
            number_text(1000 * trajectory.largest_std),
            str(trajectory.collected),
        ]
        for one in record.rounds
        for trajectory in one.dynamics
    ]


def _endings(record: LearnRecord) -> list[list[str]]:
    """How many dynamics of each round ended how."""
    return [
        [str(one.number), *(str(sum(part.ended == name for part in one.dynamics) or "") for name in ENDINGS)]
        for one in record.rounds
        if one.dynamics
    ]


def _options(record: LearnRecord, config: RunConfig) -> Sequence[tuple[str, str]]:
    options = config.learn
    final = options.temperature if options.final_temperature is None else options.final_temperature
    target = options.target_forces
    return [
        ("Bound of the uncertainty", MISSING if record.bound is None else f"{record.bound:.3g} eV/Å"),
        ("Dynamics end at", f"{options.stop:g} times the bound"),
        ("Novelty", "" if options.novelty is None else f"dynamics end above {options.novelty:g}"),
        ("Largest force", f"{options.largest_force:g} eV/Å"),
        ("Dynamics", f"{options.walkers} a round, {options.picoseconds:g} ps, {options.temperature:g} to {final:g} K"),
        ("Least distance of structures", f"{options.apart:g}"),
        ("Labels", f"{options.batch} a round" + ("" if options.labels is None else f", {options.labels} at most")),
        ("Target", "" if target is None else f"force error {target:g} meV/Å"),
        ("Start structures", ", ".join(options.start)),
        ("Training frames", ", ".join(config.data.train)),
    ]
