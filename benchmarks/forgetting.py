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

    python benchmarks/forgetting.py --data DATA --out OUT --penalties [--methods elora,mmea,full]

compares what can be done against forgetting instead: nothing, L2-SP, EWC, L2 on gates (``training.penalty``), and
replay, which looks at the same frames as EWC and gates do. Each is tried with several strengths. The one that counts is
chosen on the validation frames of the molecule: the strongest whose force error there is within a tenth of that without
anything (where none is, the one with the lowest). ``penalties.json`` and ``penalties.md`` hold all of them.
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
from forcetune.deployment.calculator import ForcetuneCalculator
from forcetune.deployment.dynamics import energy_conservation
from forcetune.deployment.loading import deploy
from forcetune.errors import ForcetuneError
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.frames.read import read_frames
from forcetune.utils.files import write_text

OTHERS = ("ethanol", "toluene", "salicylic")
STRENGTHS = {
    "l2sp": ("training.penalty.l2sp", (0.03, 0.003, 0.3)),
    "ewc": ("training.penalty.ewc", (0.1, 0.01, 1.0, 10.0, 100.0)),
    "gates": ("training.penalty.gates", (0.3, 0.03, 3.0)),
    "replay": ("replay.weight", (1.0, 0.1)),
}
"""Of each way against forgetting: the option that says how strong it is, and its values, which are tried in turn."""
PICOSECONDS = 0.1
WITHIN = 1.1
console = Console(stderr=True)


def sample(path: Path, start: int, count: int, target: Path) -> Path:
    """Some frames of a file as a file of their own."""
    write(target, list(read(path, f"{start}:{start + count}")), format="extxyz")
    return target


def fit(
    out: Path,
    train: Path,
    replay: list[Path],
    head: str,
    arguments: argparse.Namespace,
    method: str | None = None,
    further: dict[str, Any] | None = None,
) -> Path:
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
    } | (further or {})
    if replay:
        settings |= {"replay.data": [str(path) for path in replay], "replay.ratio": arguments.ratio}
        settings["replay.head"] = head
    epochs = 5 * max(1, round(arguments.steps / steps / 5))
    method = method or arguments.method
    forcetune.fit(train, model="mini", method=method, valid=0.5, epochs=epochs, out=out, settings=settings)
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


def measure(run: Path, tests: dict[str, Path], base: dict[str, Predictions]) -> dict[str, Any]:
    """What a run does on the molecule and on others, at short distances and in dynamics."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    model = deploy(run).backbone
    molecule, *others = tests
    tuned = {name: predictions(model, path) for name, path in tests.items()}
    moved = [differences(tuned[name], base[name].energy, base[name].forces) for name in others]
    own = tuned[molecule]
    forgetting = results["forgetting"]
    holes = [d["pair"] for d in forgetting["dimers"] if d["tuned_hole_ang"] and not d["base_hole_ang"]]
    atoms = read(tests[molecule], "0")
    atoms.calc = ForcetuneCalculator(model)
    try:
        drift: float | None = energy_conservation(atoms, picoseconds=PICOSECONDS, seconds=600).drift
    except ForcetuneError:
        drift = None
    walls = [d["tuned_wall_ev"] / d["base_wall_ev"] for d in forgetting["dimers"] if d["base_wall_ev"] > 0]
    return {
        "valid_forces_mev_per_ang": results["errors"]["valid"]["after"]["forces_mae_mev_per_ang"],
        "test": differences(own, own.energy_label, own.forces_label),
        "others_from_base": [float(np.mean(column)) for column in zip(*moved, strict=True)],
        "pairs_with_a_new_hole": holes,
        "lowest_wall_over_base": min(walls),
        "drift_mev_per_atom_per_ps": drift,
        "penalty": results.get("penalty"),
    }


def chosen(rows: dict[str, dict[str, Any]], free: float) -> str:
    """The strength that counts, by the validation frames."""
    errors = {name: row["valid_forces_mev_per_ang"] for name, row in rows.items()}
    within = [name for name, error in errors.items() if error <= WITHIN * free]
    return max(within, key=float) if within else min(errors, key=lambda name: errors[name])


def penalty_table(results: dict[str, dict[str, dict[str, dict[str, Any]]]], molecule: str) -> str:
    """One row for each method and way, of its chosen strength."""
    names = ["method, against forgetting", "strength", f"{molecule}, DFT", "others, mini", "new holes"]
    names += ["lowest wall / base", "NVE drift"]
    lines = [f"| {' | '.join(names)} |", f"|---|{'--:|' * (len(names) - 1)}"]
    for method, ways in results.items():
        free = ways["nothing"]["0"]["valid_forces_mev_per_ang"]
        for way, rows in ways.items():
            strength = chosen(rows, free)
            row = rows[strength]
            errors = [f"{energy:.2f} / {forces:.1f}" for energy, forces in (row["test"], row["others_from_base"])]
            drift = row["drift_mev_per_atom_per_ps"]
            cells = [
                f"{method}, {way}",
                "" if way == "nothing" else strength,
                *errors,
                len(row["pairs_with_a_new_hole"]),
                f"{row['lowest_wall_over_base']:.2f}",
                "broke down" if drift is None else f"{drift:+.2f}",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def compare_penalties(arguments: argparse.Namespace, train: Path, tests: dict[str, Path], replay: list[Path]) -> None:
    """Run every method with every way against forgetting and strength, and write the table after each."""
    console.print(f"{arguments.molecule}: base on all frames")
    mini = deploy("mini").backbone
    base = {name: predictions(mini, path) for name, path in tests.items()}
    results: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    frames = {"training.penalty.data": [str(path) for path in replay]}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("data", "out")}
    ways: dict[str, tuple[str, tuple[float, ...]]] = {"nothing": ("", (0.0,)), **STRENGTHS}
    turns = [
        (method, way, option, strengths[turn])
        for turn in range(max(len(strengths) for _, strengths in ways.values()))
        for method in arguments.methods.split(",")
        for way, (option, strengths) in ways.items()
        if turn < len(strengths) and (way != "gates" or method.startswith("mmea"))
    ]
    text = ""
    for method, way, option, strength in turns:
        further = ({option: strength} if option else {}) | (frames if way in ("ewc", "gates") else {})
        out = arguments.out / f"{method}-{way}-{strength:g}"
        fit(out, train, replay if way == "replay" else [], "shared", arguments, method, further)
        row = measure(out, tests, base)
        results.setdefault(method, {}).setdefault(way, {})[f"{strength:g}"] = row
        text = penalty_table(results, arguments.molecule)
        write_text(arguments.out / "penalties.md", text)
        content = {"settings": settings, "rows": results}
        write_text(arguments.out / "penalties.json", json.dumps(content, indent=2) + "\n")
    print(text)


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
    parser.add_argument("--penalties", action="store_true", help="compare penalties with replay instead")
    parser.add_argument("--methods", default="elora,mmea,full", help="with --penalties")
    parser.add_argument("--train", type=int, default=100, help="frames of the molecule, half of them for validation")
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
    if arguments.penalties:
        train = sample(train, 0, arguments.train, arguments.out / "train.xyz")
        compare_penalties(arguments, train, tests, replay)
        return
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
