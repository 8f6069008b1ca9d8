"""Errors by the number of training frames: gathered from runs, fitted, as JSON, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from forcetune.config import load_config
from forcetune.evaluation.power_law import Needed, PowerLaw, fit_power_law
from forcetune.reports.comparison_plots import SERIES
from forcetune.reports.plots import style, svg
from forcetune.reports.texts import MISSING, count_text, number_text
from forcetune.runs.results import read_results

QUANTITIES = {
    "forces_mae_mev_per_ang": ("Forces", "meV/Å"),
    "energy_mae_mev_per_atom": ("Energy", "meV/atom"),
}
HALF = 0.5
"""Where no target was given: what half the error of the largest set would take."""
Runs = Mapping[str, Mapping[int, Mapping[int, Path]]]
"""Method → training frames → seed → run folder."""


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """The learning curve of one method in one error.

    Attributes:
        method, quantity: names.
        frames, errors: of each run.
        law: the fit.
        needed: for the targets.
    """

    method: str
    quantity: str
    frames: tuple[int, ...]
    errors: tuple[float, ...]
    law: PowerLaw
    needed: tuple[Needed, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "quantity": self.quantity,
            "frames": list(self.frames),
            "errors": list(self.errors),
            "prefactor": self.law.prefactor,
            "exponent": self.law.exponent,
            "exponent_interval": list(self.law.exponent_interval),
            "needed": [asdict(one) for one in self.needed],
        }


def read_curves(runs: Runs, split: str, targets: Mapping[str, Sequence[float]]) -> list[Curve]:
    """Fit every method and error that the runs have.

    Args:
        runs: finished ones.
        split: frames whose errors are compared.
        targets: errors to reach, by quantity; half the error of the largest sets where there are none.

    Raises:
        InputError: a run is not finished, or there are too few for a fit.
    """
    curves = []
    for method, by_size in runs.items():
        for quantity in QUANTITIES:
            frames, errors = [], []
            for size, by_seed in by_size.items():
                for folder in by_seed.values():
                    pair = read_results(folder, load_config(folder / "config.yaml")).errors.get(split)
                    error = None if pair is None else (pair.after or {}).get(quantity)
                    if error is not None:
                        frames.append(size)
                        errors.append(float(error))
            if not errors:
                continue
            law = fit_power_law(frames, errors)
            asked = targets.get(quantity) or (HALF * float(law.at(np.array([float(law.largest)]))[0]),)
            needed = tuple(law.needed(target) for target in asked)
            curves.append(Curve(method, quantity, tuple(frames), tuple(errors), law, needed))
    return curves


def curve_head() -> list[str]:
    return ["method", "error", "falls as", "target", "takes", "95 %"]


def curve_rows(curves: Sequence[Curve]) -> list[list[str]]:
    """For the terminal and the page."""
    rows = []
    for curve in curves:
        name, unit = QUANTITIES[curve.quantity]
        low, high = curve.law.exponent_interval
        falls = f"n^−{curve.law.exponent:.2f} ({low:.2f} to {high:.2f})"
        for one in curve.needed:
            takes = MISSING if one.frames is None else f"{count_text(one.frames)} frames"
            takes += ", far outside" if one.extrapolated and one.frames is not None else ""
            ends = ["any number" if value is None else count_text(value) for value in (one.low, one.high)]
            rows.append(
                [curve.method, name, falls, f"{number_text(one.target)} {unit}", takes, f"{ends[0]} to {ends[1]}"]
            )
    return rows


def curve_plots(curves: Sequence[Curve]) -> list[Markup]:
    """Errors against frames, both logarithmic, with the fit and its band: one plot for each error."""
    plots = []
    for quantity, (name, unit) in QUANTITIES.items():
        shown = [curve for curve in curves if curve.quantity == quantity]
        if not shown:
            continue
        with style():
            figure = Figure(figsize=(4.9, 3.6), layout="constrained")
            axes = figure.subplots()
            for index, curve in enumerate(shown):
                colour = SERIES[index % len(SERIES)]
                grid = np.geomspace(min(curve.frames), 4 * max(curve.frames), 60)
                axes.plot(curve.frames, curve.errors, "o", color=colour, markersize=3.5, label=curve.method)
                axes.plot(grid, curve.law.at(grid), color=colour, linewidth=1.0)
                axes.fill_between(grid, *curve.law.band(grid), color=colour, alpha=0.15, linewidth=0)
            axes.set(xscale="log", yscale="log", xlabel="training frames", ylabel=f"{name} MAE ({unit})")
            axes.legend(loc="upper right")
            plots.append(svg(figure, f"{name} errors of all methods by the number of training frames"))
    return plots
