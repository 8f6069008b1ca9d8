"""Few-shot fine-tuning of ``mini`` on rMD17: methods side by side, same budget, learning rates chosen on validation.

    python benchmarks/rmd17.py --data DATA/rmd17 --out OUT [--processes 2]

Every method starts from the embedded model ``mini`` (GFN2-xTB; no molecule of rMD17 is in its data), with E0
re-estimated, and takes the same number of steps of 5 frames on the published 50 of the 100 ``train`` frames; the other
50 choose the epoch. ``scratch`` starts from random weights in the same architecture. First the learning rate of every
method is chosen by the validation loss on ``--search`` (aspirin, first seed) among a third, one and three times its
default; then every molecule and seed is run with it and tested on the 1000 ``test`` frames.

Finished runs in OUT are not repeated. ``rmd17.json`` and ``rmd17.md`` there hold the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MOLECULES = ("aspirin", "ethanol", "toluene", "uracil")
METHODS = ("readout", "full", "elora", "mmea", "mmea-pure", "scratch")
BATCH = 5
FRAMES = 50
KEYS = ("energy_mae_mev", "forces_mae_mev_per_ang")


@dataclass(frozen=True, slots=True)
class Job:
    """One fit."""

    data: Path
    out: Path
    molecule: str
    method: str
    learning_rate: float
    seed: int
    epochs: int
    tested: bool
    model: str
    settings: tuple[tuple[str, Any], ...] = ()
    name: str = ""

    @property
    def label(self) -> str:
        """What a table calls it."""
        return self.name or self.method

    @property
    def folder(self) -> Path:
        kind = "runs" if self.tested else "search"
        return self.out / kind / f"{self.molecule}-{self.label}-{self.learning_rate:g}-{self.seed}".replace(" ", "_")

    @property
    def is_finished(self) -> bool:
        return (self.folder / "results.json").exists()

    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))


def run_job(job: Job) -> None:
    """Fit, unless it is done."""
    import forcetune

    if job.is_finished:
        return
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    # schedule-free AdamW averages and needs no schedule
    free = forcetune.method(job.method).optimizer == "schedulefree"
    averaged: dict[str, Any] = {"ema": 0.99, "schedule": {"name": "cosine", "warmup_epochs": 2}}
    if free:
        averaged = {"schedule": {"warmup_epochs": 2}}
    forcetune.run_fit(
        forcetune.load_config(
            given={
                "data": {
                    "train": [str(job.data / job.molecule / "train.xyz")],
                    "valid": 0.5,
                    "test": [str(job.data / job.molecule / "test.xyz")] if job.tested else None,
                },
                "model": {"model": job.model},
                "method": {"name": job.method},
                "training": {
                    "epochs": job.epochs,
                    "batch_size": BATCH,
                    "learning_rate": job.learning_rate,
                    "seed": job.seed,
                    "threads": 1,
                    "valid_every": 2,
                    **averaged,
                },
                "output": {"run": str(job.folder), "overwrite": True, "forgetting": False},
            },
            overrides=dict(job.settings),
        ),
        console=Console(quiet=True),
    )


def run_all(jobs: Sequence[Job], processes: int, title: str) -> None:
    """Every job, several at a time, each on one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with multiprocessing.get_context("spawn").Pool(processes) as pool, Progress(*columns) as bar:
        task = bar.add_task("", total=len(jobs))
        for _ in pool.imap_unordered(run_job, jobs):
            bar.advance(task)


def chosen_rates(jobs: Iterable[Job]) -> dict[str, dict[str, Any]]:
    """Per method the learning rate with the lowest validation loss, and all that were tried."""
    tried: dict[str, dict[float, float]] = {}
    for job in filter(lambda job: job.is_finished, jobs):
        tried.setdefault(job.method, {})[job.learning_rate] = job.results()["training"]["best_valid_loss"]
    return {
        method: {"learning_rate": min(losses, key=lambda rate: losses[rate]), "valid_loss": losses}
        for method, losses in tried.items()
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and the spread (half of the distance from lowest to highest) over seeds."""
    return {"mean": statistics.fmean(values), "half_range": (max(values) - min(values)) / 2, "values": list(values)}


def table(jobs: Sequence[Job]) -> dict[str, dict[str, dict[str, Any]]]:
    """molecule → method → errors on the test frames with their spread, of the runs that are finished."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for job in jobs:
        if job.is_finished:
            before = job.results()["errors"]["test"]["before"]
            rows.setdefault(job.molecule, {"zero-shot": {key: summary([before[key]]) for key in KEYS}})
            rows[job.molecule].setdefault(job.label, {})
    for molecule, methods in rows.items():
        for label, row in methods.items():
            found = [j.results() for j in jobs if (j.molecule, j.label) == (molecule, label) and j.is_finished]
            if found:
                row |= {key: summary([one["errors"]["test"]["after"][key] for one in found]) for key in KEYS}
                row |= {
                    "trainable": found[0]["parameters"]["trainable"],
                    "adapter_bytes": found[0]["adapter_bytes"],
                    "seconds_per_step": statistics.median(one["training"]["seconds_per_step"] for one in found),
                    "reference_energies": found[0]["reference_energies"]["mode"],
                }
                if "sparsity" in found[0]:
                    shares = [100 * one["sparsity"]["zeros_of_wrapped"] for one in found]
                    row["zeros_of_wrapped_percent"] = summary(shares)
    return rows


def steps_to_same_loss(jobs: Sequence[Job], one: str, other: str) -> dict[str, Any] | None:
    """Steps that two methods need to the lowest validation loss that both reach, over all molecules and seeds."""
    finished = {(job.molecule, job.seed, job.label): job for job in jobs if job.is_finished}
    rows = []
    for molecule, seed, label in finished:
        if label != one or (molecule, seed, other) not in finished:
            continue
        curves = [validations(finished[molecule, seed, name].folder) for name in (one, other)]
        target = max(min(losses) for _, losses in curves)
        needed = [next(step for step, loss in zip(*curve, strict=True) if loss <= target) for curve in curves]
        rows.append({"molecule": molecule, "seed": seed, "loss": target, one: needed[0], other: needed[1]})
    if not rows:
        return None
    return {"ratio": statistics.median(row[one] / row[other] for row in rows), "runs": rows}


def validations(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of all validations of a run."""
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["valid_loss"]]
    return [int(row["step"]) for row in rows], [float(row["valid_loss"]) for row in rows]


def cell(found: dict[str, Any]) -> str:
    """E / F with the spread over seeds and their number."""
    texts = []
    for key in KEYS:
        values = found[key]
        spread = f" ± {values['half_range']:.1f}" if len(values["values"]) > 1 else ""
        texts.append(f"{values['mean']:.1f}{spread}")
    return " / ".join(texts)


def markdown(errors: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table for people: E in meV a frame / F in meV/Å, mean ± half of the range over the seeds, their number."""
    names = list(dict.fromkeys(name for rows in errors.values() for name in rows))
    sparse = any("zeros_of_wrapped_percent" in row for rows in errors.values() for row in rows.values())
    head = ["method", "trained", "seeds", *(["zeros, %"] if sparse else []), *errors]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for name in names:
        rows = [rows.get(name) for rows in errors.values()]
        known = [row for row in rows if row]
        counts = sorted({len(row[KEYS[0]]["values"]) for row in known})
        cells = [name, f"{known[0].get('trainable', 0):,}", "" if name == "zero-shot" else "–".join(map(str, counts))]
        if sparse:
            shares = [row["zeros_of_wrapped_percent"]["mean"] for row in known if "zeros_of_wrapped_percent" in row]
            cells.append(f"{statistics.fmean(shares):.1f}" if shares else "")
        cells += [cell(row) if row else "" for row in rows]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the molecules of rMD17")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--molecules", default=",".join(MOLECULES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--search", default="aspirin", help="molecule on which learning rates are chosen")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--finished", action="store_true", help="only write the table of what is finished")
    given = parser.parse_args()
    from forcetune.adapters.methods import method
    from forcetune.utils.files import write_text

    methods, molecules = given.methods.split(","), given.molecules.split(",")
    epochs = max(2, given.steps * BATCH // FRAMES)
    seeds = range(1, given.seeds + 1)

    def job(molecule: str, name: str, rate: float, seed: int, tested: bool) -> Job:
        return Job(given.data, given.out, molecule, name, rate, seed, epochs, tested, given.model)

    factors = (1 / 3, 1.0, 3.0)
    search = [
        job(given.search, name, float(f"{factor * method(name).learning_rate:.2g}"), 1, False)
        for name in methods
        for factor in factors
    ]
    if not given.finished:
        run_all(search, given.processes, "learning rates")
    rates = chosen_rates(search)
    # seeds outermost: an unfinished benchmark has complete tables of fewer seeds
    jobs = [
        job(m, name, rates[name]["learning_rate"], seed, True) for seed in seeds for m in molecules for name in methods
    ]
    if not given.finished:
        run_all(jobs, given.processes, "runs")
    errors = table(jobs)
    content = {
        "steps": epochs * FRAMES // BATCH,
        "learning_rates": rates,
        "errors": errors,
        "steps_mmea_over_elora": steps_to_same_loss(jobs, "mmea", "elora"),
        "environment": jobs[0].results()["environment"],
    }
    write_text(given.out / "rmd17.json", json.dumps(content, indent=2) + "\n")
    text = markdown(errors)
    text += "\nLearning rates, chosen on validation: "
    text += ", ".join(f"{name} {found['learning_rate']:g}" for name, found in rates.items()) + ".\n"
    convergence = content["steps_mmea_over_elora"]
    if convergence is not None:
        text += f"Steps of mmea over steps of elora to the same validation loss: {convergence['ratio']:.2f} (median of "
        text += f"{len(convergence['runs'])} pairs of runs).\n"
    write_text(given.out / "rmd17.md", text)
    print(text)


if __name__ == "__main__":
    main()
