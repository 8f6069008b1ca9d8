"""The demo and the examples, as a newcomer runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest

import forcetune
from terminal import Command

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_short_demo_tells_what_it_did(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "demo"
    code, text, _ = command("demo", "--out", out, "--set", "training.epochs=3", "--picoseconds", "0.02")
    assert code == 0
    for expected in ("test, 200 frames", "test hot, 50 frames", "drift", "forcetune fit", "report.html"):
        assert expected in text
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["model"]["name"] == "mini" and results["model"]["licence"] == "MIT"
    for name in ("test", "test hot"):
        before, after = (results["errors"][name][when]["forces_mae_mev_per_ang"] for when in ("before", "after"))
        assert after < before
    assert results["dynamics"]["picoseconds"] == pytest.approx(0.02)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Energy conservation" in page and "Test hot" in page

    code, _, err = command("demo", "--out", out)
    assert code == 2 and "is not empty" in err


@pytest.mark.slow
def test_demo_brings_the_forces_to_a_third_and_conserves_energy(tmp_path: Path, command: Command) -> None:
    assert command("demo", "--out", tmp_path / "demo")[0] == 0
    results = json.loads((tmp_path / "demo" / "results.json").read_text(encoding="utf-8"))
    errors = results["errors"]["test"]
    assert errors["after"]["forces_mae_mev_per_ang"] < errors["before"]["forces_mae_mev_per_ang"] / 3
    assert abs(results["dynamics"]["drift_mev_per_atom_per_ps"]) < 0.2


def test_data_of_the_demo_are_complete_and_never_overlap() -> None:
    frames = {part: ase.io.read(forcetune.demo_file(part), ":") for part in ("train", "valid", "test", "hot")}
    assert {part: len(structures) for part, structures in frames.items()} == {
        "train": 50,
        "valid": 50,
        "test": 200,
        "hot": 50,
    }
    places = [atoms.positions.tobytes() for structures in frames.values() for atoms in structures]
    assert len(set(places)) == len(places)
    assert sum(forcetune.demo_file(part).stat().st_size for part in frames) < 250_000


def test_fit_without_a_model_starts_from_mini_and_says_so(tmp_path: Path, command: Command) -> None:
    arguments = ["fit", forcetune.demo_file("train"), "--method", "readout", "--epochs", 1, "--out"]
    code, _, err = command(*arguments, tmp_path / "run")
    assert code == 0 and "no model named: starting from mini" in err
    assert "no model named" not in command(*arguments, tmp_path / "two", "--model", "mini")[2]


def run_example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples(tmp_path: Path) -> None:
    assert "meV/Å before" in run_example("own_data.py", forcetune.demo_file("train"), tmp_path / "run")
    assert "eV/Å tuned" in run_example("use_in_ase.py", tmp_path / "run")


def test_example_that_compares_methods(tmp_path: Path) -> None:
    text = run_example("compare_methods.py", tmp_path / "compared")
    assert all(name in text for name in ("readout", "elora", "mmea"))


def test_example_of_magnetism(tmp_path: Path) -> None:
    text = run_example("magnetic_iron.py", tmp_path, "--quick")
    assert "antiferromagnet above ferromagnet" in text
    assert "spins relaxed" in text
    assert "Parity plot of moments" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
