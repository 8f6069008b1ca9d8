"""The plots of the report, as SVG that stands inside the page.

Figures are matplotlib's own objects; pyplot and its global list of figures are never touched. Texts stay
texts, so that they take the page's font and can be searched and copied; each panel is a figure of its own, so
that a phone stacks them at full width.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from forcetune.adapters.summaries import PathChange
from forcetune.evaluation.summaries import Phonons
from forcetune.reports.texts import layer_text, number_text
from forcetune.runs.metrics import FloatArray, Metrics
from forcetune.runs.results import DynamicsSummary

# Blue and vermilion of the Okabe–Ito palette can be distinguished with every kind of colour vision.
BEFORE, AFTER, MARK, INK = "#9a9a9a", "#0072b2", "#d55e00", "#333333"
VECTOR_POINTS = 3_000
MOST_POINTS = 20_000


def style() -> AbstractContextManager[None]:
    """The look of all figures; matplotlib's settings are as before afterwards."""
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "forcetune",
            "font.size": 9.0,
            "axes.edgecolor": "#888888",
            "axes.linewidth": 0.7,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "text.color": INK,
            "xtick.color": "#555555",
            "ytick.color": "#555555",
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.5,
        }
    )


def learning_curves(metrics: Metrics, best_epoch: float | None, before: Mapping[str, float | None]) -> list[Markup]:
    """Loss with learning rate, and validation errors where there are any.

    Args:
        metrics: the run so far.
        best_epoch: epoch whose weights were kept, marked; None when there was no validation.
        before: errors on the validation frames before training, for a reference line.
    """
    with style():
        figures = [svg(_loss_figure(metrics, best_epoch), "Training and validation loss and learning rate by epoch")]
        errors = _error_curves_figure(metrics, best_epoch, before)
        if errors is not None:
            figures.append(svg(errors, "Validation errors of energies and forces by epoch"))
        if np.isfinite(metrics["zeros_of_wrapped"]).any():
            figures.append(svg(_sparsity_figure(metrics), "Share of the weights that did not change by epoch"))
    return figures


def _loss_figure(metrics: Metrics, best_epoch: float | None) -> Figure:
    figure = Figure(figsize=(4.7, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    _curve(upper, metrics, "train_loss", INK, "train")
    _curve(upper, metrics, "valid_loss", AFTER, "validation")
    log_axis(upper)
    upper.set_ylabel("loss")
    _curve(lower, metrics, "learning_rate", "#6b6b6b", "")
    rates = _positive(metrics["learning_rate"])
    if rates.size and rates.max() > 5 * rates.min():
        log_axis(lower)
    else:
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_locator(MaxNLocator(3))
        lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    lower.set_ylabel("learning rate")
    _epochs(lower, metrics)
    _mark_events((upper, lower), metrics, best_epoch)
    upper.legend(loc="upper right", handlelength=1.4)
    figure.align_ylabels()
    return figure


def _sparsity_figure(metrics: Metrics) -> Figure:
    figure = Figure(figsize=(4.7, 2.8), layout="constrained")
    axes = figure.subplots()
    for column, colour, name in (("zeros_of_wrapped", AFTER, "of the wrapped"), ("zeros_of_all", INK, "of all")):
        values = 100 * metrics[column]
        known = np.isfinite(values)
        axes.plot(metrics["epoch"][known], values[known], color=colour, label=name)
    axes.set_ylabel("unchanged weights (%)")
    axes.legend(loc="lower right", handlelength=1.4)
    _epochs(axes, metrics)
    return figure


def _error_curves_figure(
    metrics: Metrics, best_epoch: float | None, before: Mapping[str, float | None]
) -> Figure | None:
    columns = [
        (title, f"valid_{key}", before.get(key))
        for title, key in (
            ("energy MAE\n(meV/atom)", "energy_mae_mev_per_atom"),
            ("forces MAE\n(meV/Å)", "forces_mae_mev_per_ang"),
            ("stress MAE\n(meV/Å³)", "stress_mae_mev_per_ang3"),
            ("moments MAE\n(μB)", "moment_mae_mub"),
            ("magnetic F\n(meV/μB|rad)", "magforce_mae_mev"),
        )
        if _positive(metrics[f"valid_{key}"]).size
    ]
    if not columns:
        return None
    figure = Figure(figsize=(4.7, 4.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(columns), 1, sharex=True, squeeze=False)[:, 0])
    for axes, (title, column, start) in zip(panels, columns, strict=True):
        _curve(axes, metrics, column, AFTER, "validation")
        if start is not None and start > 0:
            axes.axhline(start, color=BEFORE, linewidth=1.2, linestyle=(0, (4, 2)), label="before training")
        log_axis(axes)
        axes.set_ylabel(title)
    _epochs(panels[-1], metrics)
    _mark_events(panels, metrics, best_epoch)
    panels[0].legend(loc="upper right", handlelength=1.6)
    figure.align_ylabels()
    return figure


def change_map(changes: Sequence[PathChange]) -> Markup:
    """Relative change ‖ΔW‖/‖W‖ of every path: a row for each layer, a column for each kind of path."""
    layers = list(dict.fromkeys(change.site for change in changes))
    paths = list(dict.fromkeys(re.sub(r"#\d+$", "", change.path) for change in changes))
    values = np.full((len(layers), len(paths)), np.nan)
    for change in changes:
        place = layers.index(change.site), paths.index(re.sub(r"#\d+$", "", change.path))
        # several couplings of one kind are shown by the largest
        values[place] = np.nanmax((values[place], 100 * change.relative))
    with style():
        width, height = 3.4 + 0.62 * len(paths), 1.0 + 0.27 * len(layers)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        largest = float(np.nanmax(values)) or 1.0
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1.25 * largest, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = value > 0.7 * largest
                text = f"{value:.2g}" if value >= 0.005 else "0"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="#fff" if dark else INK)
        axes.set_xticks(range(len(paths)), [path.replace("->", "→") for path in paths], rotation=40, ha="right")
        axes.set_yticks(range(len(layers)), [layer_text(layer) for layer in layers])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        return svg(figure, "Relative change of every path of every layer, percent")


def energy_over_time(dynamics: DynamicsSummary) -> Markup:
    """Total and potential energy of dynamics at constant energy."""
    with style():
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, values, colour, name in (
            (upper, dynamics.total_mev_per_atom, AFTER, "total"),
            (lower, dynamics.potential_mev_per_atom, INK, "potential"),
        ):
            axes.plot(dynamics.time_ps, values, color=colour, linewidth=1.0)
            axes.set_ylabel(f"{name}\n(meV/atom)")
        lower.set_xlabel("time (ps)")
        figure.align_ylabels()
        return svg(figure, "Total and potential energy of the dynamics by time")


def densities_of_states(phonons: Phonons) -> Markup:
    """Phonon densities of states before and after training."""
    with style():
        figure = Figure(figsize=(6.4, 2.9), layout="constrained")
        axes = figure.subplots()
        for frequencies, colour, name in ((phonons.base, BEFORE, "before"), (phonons.tuned, AFTER, "after")):
            if frequencies.density:
                axes.stairs(frequencies.density, phonons.edges_thz, color=colour, linewidth=1.2, label=name)
        axes.axvline(0, color="#777777", linewidth=0.8, zorder=1)
        axes.set(xlabel="frequency (THz), imaginary ones negative", ylabel="density of states (1/THz)")
        axes.set_ylim(bottom=0)
        axes.legend()
        return svg(figure, "Phonon densities of states before and after training")


def _positive(values: FloatArray) -> FloatArray:
    return values[np.isfinite(values) & (values > 0)]


def _curve(axes: Axes, metrics: Metrics, column: str, colour: str, label: str) -> None:
    values = metrics[column]
    known = np.isfinite(values) & (values > 0)
    if known.any():
        # Few points are shown as such: a line through one of them would be invisible.
        marker = "o" if known.sum() <= 25 else None
        axes.plot(metrics["epoch"][known], values[known], color=colour, label=label, marker=marker, markersize=3)


def log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.8 else tuple(range(1, 10))
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _epochs(axes: Axes, metrics: Metrics) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(metrics.stages) == 1:
        axes.set_xlim(metrics["epoch"][0] - 1, metrics["epoch"][0] + 1)


def _mark_events(panels: Sequence[Axes], metrics: Metrics, best_epoch: float | None) -> None:
    last, second = float(np.nanmax(metrics["epoch"])), metrics.second_stage
    for index, axes in enumerate(panels):
        first = index == 0
        if second is not None:
            axes.axvspan(second, last, color="#f3efe4", zorder=0, linewidth=0, label="second stage" if first else None)
        if best_epoch is not None:
            label = f"best: epoch {best_epoch:.0f}" if first else None
            axes.axvline(best_epoch, color=MARK, linewidth=1, linestyle=(0, (2, 2)), label=label)


def parity(arrays: Mapping[str, NDArray], split: str, quantity: str) -> tuple[Markup, str] | None:
    """Predictions against labels, before and after, with the differences below.

    Args:
        arrays: as from :func:`read_predictions`.
        split: name of the set of frames.
        quantity: ``energy_per_atom``, ``forces``, ``stress``, ``moments`` or ``magforces``.

    Returns:
        The figure and a note on what is not seen in it; None where there are no labels or no predictions.
    """
    reference = arrays.get(f"{split}/reference/{quantity}")
    if reference is None:
        return None
    labels = np.asarray(reference, dtype=np.float64).ravel()
    predictions = {
        name: np.asarray(arrays[f"{split}/{name}/{quantity}"], dtype=np.float64).ravel()
        for name in ("before", "after")
        if f"{split}/{name}/{quantity}" in arrays
    }
    known = np.isfinite(labels) & np.logical_and.reduce([np.isfinite(p) for p in predictions.values()] or [False])
    if not known.any():
        return None
    with style():
        panel = _ParityPanel(quantity, labels[known], {name: p[known] for name, p in predictions.items()})
        return svg(panel.figure, f"Parity plot of {quantity.replace('_', ' ')}, {split} frames"), panel.note


class _ParityPanel:
    """Draws one parity plot: the upper square prediction against label, the lower strip their difference."""

    NAMES: Mapping[str, tuple[str, str, str, float]] = {
        "energy_per_atom": ("energy", "eV/atom", "meV/atom", 1e3),
        "forces": ("force component", "eV/Å", "meV/Å", 1e3),
        "stress": ("stress component", "eV/Å³", "meV/Å³", 1e3),
        "moments": ("moment", "μB", "μB", 1.0),
        "magforces": ("magnetic force", "eV/μB|rad", "meV/μB|rad", 1e3),
    }
    """What it is, its unit, the unit of its errors, and how many of the latter are one of the former."""

    def __init__(self, quantity: str, labels: FloatArray, predictions: Mapping[str, FloatArray]) -> None:
        self.name, unit, self.unit, fine = self.NAMES[quantity]
        self.notes: list[str] = []
        centre = 0.0
        if quantity == "energy_per_atom":
            # Total energies differ in their last digits; the mean is taken off so that the axis shows them.
            centre = float(labels.mean())
            self.notes.append(f"Energies relative to the mean label, {centre:,.4f} eV/atom.".replace("-", "−"))
        small = np.ptp(labels) < 1.0
        self.scale, self.axis_unit = (fine, self.unit) if small else (1.0, unit)
        self.relative = "relative " if quantity == "energy_per_atom" else ""
        self.labels = (labels - centre) * self.scale
        self.predictions = {name: (values - centre) * self.scale for name, values in predictions.items()}
        self.errors = {name: fine * (values - labels) for name, values in predictions.items()}
        self.shown = self._thinned()
        self.figure = Figure(figsize=(4.7, 5.9))
        self._draw_parity(self.figure.add_axes((0.165, 0.345, 0.81, 0.81 * 4.7 / 5.9)))
        self._draw_differences(self.figure.add_axes((0.165, 0.085, 0.81, 0.205)))

    @property
    def note(self) -> str:
        """What a reader should know that the picture does not show."""
        return " ".join(self.notes)

    def _thinned(self) -> NDArray[np.intp]:
        count = len(self.labels)
        if count <= MOST_POINTS:
            return np.arange(count)
        self.notes.append(f"{MOST_POINTS:,} of {count:,} points drawn; the errors are those of all.")
        return np.sort(np.random.default_rng(0).choice(count, MOST_POINTS, replace=False))

    def _points(self, axes: Axes, values: Callable[[str], FloatArray]) -> None:
        many = len(self.shown) > VECTOR_POINTS
        size, alpha = (2.5, 0.35) if many else (9 if len(self.shown) > 300 else 16, 0.6)
        for name, colour in (("before", BEFORE), ("after", AFTER)):
            if name in self.predictions:
                x, y = self.labels[self.shown], values(name)[self.shown]
                axes.scatter(x, y, s=size, color=colour, alpha=alpha, linewidths=0, rasterized=many)

    def _draw_parity(self, axes: Axes) -> None:
        tight = np.concatenate([self.labels, *(v for n, v in self.predictions.items() if n == "after")])
        wide = np.concatenate([self.labels, *self.predictions.values()])
        # A foundation model can be far off by its reference energies; the frame then shows the labels.
        near = np.ptp(wide) <= 3 * max(float(np.ptp(tight)), 1e-12)
        seen = wide if near or "after" not in self.predictions else tight
        margin = 0.04 * float(np.ptp(seen)) or 1.0
        low, high = float(seen.min()) - margin, float(seen.max()) + margin
        axes.plot((low, high), (low, high), color="#777777", linewidth=0.8, zorder=1)
        self._points(axes, self.predictions.__getitem__)
        axes.set(
            xlim=(low, high),
            ylim=(low, high),
            ylabel=f"predicted {self.relative}{self.name} ({self.axis_unit})",
        )
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(labelbottom=False)
        outside = sum(int(((v < low) | (v > high)).sum()) for v in self.predictions.values())
        if outside:
            self.notes.append(f"{outside:,} grey points lie outside the frame.")
        for row, (name, colour) in enumerate((("before", "#6b6b6b"), ("after", AFTER))):
            if name in self.errors:
                error = self.errors[name]
                mae, rmse = np.abs(error).mean(), np.sqrt((error**2).mean())
                text = f"{name}: MAE {number_text(mae)}, RMSE {number_text(rmse)} {self.unit}"
                weight = "bold" if name == "after" else "normal"
                place = {"transform": axes.transAxes, "va": "top", "color": colour, "weight": weight}
                axes.text(0.03, 0.975 - 0.055 * row, text, **place)

    def _draw_differences(self, axes: Axes) -> None:
        largest = {name: float(np.abs(error).max()) for name, error in self.errors.items()}
        limit = max(largest.values())
        if "after" in largest:
            limit = min(limit, 6 * largest["after"])
        limit = 1.08 * limit or 1.0
        axes.axhline(0, color="#777777", linewidth=0.8, zorder=1)
        self._points(axes, self.errors.__getitem__)
        margin = self.figure.axes[0].get_xlim()
        axes.set(xlim=margin, ylim=(-limit, limit), xlabel=f"{self.relative}{self.name} label ({self.axis_unit})")
        axes.set_ylabel(f"error\n({self.unit})")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(4, symmetric=True))


def svg(figure: Figure, label: str) -> Markup:
    """The figure as SVG for the inside of a page: no header, no links, no fixed size, the page's own font."""
    stream = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", dpi=220, metadata=nothing, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    opening, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    rest = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", rest)
    rest = re.sub(r"<!--.*?-->|<style.*?</style>", "", rest, flags=re.DOTALL)
    # Several figures share the page: names that nothing refers to go, the others are made distinct.
    used = set(re.findall(r"[(\"]#([^)\"]+)[)\"]", rest))
    prefix = re.sub(r"\W+", "-", label.lower())
    rest = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", rest)
    rest = re.sub(
        r"([(\"])#([^)\"]+)([)\"])", lambda m: f"{m[1]}#{prefix}-{m[2]}{m[3]}" if m[2] in used else m[0], rest
    )
    return Markup(f'<svg role="img" aria-label="{escape(label)}" {box[0] if box else ""}>{rest}')
