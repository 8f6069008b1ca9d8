"""The plots of a comparison: all methods in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from forcetune.reports.plots import AFTER, BEFORE, VECTOR_POINTS, log_axis, style, svg
from forcetune.runs.metrics import Metrics

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c6d31", "#7f7f7f")


def comparison_curves(runs: Mapping[str, Sequence[Metrics]], target: float) -> list[Markup]:
    """Validation loss and force error of several methods over the epochs: the mean over seeds, and their range.

    Args:
        runs: method → one table for each seed.
        target: loss that all reached, for a line.
    """
    panels = (("valid_loss", "validation loss"), ("valid_forces_mae_mev_per_ang", "forces MAE\n(meV/Å)"))
    figures = []
    with style():
        for column, title in panels:
            figure = Figure(figsize=(4.9, 3.9), layout="constrained")
            axes = figure.subplots()
            for index, (name, tables) in enumerate(runs.items()):
                length = min(len(table["epoch"]) for table in tables)
                values = np.stack([table[column][:length] for table in tables])
                known = np.isfinite(values).all(axis=0)
                if not known.any():
                    continue
                epochs, colour = tables[0]["epoch"][:length][known], SERIES[index % len(SERIES)]
                axes.plot(epochs, values[:, known].mean(axis=0), color=colour, label=name)
                low, high = values[:, known].min(axis=0), values[:, known].max(axis=0)
                axes.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)
            if column == "valid_loss":
                axes.axhline(target, color=BEFORE, linewidth=1.0, linestyle=(0, (4, 2)), label="reached by all")
            log_axis(axes)
            axes.set_ylabel(title)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.legend(loc="upper right", handlelength=1.4)
            figures.append(svg(figure, f"{title} of all methods by epoch".replace("\n", " ")))
    return figures


def comparison_parity(arrays: Mapping[str, NDArray], split: str, name: str) -> Markup | None:
    """Predicted force components against labels, before and after; None where there are none."""
    label = arrays.get(f"{split}/reference/forces")
    if label is None or f"{split}/after/forces" not in arrays:
        return None
    labels = np.asarray(label, dtype=np.float64).ravel()
    chosen = np.flatnonzero(np.isfinite(labels))
    if not chosen.size:
        return None
    if chosen.size > VECTOR_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, VECTOR_POINTS, replace=False))
    with style():
        figure = Figure(figsize=(3.3, 3.3), layout="constrained")
        axes = figure.subplots()
        for when, colour in (("before", BEFORE), ("after", AFTER)):
            values = np.asarray(arrays[f"{split}/{when}/forces"], dtype=np.float64).ravel()
            axes.scatter(labels[chosen], values[chosen], s=2.5, color=colour, alpha=0.4, linewidths=0, rasterized=True)
        ends = float(labels[chosen].min()), float(labels[chosen].max())
        axes.plot(ends, ends, color="#777777", linewidth=0.8, zorder=1)
        axes.set(xlabel="label (eV/Å)", ylabel="predicted (eV/Å)", xlim=ends, ylim=ends)
        return svg(figure, f"Forces of {name} against labels")
