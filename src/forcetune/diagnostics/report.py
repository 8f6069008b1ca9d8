"""The report of an examination of data: a list for the terminal, and one page that needs nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from forcetune._version import __version__
from forcetune.errors import InputError
from forcetune.reports.page import page
from forcetune.reports.plots import parity
from forcetune.reports.tables import (
    MISSING,
    Html,
    bytes_text,
    count_text,
    html,
    html_pairs,
    html_table,
    number_text,
    ratio,
)
from forcetune.utils.files import path_of, write_text

COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
TITLES = {"error": "Errors", "warning": "Warnings", "note": "Notes"}
MEANINGS = {
    "error": "training on these data surely goes wrong",
    "warning": "somebody should look",
    "note": "good to know",
}
SETS = {"train": "Training", "valid": "Validation", "test": "Test"}
QUANTITIES = {"energy": "Energy", "forces": "Forces", "stress": "Stress"}


def print_checkup(found: Mapping[str, Any], console: Console) -> None:
    """Print what was found, errors first, and how labels and model agree.

    Args:
        found: as ``forcetune doctor --json`` prints it.
        console: where to.
    """
    for item in found["findings"]:
        style = COLOURS[item["severity"]]
        where = _where(item)
        console.print(
            f"[{style}]{item['severity']}[/] [bold]{escape(item['code'])}[/]  {escape(where)}", soft_wrap=True
        )
        console.print(Text(item["message"]), highlight=False)
        console.print()
    rows = _agreement_rows(found["facts"])
    if rows:
        table = Table(title="Labels against the model", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name in ("set", "quantity"):
            table.add_column(name)
        for name in ("frames", "correlation", "label / model"):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*map(str, row))
        console.print(table)
    memory = _memory_text(found["facts"])
    if memory:
        console.print(f"memory   {memory}", highlight=False)
    console.print(f"found    {_counts(found)}", highlight=False)


def _where(item: Mapping[str, Any]) -> str:
    if not item["frames"]:
        return item["file"] or ""
    more = item["n_frames"] - len(item["frames"])
    named = ", ".join(map(str, item["frames"])) + (f" and {more:,} more" if more > 0 else "")
    return f"{item['file']}, frame{'' if item['n_frames'] == 1 else 's'} {named}"


def _counts(found: Mapping[str, Any]) -> str:
    notes = len(found["findings"]) - found["n_errors"] - found["n_warnings"]
    counts = (("error", found["n_errors"]), ("warning", found["n_warnings"]), ("note", notes))
    return ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in counts)


def _agreement_rows(facts: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for name, measures in facts.get("agreement", {}).items():
        for quantity, title in QUANTITIES.items():
            own = measures[quantity]
            if own is not None:
                correlation = f"{own['correlation']:.2f}".replace("-", "−")
                rows.append((name, title, count_text(own["n_frames"]), correlation, number_text(own["ratio"])))
    return rows


def _memory_text(facts: Mapping[str, Any]) -> str:
    memory = facts.get("memory")
    if memory is None:
        return ""
    scaled = f"scaled by edges from a measured step of {count_text(memory['measured_edges'])} edges"
    return (
        f"about {bytes_text(memory['estimate_bytes'])} for a step with the {memory['batch_size']} largest frames "
        f"({count_text(memory['batch_atoms'])} atoms, {count_text(memory['batch_edges'])} edges; {scaled}, all "
        "parameters trained)"
    )


def check_page(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        InputError: a page cannot be written there, or would replace a file that is none.
    """
    target = path_of(path)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file for the page, such as {target / 'checkup.html'}.")
    if target.exists() and target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target}: exists and is no HTML page; choose another name for the page.")


def write_checkup(
    path: str | os.PathLike[str], found: Mapping[str, Any], arrays: Mapping[str, NDArray] | None = None
) -> Path:
    """Write the page and return its path.

    Args:
        path: file to write.
        found: as ``forcetune doctor --json`` prints it.
        arrays: labels and predictions, for plots.

    Raises:
        InputError: the file cannot be written, or is one of something else.
    """
    check_page(path)
    facts = found["facts"]
    sections = [
        ("findings", "Findings", _findings(found)),
        ("agreement", "Labels against the model", _agreement(facts)),
        ("parity", "Predictions against labels", _parity(facts, arrays or {})),
        ("data", "Data", _data(facts)),
        ("memory", "Memory", _memory(facts)),
    ]
    footer = (
        f"Written by forcetune {__version__}. Energies in meV, forces in meV/Å. Frames are counted from 0. An error "
        "stops a fit; data.doctor=off lets it pass."
    )
    target = Path(path)
    write_text(target, page(f"Check-up of {_data_name(facts)}", _header(found), sections, footer=footer))
    return target


def _data_name(facts: Mapping[str, Any]) -> str:
    files = facts["sets"].get("train", {}).get("files", [])
    names = [Path(file).name for file in files]
    return "data" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _header(found: Mapping[str, Any]) -> Html:
    facts = found["facts"]
    steps = [("data", _data_name(facts))]
    if "model" in facts:
        steps.append(("compared with", facts["model"]["name"]))
    arrow = '<span class="arrow">→</span>'
    chain = arrow.join(f'<span class="step"><small>{html(kind)}</small>{html(name)}</span>' for kind, name in steps)
    css = "bad" if found["n_errors"] else "open" if found["n_warnings"] else "good"
    status = (
        "do not train on these" if found["n_errors"] else "look first" if found["n_warnings"] else "nothing against it"
    )
    frames = sum(own["n_frames"] for own in facts["sets"].values())
    shown = (f"{count_text(frames)} frames", _counts(found), f"forcetune {__version__}")
    line = "".join(f"<span>{html(fact)}</span>" for fact in shown)
    return Html(
        f'<header>\n<p class="brand">Data check-up</p>\n<h1>{chain}</h1>\n'
        f'<p class="facts"><span class="status {css}">{html(status)}</span>{line}</p>\n</header>'
    )


def _findings(found: Mapping[str, Any]) -> Html:
    parts = []
    for severity, title in TITLES.items():
        items = [item for item in found["findings"] if item["severity"] == severity]
        if not items:
            continue
        cards = "".join(_card(item) for item in items)
        parts.append(f"<h3>{title} <small>{MEANINGS[severity]}</small></h3>{cards}")
    return Html("".join(parts) or "<p>Nothing was found against these data.</p>")


def _card(item: Mapping[str, Any]) -> str:
    where = _where(item)
    place = f'<p class="where">{html(where)}</p>' if where else ""
    return (
        f'<div class="finding is-{item["severity"]}"><p class="code">{html(item["code"])}</p>'
        f"<div><p>{html(item['message'])}</p>{place}</div></div>"
    )


def _agreement(facts: Mapping[str, Any]) -> Html:
    rows = _agreement_rows(facts)
    if not rows:
        return Html("")
    head = ("Set", "Quantity", "Frames", "Correlation", "Label / model")
    note = (
        "Untouched model. Correlation of force and stress components, and of ranks of energies after composition; "
        "label / model is the ratio of typical sizes. A sound set has a correlation well above 0 and a ratio near 1."
    )
    text = str(html_table(head, [(SETS.get(row[0], row[0]), *row[1:]) for row in rows], text_columns=2, css="narrow"))
    text += f'<p class="note">{html(note)}</p>'
    for name, measures in facts["agreement"].items():
        if measures["elements"]:
            detail = f"{SETS.get(name, str(name)).lower()} frames, root mean square, meV/Å"
            text += f"<h3>Forces by element <small>{html(detail)}</small></h3>{_element_table(measures['elements'])}"
    return Html(text)


def _element_table(elements: Sequence[Mapping[str, Any]]) -> Html:
    rows = []
    for row in elements:
        share = ratio(row["label_rms_mev_per_ang"], row["error_rms_mev_per_ang"])
        width = 100 * min(1.0, share or 0.0)
        worse = " worse" if share is not None and share > 1 else ""
        bar = f'<span class="bar{worse}" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'
        percent = MISSING if share is None else f"{100 * share:.0f} %" if share < 10 else f"{share:.0f}×"
        rows.append(
            (
                row["symbol"],
                count_text(row["n_atoms"]),
                number_text(row["label_rms_mev_per_ang"]),
                number_text(row["error_rms_mev_per_ang"]),
                Html(html(percent) + bar),
            )
        )
    return html_table(("Element", "Atoms", "Labels", "Error of the model", "Share"), rows, css="errors")


def _parity(facts: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> Html:
    name = next((name for name in facts["sets"] if f"{name}/reference/forces" in arrays), None)
    if name is None:
        return Html("")
    found = [parity(arrays, name, quantity) for quantity in ("energy_per_atom", "forces")]
    figures = "".join(
        f"<figure>{item[0]}{f'<figcaption>{html(item[1])}</figcaption>' if item[1] else ''}</figure>"
        for item in found
        if item
    )
    if not figures:
        return Html("")
    text = (
        "frames, without those of far larger forces; before: the untouched model, its energies moved onto the labels "
        "by composition."
    )
    return Html(f'<p>{html(SETS.get(name, name))} {html(text)}</p><div class="grid">{figures}</div>')


def _data(facts: Mapping[str, Any]) -> Html:
    parts = []
    for name, own in facts["sets"].items():
        sizes = own["n_atoms"]
        atoms = None if sizes is None else f"{sizes[0]}" if sizes[0] == sizes[1] else f"{sizes[0]} to {sizes[1]}"
        keys = ", ".join(f"{label} from {key!r}" for label, key in own["keys"].items() if key)
        pairs = html_pairs(
            (
                ("Files", ", ".join(own["files"])),
                ("Frames", f"{count_text(own['n_frames'])}, {count_text(own['periodic'])} of them periodic"),
                ("Labels", keys or "none"),
                ("Elements", ", ".join(own["elements"])),
                ("Atoms a frame", atoms),
                ("Largest frame", own["largest_frame"]),
            )
        )
        parts.append(f"<div><h3>{html(SETS.get(name, name))}</h3>{pairs}</div>")
    return Html(f'<div class="grid three">{"".join(parts)}</div>')


def _memory(facts: Mapping[str, Any]) -> Html:
    memory = facts.get("memory")
    if memory is None:
        return Html("")
    available = memory["available_bytes"]
    return html_pairs(
        (
            ("Training step", _memory_text(facts)),
            (
                "Measured",
                (
                    f"{bytes_text(memory['measured_bytes'])} with {count_text(memory['measured_atoms'])} atoms, "
                    f"{count_text(memory['measured_edges'])} edges, on {memory['device']}"
                ),
            ),
            ("For each edge", f"{number_text(memory['bytes_per_edge'] / 1e3)} kB"),
            ("This machine has", None if available is None else bytes_text(available)),
        )
    )
