"""Numbers as people read them, tables for the terminal (rich) and tables for the page (HTML)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

SPLITS = ("test", "valid", "train")
"""The order in which splits are shown: what was never trained on comes first."""

QUANTITIES = (
    ("Energy", "meV/atom", "energy_{}_mev_per_atom"),
    ("Energy", "meV", "energy_{}_mev"),
    ("Forces", "meV/Å", "forces_{}_mev_per_ang"),
    ("Stress", "meV/Å³", "stress_{}_mev_per_ang3"),
    ("Moments", "μB", "moment_{}_mub"),
)
"""Name, unit, and key of an error with ``mae`` or ``rmse`` to be filled in."""

GATE_COLUMNS = ("mean", "std", "low", "high")

MISSING = "–"


class Html(str):
    """Text that is HTML already; every other text is escaped on its way into the page."""

    __slots__ = ()


def html(value: object) -> Html:
    """``value`` as HTML: :class:`Html` unchanged, anything else escaped."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def finite(value: object) -> float | None:
    """``value`` as a float, or None where it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        return None
    return float(value) if math.isfinite(value) else None


def number_text(value: object) -> str:
    """Three significant digits, but one decimal at most digits: 0.0123, 1.23, 123.4, 1,234.5."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    if abs(number) < 1e-4:
        return f"{number:.2e}"
    decimals = max(1, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{decimals}f}".replace("-", "−")


def count_text(value: object) -> str:
    """A count with thousands separators."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f}"


def share_text(part: object, whole: object) -> str:
    """``part`` of ``whole`` in percent."""
    share = ratio(whole, part)
    if share is None:
        return MISSING
    percent = 100 * share
    return f"{percent:.0f} %" if percent in (0, 100) or 10 <= percent < 99.5 else f"{percent:.2f} %"


def ratio(before: object, after: object) -> float | None:
    """after / before, or None where either is missing or ``before`` is zero."""
    first, second = finite(before), finite(after)
    return None if first is None or second is None or first == 0 else second / first


def ratio_text(value: float | None) -> str:
    """A ratio with two decimals, small ones with two significant digits."""
    if value is None:
        return MISSING
    if 0 < value < 0.0995:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def change_text(value: float | None) -> str:
    """A ratio after / before in words: ``7.1× smaller``, ``12 % larger``."""
    if value is None or value <= 0:
        return ""
    factor = max(value, 1 / value)
    if factor < 1.02:
        return "unchanged"
    if factor < 2:
        return f"{100 * abs(1 - value):.0f} % {'smaller' if value < 1 else 'larger'}"
    return f"{factor:.2g}× {'smaller' if value < 1 else 'larger'}" if factor < 10 else _big_change(factor, value < 1)


def _big_change(factor: float, smaller: bool) -> str:
    return f"{factor:,.0f}× {'smaller' if smaller else 'larger'}"


def duration_text(seconds: float) -> str:
    """Seconds in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit, size, below, rest in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {rest}"
    return f"{whole} s"


def bytes_text(size: int) -> str:
    """A file size in kB or MB (thousands)."""
    return f"{number_text(size / 1e6)} MB" if size >= 1_000_000 else f"{number_text(size / 1e3)} kB"


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested settings as names and values, in the order they come in."""
    pairs: list[tuple[str, object]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            pairs += flat(value, f"{name}: ")
        else:
            pairs.append((name, _setting_text(key, value)))
    return pairs


def _setting_text(key: str, value: object) -> object:
    if value is None or isinstance(value, bool):
        return {None: None, True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if key == "seconds" and (seconds := finite(value)) is not None:
        return duration_text(seconds)
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int) and key != "seed"
        else value
    )


def error_rows(pair: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, object, object]]:
    """(quantity, unit, before, after) of every error a split has: ``("Forces MAE", "meV/Å", 80.1, 9.3)``."""
    before, after = pair.get("before") or {}, pair.get("after") or {}
    rows = []
    for name, unit, key in QUANTITIES:
        for measure in ("mae", "rmse"):
            values = before.get(key.format(measure)), after.get(key.format(measure))
            if any(finite(value) is not None for value in values):
                rows.append((f"{name} {measure.upper()}", unit, *values))
    return rows


def in_order(errors: Mapping[str, Any]) -> list[str]:
    """Names of the splits, all test sets first."""

    def place(split: str) -> int:
        kind = "test" if split.startswith("test") else split
        return SPLITS.index(kind) if kind in SPLITS else len(SPLITS)

    return sorted(errors, key=place)


# Tables for the terminal


def _rich_table(title: str | None, left: Sequence[str], right: Sequence[str]) -> Table:
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
    table = _rich_table("Errors before and after", ("split", "error", "unit"), ("before", "after", "after/before"))
    for split in in_order(errors):
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
    table = _rich_table("Frames never trained on", ("set", "mean absolute error"), ("zero-shot", "tuned", "ratio"))
    for split in (name for name in in_order(errors) if name.startswith("test")):
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
    table = _rich_table(title, head[:1], head[1:])
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
        table = _rich_table(f"{changes['method']}: changed weights", ("layer", "path"), head)
        for row in sorted(changes["paths"], key=lambda row: -row["relative"]):
            share = f"{100 * row['changed']:.3g} %"
            numbers = (number_text(row["relative"]), share, f"{row['stable_rank']:.1f}", count_text(row["size"]))
            table.add_row(layer_text(row["site"]), row["path"], *numbers)
        tables.append(table)
    if changes["gates"]:
        table = _rich_table(f"{changes['method']}: gates", ("layer", "irrep", "does"), ("mean", "std", "5 %", "95 %"))
        for row in changes["gates"]:
            numbers = (f"{row[key]:+.3f}" if row["quantity"] == "shift" else f"{row[key]:.3f}" for key in GATE_COLUMNS)
            irrep = f"{row['channels']}x{row['irrep']}"
            table.add_row(layer_text(row["site"]), irrep, "×" if row["quantity"] == "gain" else "+", *numbers)
        tables.append(table)
    return tables


def layer_text(site: str) -> str:
    """A site's name without what every weight's name ends in."""
    return site.removesuffix(".weight").replace("symmetric_contractions.contractions", "contraction")


def evaluation_table(errors: Mapping[str, Any]) -> Table:
    """Errors of one model on one set of frames, for the terminal.

    Args:
        errors: as ``forcetune evaluate --json`` prints them.
    """
    frames = finite(errors.get("n_frames"))
    counted = None if frames is None else f"{count_text(frames)} frame{'' if frames == 1 else 's'}"
    table = _rich_table(counted, ("quantity", "unit"), ("MAE", "RMSE"))
    for name, unit, key in QUANTITIES:
        values = [errors.get(key.format(measure)) for measure in ("mae", "rmse")]
        if any(finite(value) is not None for value in values):
            table.add_row(name, unit, *map(number_text, values))
    if not table.row_count:
        table.add_row("no labels", "", MISSING, MISSING)
    return table


def calibration_table(ensemble: Mapping[str, Any]) -> Table:
    """How well the spread of an ensemble foretells its errors, for the terminal.

    Args:
        ensemble: that part of what ``forcetune evaluate --ensemble --json`` prints.
    """
    columns = ("spread", "RMSE", "RMSE / spread", "rank correlation", "within 1 σ", "within 2 σ")
    table = _rich_table(f"spread of {len(ensemble['members'])} adapters", ("quantity", "unit"), columns)
    for name, unit, key in (("Energy", "meV/atom", "energy_per_atom"), ("Forces", "meV/Å", "forces")):
        found = ensemble.get(key)
        if found is not None:
            values = [found[part] for part in ("mean_std", "rms_error", "ratio", "correlation", "within_1", "within_2")]
            table.add_row(name, unit, *map(number_text, values))
    return table


def methods_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each method trains on a model, for the terminal: one line a method.

    Args:
        rows: ``method, trainable, total, coverage`` each, as ``forcetune methods --json`` prints them.
    """
    table = _rich_table(None, ("method",), ("trainable", "share"))
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


# Tables for the page


def html_table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    text_columns: int = 1,
    css: str = "",
    total: bool = False,
) -> Html:
    """A table in a box that scrolls sideways on its own when the screen is narrow.

    Args:
        head: column headings.
        rows: cells; :class:`Html` goes in as it is, anything else is escaped.
        text_columns: so many columns from the left are text, the others numbers and set flush right.
        css: class of the table.
        total: whether the last row is a total.
    """

    def line(cells: Sequence[object], tag: str) -> str:
        made = []
        for index, cell in enumerate(cells):
            kind = "" if index < text_columns else ' class="n"'
            row_head = tag == "td" and index == 0
            name, scope = ("th", ' scope="row"') if row_head else (tag, ' scope="col"' if tag == "th" else "")
            made.append(f"<{name}{scope}{kind}>{html(cell)}</{name}>")
        return "".join(made)

    body = [line(row, "td") for row in rows]
    marked = [f"<tr{' class=total' if total and row is body[-1] else ''}>{row}</tr>" for row in body]
    return Html(
        f'<div class="scroll"><table class="{escape(css)}"><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{''.join(marked)}</tbody></table></div>"
    )


def html_errors(pair: Mapping[str, Mapping[str, Any]]) -> Html:
    """Errors of one split before and after, with a bar for the ratio."""
    rows = []
    for quantity, unit, before, after in error_rows(pair):
        change = ratio(before, after)
        name = Html(f"{html(quantity)} <small>{html(unit)}</small>")
        after_cell = Html(f"<b>{html(number_text(after))}</b>")
        rows.append((name, number_text(before), after_cell, Html(html(ratio_text(change)) + _bar(change))))
    return html_table(("", "Before", "After", "After / before"), rows, css="errors")


def _bar(change: float | None) -> str:
    if change is None:
        return ""
    worse = " worse" if change > 1 else ""
    width = 100 * min(1.0, max(0.0, change))
    return f'<span class="bar{worse}" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'


def html_force_errors(
    numbers: NDArray[np.integer],
    reference: NDArray[np.floating],
    before: NDArray[np.floating] | None,
    after: NDArray[np.floating] | None,
) -> Html:
    """Force errors by element, in meV/Å over all components that have labels.

    Args:
        numbers: (atoms,) atomic numbers.
        reference: (atoms, 3) labels, eV/Å; NaN where there are none.
        before, after: (atoms, 3) predictions, eV/Å; None when not computed.
    """
    rows = []
    for element in np.unique(numbers):
        here = numbers == element
        labelled = np.isfinite(reference[here])
        if not labelled.any():
            continue
        errors = [None if p is None else 1e3 * (p[here] - reference[here])[labelled] for p in (before, after)]
        mae = [None if e is None else float(np.abs(e).mean()) for e in errors]
        rmse = [None if e is None else float(np.sqrt((e**2).mean())) for e in errors]
        change = ratio(*mae)
        symbol = chemical_symbols[element] if 0 <= element < len(chemical_symbols) else f"Z={element}"
        after_cell = Html(f"<b>{html(number_text(mae[1]))}</b>")
        change_cell = Html(html(ratio_text(change)) + _bar(change))
        atoms = count_text(labelled.any(axis=1).sum())
        rows.append((symbol, atoms, number_text(mae[0]), after_cell, change_cell, *map(number_text, rmse)))
    head = ("Element", "Atoms", "MAE before", "MAE after", "After / before", "RMSE before", "RMSE after")
    return html_table(head, rows, css="errors")


def html_pairs(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values, two columns where there is room; entries without a value are left out."""
    made = [
        f"<div><dt>{html(name)}</dt><dd>{html(value)}</dd></div>"
        for name, value in pairs
        if value is not None and value != ""
    ]
    return Html(f"<dl>{''.join(made)}</dl>") if made else Html("")
