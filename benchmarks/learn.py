"""Is it worth going by the uncertainty? A molecule is heated until it would break, and labelled on the way.

    python benchmarks/learn.py --out OUT [--molecule CH3OH] [--rounds 3] [--batch 8] [--seeds 1] [--epochs 60]

Frames of dynamics with the labeller itself (GFN2-xTB by tblite; `--labeller` names another) at 300 K train and
validate; a held-out hot set is from such dynamics that are heated from 300 to 3000 K. `forcetune learn` then goes by
its uncertainty; beside it the same loop labels as many structures of its dynamics at random: no bound ends these
dynamics, and none of them is preferred. Errors of both on the hot set, by round.

What is finished in OUT is not repeated; ``learn.json`` and ``learn.md`` there hold it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.optimize import BFGS
from rich.console import Console

import forcetune
from forcetune.frames.frame import LabelKeys
from forcetune.runs.labelling import LabelError, compute_label, labelled_atoms, load_labeller
from forcetune.runs.learn_results import RoundRecord
from forcetune.utils.files import write_text

console = Console(stderr=True)
KEYS = LabelKeys("REF_energy", "REF_forces", None)
TRAIN, VALID, HOT = 20, 10, 40
COLD, HOTTEST = 300.0, 3000.0
EVERY = 25
"""Steps of 0.5 fs between two frames."""
SURE: dict[str, Any] = {"learn.novelty": 5.0}
RANDOM: dict[str, Any] = {
    "learn.strategy": "random",
    "learn.forces_std": 1e-9,
    "learn.stop": 1e12,
    "learn.novelty": None,
    "learn.apart": 0.0,
}
KINDS = {"by uncertainty": SURE, "at random": RANDOM}
ERRORS = ("forces_mae_mev_per_ang", "forces_rmse_mev_per_ang", "energy_mae_mev_per_atom")


def sample(start: Atoms, make: Any, frames: int, temperatures: tuple[float, float], seed: int) -> list[Atoms]:
    """Labelled frames of dynamics with the labeller, whose temperature rises evenly."""
    random = np.random.default_rng(seed)
    atoms = start.copy()
    atoms.calc = make()
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperatures[0], rng=random)
    Stationary(atoms)
    step = 0.5 * units.fs
    dynamics = Langevin(atoms, step, temperature_K=temperatures[0], friction=0.02 / units.fs, fixcm=False, rng=random)
    labelled: list[Atoms] = []
    for number in range(frames):
        low, high = temperatures
        dynamics.set_temperature(temperature_K=low + (high - low) * number / max(1, frames - 1))
        dynamics.run(EVERY)
        plain = Atoms(atoms.numbers, atoms.positions)
        try:
            label = compute_label(plain, make, stress=False, largest_force=50.0)
        except LabelError as error:
            console.print(f"left out of the frames: {error}")
        else:
            labelled.append(labelled_atoms(plain, label, KEYS))
    return labelled


def make_frames(folder: Path, arguments: argparse.Namespace, make: Any, seed: int) -> None:
    """Files of frames, where they are not there yet."""
    if (folder / "hot.xyz").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    start = molecule(arguments.molecule)
    start.calc = make()
    BFGS(start, logfile=None).run(fmax=0.02, steps=200)
    start = Atoms(start.numbers, start.positions)
    write(folder / "start.xyz", start, format="extxyz")
    cold = sample(start, make, TRAIN + VALID, (COLD, COLD), seed)
    order = np.random.default_rng(seed).permutation(len(cold))
    write(folder / "train.xyz", [cold[index] for index in order[:TRAIN]], format="extxyz")
    write(folder / "valid.xyz", [cold[index] for index in order[TRAIN:]], format="extxyz")
    write(folder / "hot.xyz", sample(start, make, HOT, (COLD, HOTTEST), seed + 1000), format="extxyz")


def measure(folder: Path, kind: str, arguments: argparse.Namespace, seed: int) -> list[RoundRecord]:
    """The rounds of one loop."""
    settings: dict[str, Any] = {
        "training.seed": seed,
        "training.optimizer": "adam",
        "training.valid_every": max(1, arguments.epochs // 10),
        "data.doctor": "off",
        "learn.labeller_options": json.loads(arguments.labeller_options),
        "learn.rounds": arguments.rounds,
        "learn.batch": arguments.batch,
        "learn.walkers": arguments.walkers,
        "learn.picoseconds": arguments.picoseconds,
        "learn.final_temperature": HOTTEST,
        "learn.every": EVERY,
        "learn.failures": 1000,
    }
    learned = forcetune.learn(
        folder / "train.xyz",
        start=folder / "start.xyz",
        labeller=arguments.labeller,
        model="mini",
        method="elora",
        valid=folder / "valid.xyz",
        test=folder / "hot.xyz",
        epochs=arguments.epochs,
        out=folder / kind.replace(" ", "-"),
        settings=settings | KINDS[kind],
        console=console,
    )
    return learned.record.rounds


def summarize(rounds: list[RoundRecord]) -> list[dict[str, Any]]:
    """Labels so far and errors on the hot set of every round that trained."""
    rows, labels = [], 0
    for one in rounds:
        labels += one.labelled
        if one.train_frames:
            looks = sum(part.looks for part in one.dynamics)
            rows.append(
                {
                    "round": one.number,
                    "labels": labels,
                    "failed": len(one.failed),
                    "picoseconds": sum(part.picoseconds for part in one.dynamics),
                    "ended": [part.ended for part in one.dynamics],
                    "beyond": sum(part.beyond for part in one.dynamics) / looks if looks else None,
                    **{key: one.errors["test"][key] for key in ERRORS},
                }
            )
    return rows


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Markdown: errors on the hot set by round, mean over seeds."""
    lines = [
        "| round | labels | chosen | failed labels | forces MAE, meV/Å | forces RMSE | energy MAE, meV/atom |",
        "|--:|--:|---|--:|--:|--:|--:|",
    ]
    seeds = list(results.values())
    most = max(len(rows) for by_kind in seeds for rows in by_kind.values())
    for index in range(most):
        for kind in KINDS:
            rows = [by_kind[kind][index] for by_kind in seeds if kind in by_kind and index < len(by_kind[kind])]
            if rows:
                errors = [f"{np.mean([row[key] for row in rows]):.1f}" for key in ERRORS]
                labels, failed = (f"{np.mean([row[key] for row in rows]):g}" for key in ("labels", "failed"))
                chosen = kind if index else "– (first fit)"
                lines.append(f"| {index} | {labels} | {chosen} | {failed} | {' | '.join(errors)} |")
            if not index:
                break  # the first fit is the same
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--molecule", default="CH3OH")
    parser.add_argument("--labeller", default="tblite.ase:TBLite")
    parser.add_argument("--labeller-options", default='{"method": "GFN2-xTB", "verbosity": 0}')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--walkers", type=int, default=4)
    parser.add_argument("--picoseconds", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    make = load_labeller(arguments.labeller, json.loads(arguments.labeller_options))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for seed in range(1, arguments.seeds + 1):
        folder = arguments.out / f"{arguments.molecule}-{seed}"
        make_frames(folder, arguments, make, seed)
        for kind in KINDS:
            console.print(f"{arguments.molecule}, seed {seed}, {kind}")
            results.setdefault(str(seed), {})[kind] = summarize(measure(folder, kind, arguments, seed))
            write_text(arguments.out / "learn.json", json.dumps(results, indent=1) + "\n")
            write_text(arguments.out / "learn.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
