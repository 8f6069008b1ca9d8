"""What a run changed, at the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import forcetune
from terminal import Command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: forcetune.fit(
            forcetune.demo_file("train"),
            model="mini",
            method=name,
            valid=10,
            epochs=1,
            out=folder / name,
            settings={"training.batch_size": 20},
        ).folder
        for name in ("mmea", "sparse")
    }


def test_weights_gates_and_likeness(runs: dict[str, Path], command: Command) -> None:
    code, text, _ = command("inspect", runs["mmea"], "--json")
    assert code == 0
    content = json.loads(text)
    assert content["method"] == "mmea" and content["likeness"] is None
    assert {path["kind"] for path in content["paths"]} >= {"tensor_product", "radial_mlp", "contraction"}
    assert {gate["quantity"] for gate in content["gates"]} == {"gain", "shift"}
    contraction = next(path for path in content["paths"] if path["kind"] == "contraction")
    assert set(contraction["elements"]) == {"H", "C", "N", "O"}
    results = json.loads((runs["mmea"] / "results.json").read_text(encoding="utf-8"))
    assert [row["relative"] for row in results["changes"]] == [row["relative"] for row in content["paths"]]

    code, text, _ = command("inspect", runs["mmea"], "--against", runs["sparse"])
    assert code == 0 and "mmea: changed weights" in text and "mmea: gates" in text and "1 − R²" in text
    assert "by chance" in text
    code, text, _ = command("inspect", runs["sparse"], "--against", runs["sparse"], "--json")
    content = json.loads(text)
    assert content["gates"] == [] and content["likeness"]["weights"] == pytest.approx(0, abs=1e-12)
    assert content["likeness"]["shared"] == 1 and 0 < content["likeness"]["shared_by_chance"] < 1
    assert 0 < min(path["changed"] for path in content["paths"]) < 1
    stored = json.loads((runs["sparse"] / "results.json").read_text(encoding="utf-8"))["sparsity"]
    changed = sum(path["changed"] * path["size"] for path in content["paths"])
    assert changed == pytest.approx(stored["changed"]) and stored["zeros_of_all"] > stored["zeros_of_wrapped"]


def test_the_report_shows_it(runs: dict[str, Path]) -> None:
    page = (runs["sparse"] / "report.html").read_text(encoding="utf-8")
    assert "What changed" in page and "By element" in page and "did not change by epoch" in page
    assert "not what they were" in page


def test_an_adapter_alone_needs_frames_for_its_gates(runs: dict[str, Path], tmp_path: Path, command: Command) -> None:
    shutil.copytree(runs["mmea"] / "adapter", tmp_path / "alone")
    code, _, err = command("inspect", tmp_path / "alone")
    assert code == 2 and "--data" in err
    assert command("inspect", tmp_path / "alone", "--data", forcetune.demo_file("test"))[0] == 0
