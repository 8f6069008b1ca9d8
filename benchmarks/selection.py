"""Is it worth choosing what to label? Errors after labelling chosen and random structures of a pool.

    python benchmarks/selection.py --data DATA --out OUT [--pools ethanol,acac,…] [--seeds 3]

DATA holds ``rmd17``, ``acac`` and ``3bpa``. For each pool and seed: ``mini`` is tuned on 20 random frames and
calibrated on 20 others, which validate all further runs, too. `forcetune select` chooses 20 and 50 structures of the
pool by each strategy; their labels are added to the 20, ``mini`` is tuned on all of them from the beginning, and
tested on frames of the pool's kind. A seed decides the first frames, the pool, the random choice and the training.

What is finished in OUT is not repeated; ``selection.json`` and ``selection.md`` there hold it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write
from rich.console import Console

import forcetune
from forcetune.runs.uncertainty import calibrate
from forcetune.utils.files import write_text

console = Console(stderr=True)
STRATEGIES = ("random", "farthest", "determinant")
COUNTS = (20, 50)
START, VALID, POOL, TEST = 20, 20, 400, 150


@dataclass(frozen=True)
class Source:
    """Files below DATA.

    Attributes:
        start: of the frames labelled at first.
        pool: to choose from.
        test: to test on; frames of the pool that are not in it where it is empty.
    """

    start: tuple[str, ...]
    pool: tuple[str, ...]
    test: tuple[str, ...] = ()


SOURCES = {
    "ethanol": Source(("rmd17/ethanol/test.xyz",), ("rmd17/ethanol/test.xyz",)),
    "AcAc 300 K to 600 K": Source(("acac/train_300K.xyz",), ("acac/train_600K.xyz",), ("acac/test_MD_600K.xyz",)),
    "3BPA 300 K to mixed T": Source(("3bpa/train_300K.xyz",), ("3bpa/train_mixedT.xyz",)),
    "ethanol to four molecules": Source(
        ("rmd17/ethanol/train.xyz",),
        tuple(f"rmd17/{name}/test.xyz" for name in ("ethanol", "malonaldehyde", "uracil", "toluene")),
    ),
}


def split_frames(source: Source, data: Path, random: np.random.Generator) -> dict[str, list[Atoms]]:
    """Frames to start with, to validate on, to choose from and to test on, none of them twice."""
    pool = [frame for path in source.pool for frame in read(data / path, ":")]
    pool = [pool[int(index)] for index in random.permutation(len(pool))]
    if source.start == source.pool:
        first, pool = pool[: START + VALID], pool[START + VALID :]
    else:
        first = [frame for path in source.start for frame in read(data / path, ":")]
        first = [first[int(index)] for index in random.permutation(len(first))[: START + VALID]]
    if source.test:
        test = [frame for path in source.test for frame in read(data / path, ":")]
        test = [test[int(index)] for index in random.permutation(len(test))]
    else:
        test, pool = pool[:TEST], pool[TEST:]
    return {"start": first[:START], "valid": first[START:], "pool": pool[:POOL], "test": test[:TEST]}


def fit(train: list[Path], folder: Path, out: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Tune ``mini``; errors on the test frames."""
    if not (out / "results.json").is_file():
        settings: dict[str, Any] = {
            "training.seed": seed,
            "training.optimizer": "adam",
            "training.valid_every": max(1, epochs // 10),
            "output.forgetting": False,
            "output.overwrite": True,
            "data.doctor": "off",
        }
        forcetune.fit(
            train,
            model="mini",
            method="elora",
            valid=folder / "valid.xyz",
            test=folder / "test.xyz",
            epochs=epochs,
            out=out,
            settings=settings,
        )
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["errors"]["test"]["after"]


def measure(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors of one pool and seed, by strategy and number of chosen frames."""
    folder = arguments.out / f"{name.replace(' ', '-')}-{seed}"
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for part, frames in split_frames(SOURCES[name], arguments.data, np.random.default_rng(seed)).items():
        write(folder / f"{part}.xyz", frames, format="extxyz")
    start = folder / "start.xyz"
    found: dict[str, Any] = {"start": fit([start], folder, folder / "run-start", seed, arguments.epochs)}
    calibrate(folder / "run-start")
    for strategy in STRATEGIES:
        chosen = forcetune.select(
            folder / "pool.xyz", n=max(COUNTS), model=folder / "run-start", strategy=strategy, seed=seed
        )
        labelled = read(folder / "pool.xyz", ":")
        for count in COUNTS:
            path = folder / f"{strategy}-{count}.xyz"
            write(path, [labelled[one.frame] for one in chosen.chosen[:count]], format="extxyz")
            out = folder / f"run-{strategy}-{count}"
            found[f"{strategy} {count}"] = fit([start, path], folder, out, seed, arguments.epochs)
    write_text(result, json.dumps(found, indent=1) + "\n")
    return found


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: errors by pool and strategy, mean and spread over seeds."""
    lines = [
        "| pool | labelled | chosen by | forces MAE, meV/Å | forces RMSE | energy MAE, meV/atom |",
        "|---|--:|---|--:|--:|--:|",
    ]
    keys = ("forces_mae_mev_per_ang", "forces_rmse_mev_per_ang", "energy_mae_mev_per_atom")
    for name, by_seed in results.items():
        for setting in ("start", *(f"{strategy} {count}" for count in COUNTS for strategy in STRATEGIES)):
            strategy, _, count = setting.partition(" ")
            values = np.array([[found[setting][key] for key in keys] for found in by_seed.values()])
            cells = [
                f"{mean:.1f} ± {spread:.1f}"
                for mean, spread in zip(
                    values.mean(axis=0), values.std(axis=0, ddof=min(1, len(values) - 1)), strict=True
                )
            ]
            labelled = START + int(count or 0)
            lines.append(f"| {name} | {labelled} | {strategy if count else '–'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pools", default=",".join(SOURCES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in range(1, arguments.seeds + 1):
        for name in arguments.pools.split(","):
            console.print(f"{name}, seed {seed}")
            results.setdefault(name, {})[str(seed)] = measure(name, seed, arguments)
            write_text(arguments.out / "selection.md", table(results))
            write_text(arguments.out / "selection.json", json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
