"""What fine-tuning costs elsewhere, and what replay keeps: ``mini`` tuned on one molecule of rMD17, tested on others.

    python benchmarks/forgetting.py --data DATA --out OUT

DATA holds ``rmd17/MOLECULE/{train,test}.xyz``. ``mini`` (GFN2-xTB) is tuned on 50 frames of one molecule (DFT), once
alone, once with replay (frames of three other molecules, labelled by ``mini`` itself), and once with the same replay
and a head of its own for it. All see every training frame equally often; replay adds its own steps. Afterwards all are
tested on frames of the other molecules that were in no training: against the predictions of ``mini`` (what was
forgotten) and against DFT (whether that matters).
Energies of every molecule are compared after the mean difference is taken out, because a level of theory has a zero of
its own.

Finished runs in OUT are not repeated. ``forgetting.json`` and ``forgetting.md`` there hold the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase.io import read, write
from rich.console import Console
from rich.progress import track

import forcetune
from forcetune.backbones.protocol import Backbone
from forcetune.deployment.loading import deploy
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.frames.read import read_frames
from forcetune.utils.files import write_text

OTHERS = ("ethanol", "toluene", "salicylic")
console = Console(stderr=True)


def sample(path: Path, start: int, count: int, target: Path) -> Path:
    """Some frames of a file as a file of their own."""
    write(target, list(read(path, f"{start}:{start + count}")), format="extxyz")
    return target


def fit(out: Path, train: Path, replay: list[Path], head: str, arguments: argparse.Namespace) -> Path:
    """A run with or without replay; a finished one is taken as it is."""
    if (out / "results.json").is_file():
        return out
    frames = len(read_frames(train).frames) // 2
    steps = -(-frames // 5)
    settings: dict[str, Any] = {
        "training.loss.energy": 40.0,
        "training.schedule.name": "cosine",
        "training.valid_every": 5,
        "training.seed": arguments.seed,
        "output.overwrite": True,
    }
    if replay:
        settings |= {"replay.data": [str(path) for path in replay], "replay.ratio": arguments.ratio}
        settings["replay.head"] = head
    epochs = 5 * max(1, round(arguments.steps / steps / 5))
    forcetune.fit(train, model="mini", method=arguments.method, valid=0.5, epochs=epochs, out=out, settings=settings)
    return out


def differences(found: Predictions, energy: np.ndarray, forces: np.ndarray) -> tuple[float, float]:
    """Mean absolute differences of energies per atom, their mean taken out, meV/atom, and of forces, meV/Å."""
    difference = found.energy - energy
    per_atom = (difference - difference.mean()) / found.atoms
    return 1e3 * float(np.abs(per_atom).mean()), 1e3 * float(np.abs(found.forces - forces).mean())


def predictions(backbone: Backbone, path: Path) -> Predictions:
    return predict(backbone, build_graphs(backbone, read_frames(path).frames))


def table(rows: dict[str, dict[str, Any]], molecule: str, others: list[str]) -> str:
    names = list(rows)
    lines = [f"| frames, compared with | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    entries = [(molecule, "DFT")] + [(other, against) for against in ("mini", "DFT") for other in others]
    for name, against in entries:
        cells = [rows[run][name][against] for run in names]
        lines.append(f"| {name}, {against} | " + " | ".join(f"{e:.2f} / {f:.1f}" for e, f in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--molecule", default="aspirin")
    parser.add_argument("--others", default=",".join(OTHERS))
    parser.add_argument("--method", default="mmea")
    parser.add_argument("--steps", type=int, default=300, help="on the molecule's own frames")
    parser.add_argument("--ratio", type=float, default=1.0, help="replay frames per training frame")
    parser.add_argument("--frames", type=int, default=100, help="test frames of each molecule")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    others = arguments.others.split(",")
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = arguments.data / "rmd17"
    tests = {
        name: sample(source / name / "test.xyz", 0, arguments.frames, arguments.out / f"test-{name}.xyz")
        for name in (arguments.molecule, *others)
    }
    replay = [sample(source / name / "train.xyz", 0, 50, arguments.out / f"replay-{name}.xyz") for name in others]
    train = source / arguments.molecule / "train.xyz"
    runs = {
        "tuned": fit(arguments.out / "tuned", train, [], "shared", arguments),
        "tuned with replay": fit(arguments.out / "replay", train, replay, "shared", arguments),
        "replay with its own head": fit(arguments.out / "replay-own", train, replay, "own", arguments),
    }
    models = {"mini": deploy("mini").backbone} | {name: deploy(run).backbone for name, run in runs.items()}
    rows: dict[str, dict[str, Any]] = {name: {} for name in models}
    for test, path in track(tests.items(), "testing", console=console, disable=not console.is_terminal):
        base = predictions(models["mini"], path)
        for name, model in models.items():
            found = predictions(model, path)
            rows[name][test] = {
                "mini": differences(found, base.energy, base.forces),
                "DFT": differences(found, found.energy_label, found.forces_label),
            }
    text = table(rows, arguments.molecule, others)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("data", "out")}
    write_text(arguments.out / "forgetting.md", text)
    write_text(arguments.out / "forgetting.json", json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
