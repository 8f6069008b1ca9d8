"""Tables for the terminal, and numbers as people read them."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from forcetune.reports.tables import error_table, evaluation_table, methods_table
from forcetune.reports.texts import (
    bytes_text,
    change_text,
    duration_text,
    number_text,
    ratio_text,
    share_text,
)


def errors_of(energy: float, forces: float, frames: int) -> dict[str, float | int | None]:
    return {
        "n_frames": frames,
        "energy_mae_mev": 27 * energy,
        "energy_mae_mev_per_atom": energy,
        "energy_rmse_mev": 35 * energy,
        "energy_rmse_mev_per_atom": 1.3 * energy,
        "forces_mae_mev_per_ang": forces,
        "forces_rmse_mev_per_ang": 1.4 * forces,
    }


def printed(table: Table) -> str:
    stream = io.StringIO()
    Console(width=110, color_system=None, file=stream).print(table)
    return stream.getvalue()


def test_error_table() -> None:
    text = printed(
        error_table(
            {
                "train": {"before": errors_of(21.3, 181.0, 450), "after": errors_of(1.01, 9.87, 450)},
                "valid": {"before": errors_of(21.9, 183.0, 50), "after": errors_of(1.33, 12.6, 50)},
                "test": {"before": errors_of(22.4, 186.2, 40), "after": errors_of(1.47, 13.13, 40)},
            }
        )
    )
    assert text.index("test") < text.index("valid") < text.index("train")
    assert re.search(r"Forces MAE +meV/Å +186\.2 +13\.1 +0\.071", text)
    assert "Stress" not in text


def test_evaluation_table() -> None:
    text = printed(evaluation_table(errors_of(1.5, 20.0, 1234) | {"energy_mae_mev": None}))
    assert "1,234 frames" in text
    assert re.search(r"Energy +meV +– +52\.5", text)
    assert re.search(r"Forces +meV/Å +20\.0 +28\.0", text)
    assert "no labels" in printed(evaluation_table({"n_frames": 3}))


def test_methods_table() -> None:
    names = ("kind", "update", "sites", "covered", "total", "trainable")
    coverage = [
        dict(zip(names, row, strict=True))
        for row in (
            ("node_embedding", "Frozen", 1, 0, 512, 0),
            ("linear", "Gate(rank=16)", 12, 198_656, 198_656, 61_824),
            ("contraction", "LowRank(rank=16) + Dense", 4, 43_008, 43_008, 9_216),
            ("readout", "Gate(rank=16)", 2, 500, 1_000, 100),
        )
    ]
    mmea = {"method": "mmea", "trainable": 91_520, "total": 324_096, "coverage": coverage}
    full = {"method": "[bold]full", "trainable": 324_096, "total": 324_096, "coverage": []}
    text = printed(methods_table([mmea, full]))
    assert re.search(r"mmea +91,520 +28 % +Gate on linear, readout \(50 %\); LowRank \+ Dense on contraction", text)
    assert re.search(r"\[bold\]full +324,096 +100 % +–", text)
    assert "method" in printed(methods_table([]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.012345, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (123.44, "123.4"), (1234.56, "1,234.6"),
        (-1.5, "−1.50"), (1e-7, "1.00e-07"), (None, "–"), (float("nan"), "–"), ("1", "–"), (True, "–"),
    ],
)  # fmt: skip
def test_numbers(value: object, text: str) -> None:
    assert number_text(value) == text


def test_other_texts() -> None:
    assert [ratio_text(r) for r in (None, 0.0, 0.0312, 0.099, 0.5, 1.234, 54.3)] == [
        "–", "0.00", "0.031", "0.099", "0.50", "1.23", "54",
    ]  # fmt: skip
    assert [change_text(r) for r in (None, 0.0, 1.0, 0.14, 3.0, 0.01, 0.957)] == [
        "", "", "unchanged", "7.1× smaller", "3× larger", "100× smaller", "4 % smaller",
    ]  # fmt: skip
    assert [share_text(p, 1000) for p in (0, 1000, 999.9, 3, 250)] == ["0 %", "100 %", "99.99 %", "0.30 %", "25 %"]
    assert [duration_text(s) for s in (0.5, 59.7, 61, 3700, 200_000)] == [
        "0.5 s", "59.7 s", "1 min 1 s", "1 h 1 min", "2 d 7 h",
    ]  # fmt: skip
    assert bytes_text(2_345_678) == "2.35 MB"
