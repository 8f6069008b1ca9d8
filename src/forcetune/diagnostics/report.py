"""Findings of an examination of data, as a list for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from forcetune.reports.texts import bytes_text, count_text, number_text

COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
QUANTITIES = {"energy": "Energy", "forces": "Forces", "stress": "Stress"}


def print_checkup(checkup: Mapping[str, Any], console: Console) -> None:
    """Print what was found, errors first, and how labels and model agree.

    Args:
        checkup: as ``forcetune doctor --json`` prints it.
        console: where to.
    """
    for item in checkup["findings"]:
        style = COLOURS[item["severity"]]
        where = where_text(item)
        console.print(
            f"[{style}]{item['severity']}[/] [bold]{escape(item['code'])}[/]  {escape(where)}", soft_wrap=True
        )
        console.print(Text(item["message"]), highlight=False)
        console.print()
    rows = agreement_rows(checkup["facts"])
    if rows:
        table = Table(title="Labels against the model", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name in ("set", "quantity"):
            table.add_column(name)
        for name in ("frames", "correlation", "label / model"):
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*map(str, row))
        console.print(table)
    memory = memory_text(checkup["facts"])
    if memory:
        console.print(f"memory   {memory}", highlight=False)
    console.print(f"findings {counts_text(checkup)}", highlight=False)


def where_text(item: Mapping[str, Any]) -> str:
    if not item["frames"]:
        return item["file"] or ""
    more = item["n_frames"] - len(item["frames"])
    named = ", ".join(map(str, item["frames"])) + (f" and {more:,} more" if more > 0 else "")
    return f"{item['file']}, frame{'' if item['n_frames'] == 1 else 's'} {named}"


def counts_text(checkup: Mapping[str, Any]) -> str:
    notes = len(checkup["findings"]) - checkup["n_errors"] - checkup["n_warnings"]
    counts = (("error", checkup["n_errors"]), ("warning", checkup["n_warnings"]), ("note", notes))
    return ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in counts)


def agreement_rows(facts: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for name, measures in facts.get("agreement", {}).items():
        for quantity, title in QUANTITIES.items():
            agreement = measures[quantity]
            if agreement is not None:
                correlation = f"{agreement['correlation']:.2f}".replace("-", "−")
                rows.append(
                    (name, title, count_text(agreement["n_frames"]), correlation, number_text(agreement["ratio"]))
                )
    return rows


def memory_text(facts: Mapping[str, Any]) -> str:
    memory = facts.get("memory")
    if memory is None:
        return ""
    scaled = f"scaled by edges from a measured step of {count_text(memory['measured_edges'])} edges"
    return (
        f"about {bytes_text(memory['estimate_bytes'])} for a step with the {memory['batch_size']} largest frames "
        f"({count_text(memory['batch_atoms'])} atoms, {count_text(memory['batch_edges'])} edges; {scaled}, all "
        "parameters trained)"
    )
