"""Findings of an examination of data, as one page that needs nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from forcetune._version import __version__
from forcetune.diagnostics.report import agreement_rows, counts_text, memory_text, where_text
from forcetune.errors import InputError
from forcetune.reports.page import render_page
from forcetune.reports.plots import parity
from forcetune.reports.texts import MISSING, bytes_text, count_text, files_text, number_text, ratio
from forcetune.utils.files import as_path, write_text

TITLES = {"error": "Errors", "warning": "Warnings", "note": "Notes"}
MEANINGS = {
    "error": "training on these data surely goes wrong",
    "warning": "look at these",
    "note": "good to know",
}
SETS = {"train": "Training", "valid": "Validation", "test": "Test"}


def check_page(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        InputError: a page cannot be written there, or would replace a file that is none.
    """
    target = as_path(path)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file for the page, such as {target / 'checkup.html'}.")
    if target.exists() and target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{target}: exists and is no HTML page; choose another name for the page.")


def write_checkup(
    path: str | os.PathLike[str], checkup: Mapping[str, Any], arrays: Mapping[str, NDArray] | None = None
) -> Path:
    """Write the page and return its path.

    Args:
        path: file to write.
        checkup: as ``forcetune doctor --json`` prints it.
        arrays: labels and predictions, for plots.

    Raises:
        InputError: the file cannot be written, or is one of something else.
    """
    check_page(path)
    target = Path(path)
    write_text(target, render_page("doctor.html", **_page_content(checkup, arrays or {})))
    return target


def _page_content(checkup: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> dict[str, Any]:
    """Everything that ``doctor.html`` shows."""
    facts = checkup["facts"]
    data_name = files_text(facts["sets"].get("train", {}).get("files", []))
    status, status_class = _status(checkup)
    n_frames = sum(part["n_frames"] for part in facts["sets"].values())
    return {
        "title": f"Check-up of {data_name}",
        "brand": "Data check-up",
        "chain": [("data", data_name), *([("compared with", facts["model"]["name"])] if "model" in facts else [])],
        "status": status,
        "status_class": status_class,
        "facts": [f"{count_text(n_frames)} frames", counts_text(checkup), f"forcetune {__version__}"],
        "findings": [
            {"title": title, "meaning": MEANINGS[severity], "findings": _findings(checkup, severity)}
            for severity, title in TITLES.items()
        ],
        "agreement": _agreement(facts),
        "parity": _parity(facts, arrays),
        "sets": [(SETS.get(name, name), _set_facts(part)) for name, part in facts["sets"].items()],
        "memory": _memory_facts(facts),
        "footer": f"Written by forcetune {__version__}. Energies in meV, forces in meV/Å. Frames are counted from 0. "
        "An error stops a fit; data.doctor=off lets it pass.",
    }


def _status(checkup: Mapping[str, Any]) -> tuple[str, str]:
    """In words, and its class in the style sheet."""
    if checkup["n_errors"]:
        return "do not train on these", "bad"
    if checkup["n_warnings"]:
        return "look first", "open"
    return "nothing against it", "good"


def _findings(checkup: Mapping[str, Any], severity: str) -> list[dict[str, str]]:
    return [
        {"severity": severity, "code": item["code"], "message": item["message"], "where": where_text(item)}
        for item in checkup["findings"]
        if item["severity"] == severity
    ]


def _agreement(facts: Mapping[str, Any]) -> dict[str, Any]:
    """How labels and model agree: by set and quantity, and forces by element."""
    return {
        "rows": [(SETS.get(row[0], row[0]), *row[1:]) for row in agreement_rows(facts)],
        "elements": [
            (SETS.get(name, str(name)), _element_rows(measures["elements"]))
            for name, measures in facts.get("agreement", {}).items()
            if measures["elements"]
        ],
    }


def _element_rows(elements: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for row in elements:
        label, error = row["label_rms_mev_per_ang"], row["error_rms_mev_per_ang"]
        share = ratio(label, error)
        text = MISSING if share is None else f"{100 * share:.0f} %" if share < 10 else f"{share:.0f}×"
        rows.append(
            {
                "symbol": row["symbol"],
                "n_atoms": row["n_atoms"],
                "label": label,
                "error": error,
                "share": text,
                "ratio": share or 0.0,
            }
        )
    return rows


def _parity(facts: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> dict[str, Any]:
    """Plots of the first set with force labels."""
    name = next((name for name in facts["sets"] if f"{name}/reference/forces" in arrays), None)
    if name is None:
        return {"images": []}
    plots = [parity(arrays, name, quantity) for quantity in ("energy_per_atom", "forces")]
    return {"set_name": SETS.get(name, name), "images": [plot for plot in plots if plot]}


def _set_facts(part: Mapping[str, Any]) -> list[tuple[str, Any]]:
    sizes = part["n_atoms"]
    atoms = None if sizes is None else f"{sizes[0]}" if sizes[0] == sizes[1] else f"{sizes[0]} to {sizes[1]}"
    return [
        ("Files", ", ".join(part["files"])),
        ("Frames", f"{count_text(part['n_frames'])}, {count_text(part['periodic'])} of them periodic"),
        ("Labels", ", ".join(f"{label} from {key!r}" for label, key in part["keys"].items() if key) or "none"),
        ("Elements", ", ".join(part["elements"])),
        ("Atoms a frame", atoms),
        ("Largest frame", part["largest_frame"]),
    ]


def _memory_facts(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    memory = facts.get("memory")
    if memory is None:
        return []
    available = memory["available_bytes"]
    measured = (
        f"{bytes_text(memory['measured_bytes'])} with {count_text(memory['measured_atoms'])} atoms, "
        f"{count_text(memory['measured_edges'])} edges, on {memory['device']}"
    )
    return [
        ("Training step", memory_text(facts)),
        ("Measured", measured),
        ("For each edge", f"{number_text(memory['bytes_per_edge'] / 1e3)} kB"),
        ("This machine has", None if available is None else bytes_text(available)),
    ]
