"""Do calibrated intervals hold what they say? Coverage, rank correlation and cost, in and out of distribution.

    python benchmarks/uncertainty.py --data DATA --out OUT [--sets ethanol,acac,…] [--seeds 3]

DATA holds ``rmd17``, ``acac``, ``crystals`` and ``water``. On each set a run is tuned with ``elora`` (three seeds, of
copper one), its last layer is calibrated on its validation frames (`forcetune calibrate RUN`), and errors on other
frames are compared with intervals of 50, 80 and 95 %: normal ones before and after calibration, and conformal ones.
The spread of the three seeds is calibrated and measured in the same way.

What is finished in OUT is not repeated; ``uncertainty.json`` and ``uncertainty.md`` there hold it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase.io import read, write
from rich.console import Console

import forcetune
from forcetune.runs.uncertainty import calibrate
from forcetune.utils.files import write_text

console = Console(stderr=True)
QUANTITIES = {"energy_per_atom": "energy", "forces": "force component", "forces_of_atoms": "force length"}


@dataclass(frozen=True)
class Set:
    """What to tune on and what to test on: frames from files, drawn by seed 0.

    Attributes:
        train, tests: files below DATA; name of each test.
        frames: to train and to validate on, half each.
        test_frames: of each test.
        atoms: largest frame to train on; None for any.
        seeds: runs; of one there is no ensemble.
    """

    train: str
    tests: dict[str, str]
    model: str = "mini"
    frames: int = 100
    test_frames: int = 200
    epochs: int = 60
    atoms: int | None = None
    seeds: int = 3


SETS = {
    "ethanol": Set("rmd17/ethanol/train.xyz", {"ethanol": "rmd17/ethanol/test.xyz"}),
    "aspirin": Set("rmd17/aspirin/train.xyz", {"aspirin": "rmd17/aspirin/test.xyz"}, test_frames=100),
    "acac": Set(
        "acac/train_300K.xyz", {"AcAc 300 K": "acac/test_MD_300K.xyz", "AcAc 600 K": "acac/test_MD_600K.xyz"}, epochs=20
    ),
    "MoNbTaW": Set(
        "crystals/MoNbTaW_train.xyz",
        {"MoNbTaW, 54 atoms": "crystals/MoNbTaW_test.xyz"},
        model="sevennet-0",
        frames=40,
        test_frames=20,
        epochs=20,
        atoms=16,
    ),
    "water": Set(
        "water/water_deepmd_train.xyz", {"water": "water/water_deepmd_test.xyz"}, frames=40, test_frames=20, epochs=10
    ),
    "Cu": Set(
        "crystals/mlearn_Cu_train.xyz",
        {"Cu": "crystals/mlearn_Cu_test.xyz"},
        model="sevennet-0",
        frames=40,
        test_frames=20,
        epochs=3,
        seeds=1,
    ),
}


def draw(source: Path, count: int, target: Path, atoms: int | None = None) -> Path:
    """Some frames of a file as a file of their own."""
    if not target.is_file():
        frames = [frame for frame in read(source, ":") if atoms is None or len(frame) <= atoms]
        chosen = np.sort(np.random.default_rng(0).choice(len(frames), min(count, len(frames)), replace=False))
        write(target, [frames[int(index)] for index in chosen], format="extxyz")
    return target


def runs_of(one: Set, train: Path, out: Path) -> list[Path]:
    """A finished run for each seed."""
    runs = []
    for seed in range(1, one.seeds + 1):
        folder = out / f"seed-{seed}"
        if not (folder / "results.json").is_file():
            settings: dict[str, Any] = {
                "training.seed": seed,
                "training.optimizer": "adam",
                "training.valid_every": max(1, one.epochs // 20),
                "output.forgetting": False,
                "output.overwrite": True,
            }
            forcetune.fit(
                train, model=one.model, method="elora", valid=0.5, epochs=one.epochs, out=folder, settings=settings
            )
        runs.append(folder)
    return runs


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one set; what is finished is read."""
    one, out = SETS[name], arguments.out / name
    result = out / "result.json"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    train = draw(arguments.data / one.train, one.frames, out / "train.xyz", one.atoms)
    one = replace(one, seeds=min(one.seeds, arguments.seeds))
    runs = runs_of(one, train, out)
    started = time.perf_counter()
    calibrate(runs[0])
    found: dict[str, Any] = {"calibration_s": time.perf_counter() - started, "tests": {}}
    if one.seeds > 1:
        calibrate(runs[0], ensemble=runs[1:])
    for number, (test, path) in enumerate(one.tests.items()):
        frames = draw(arguments.data / path, one.test_frames, out / f"test-{number}.xyz")
        entry = {"last layer": forcetune.evaluate_uncertainty(runs[0], frames)}
        if one.seeds > 1:
            entry["ensemble"] = forcetune.evaluate_uncertainty(runs[0], frames, ensemble=runs[1:])
        found["tests"][test] = entry
    write_text(result, json.dumps(found, indent=1) + "\n")
    return found


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


def rows(results: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown, a line for each test, kind and quantity."""
    lines = [
        "| frames | σ of | quantity | RMSE, meV | raw 50/80/95 | scaled 50/80/95 | conformal 50/80/95 | rank | cost |",
        "|---|---|---|--:|---|---|---|--:|--:|",
    ]
    for found in results.values():
        for test, kinds in found["tests"].items():
            for kind, content in kinds.items():
                uncertainty = content["uncertainty"]
                for key, quantity in QUANTITIES.items():
                    one = uncertainty[key]
                    if one is None:
                        continue
                    shares = (
                        " / ".join(percent(row[part]) for row in one["coverage"])
                        for part in ("before", "after", "conformal")
                    )
                    correlation = "–" if one["correlation"] is None else f"{one['correlation']:.2f}"
                    cells = [test, kind, quantity, f"{1e3 * one['rms_error']:.1f}", *shares, correlation]
                    lines.append(f"| {' | '.join(cells)} | {uncertainty['cost_ratio']:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=3, help="most runs of a set; two or more make an ensemble")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.sets.split(","):
        console.print(name)
        results[name] = measure(name, arguments)
        text = "\n".join(rows(results)) + "\n"
        write_text(arguments.out / "uncertainty.md", text)
        write_text(arguments.out / "uncertainty.json", json.dumps(results, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
