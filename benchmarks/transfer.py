"""Which method is best on real weights: bases × sets × methods × seeds, learning rates chosen on validation.

    python benchmarks/transfer.py --data DATA --out OUT --base sevennet-0 --sets ethanol,alloy \
        --methods readout,full,elora,mmea,mmea-pure,sparse [--frames 40] [--steps 150] [--seeds 3] [--processes 2]

DATA is the folder with ``rmd17``, ``crystals``, ``acac``, ``3bpa``, ``water`` and ``magnetic``. Of every set so many
training frames are drawn (always the same), others validate, others test; all are written to OUT/frames. A run starts
from the base with E0 re-estimated and takes the same number of steps of a few frames (``batch`` of the set), with a
short warm-up and a cosine, or schedule-free where the method asks for it; the epoch with the lowest validation loss
counts.

Learning rates: the method's default for the base, three times less and three times more are tried with the first seed,
then further ones as long as the best by validation loss is at the edge. The other seeds run with the best; with
``--default-rates`` all run with the default, with ``--rates TABLE.json`` with those that another table found. Errors in
the table are of test frames, which chose nothing.

A method may carry options: ``elora+rank=8`` or ``elora+training.loss.stress=1e4``; what has no dot is an option of the
method. Several ``--methods`` tables in one OUT share what they have in common: a run that is finished is not repeated.

OUT/transfer.json, transfer.md and transfer.png are of everything that is finished and was asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read, write
from magnetic_forces import FACTOR
from rich.console import Console

RATE_FACTOR = 3.0
MOST_RATES = 8
ENERGY, FORCES, STRESS = "energy_mae_mev_per_atom", "forces_mae_mev_per_ang", "stress_mae_mev_per_ang3"
MOMENTS, MAGFORCES = "moment_mae_mub", "magforce_mae_mev"
OPTIONAL = {STRESS: ("stress, meV/Å³", 2), MOMENTS: ("moments, μB", 4), MAGFORCES: ("magnetic forces, meV/rad", 2)}
"""Errors that only some sets have: heading and digits."""
METHODS = "readout,full,elora,mmea,mmea-pure,sparse,sparse-h,gain"


@dataclass(frozen=True, slots=True)
class DataSet:
    """Files below DATA; without files of their own, validation and test frames are other frames of the training file.

    Attributes:
        batch: frames of a step.
        settings: of every run, unless a method has others.
        magforces: what labels of magnetic forces are multiplied by.
    """

    train: str
    test: str = ""
    valid: str = ""
    batch: int = 2
    settings: Mapping[str, str] = field(default_factory=dict)
    magforces: float = 1.0


def molecule(name: str) -> DataSet:
    return DataSet(f"rmd17/{name}/train.xyz", f"rmd17/{name}/test.xyz", batch=5)


def crystal(name: str) -> DataSet:
    return DataSet(f"crystals/mlearn_{name}_train.xyz", f"crystals/mlearn_{name}_test.xyz")


SETS = {
    **{name: molecule(name) for name in ("aspirin", "ethanol", "uracil", "toluene", "paracetamol")},
    **{name.lower(): crystal(name) for name in ("Ni", "Cu", "Li", "Si", "Ge")},
    "alloy": DataSet("crystals/MoNbTaW_train.xyz", "crystals/MoNbTaW_test.xyz", "crystals/MoNbTaW_val.xyz"),
    "oxide": DataSet(
        "crystals/LiMnO_mattertune_train.xyz",
        "crystals/LiMnO_mattertune_test.xyz",
        "crystals/LiMnO_mattertune_val.xyz",
    ),
    "water": DataSet("water/water_deepmd_train.xyz", "water/water_deepmd_test.xyz", batch=1),
    "water-stress": DataSet("water/water_dplr_stress_all.xyz", batch=1),
    "acac-300": DataSet("acac/train_300K.xyz", "acac/test_MD_300K.xyz", batch=5),
    "acac-600": DataSet("acac/train_300K.xyz", "acac/test_MD_600K.xyz", batch=5),
    "acac-dihedral": DataSet("acac/train_300K.xyz", "acac/test_dihedral.xyz", batch=5),
    "acac-transfer": DataSet("acac/train_300K.xyz", "acac/test_H_transfer.xyz", batch=5),
    "nio": DataSet("magnetic/NiO_spin_train.xyz", settings={"magnetism.layer": "spin"}, magforces=FACTOR),
    "fe": DataSet("magnetic/Fe_magmom_train.xyz", settings={"magnetism.layer": "spin"}),
    "3bpa-mixed": DataSet("3bpa/train_300K.xyz", "3bpa/train_mixedT.xyz", batch=5),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One fit."""

    out: Path
    base: str
    set: str
    method: str
    rate: float
    seed: int
    frames: int
    steps: int
    dtype: str
    head: str | None = None

    @property
    def folder(self) -> Path:
        kind = f"{Path(self.base).stem}-{self.set}-{self.frames}-{self.steps}-{self.dtype}"
        name = f"{self.method}-{self.rate:.3g}-{self.seed}".replace("/", "_")
        return self.out / "runs" / kind / name

    @property
    def is_finished(self) -> bool:
        return (self.folder / "results.json").exists()

    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))


def draw_frames(data: Path, out: Path, name: str, frames: int, tests: int) -> dict[str, Path]:
    """The files of a set: the drawn frames in the order of the original file.

    Always the same for the same numbers; half as many frames validate as train, at least ten where there are as many.
    """
    definition = SETS[name]
    paths = {part: out / "frames" / f"{name}-{frames}-{tests}-{part}.xyz" for part in ("train", "valid", "test")}
    if all(path.exists() for path in paths.values()):
        return paths
    paths["train"].parent.mkdir(parents=True, exist_ok=True)
    source = read_frames(data / definition.train)
    order = np.random.default_rng(123).permutation(len(source))
    n_valid = max(frames // 2, 10)
    others = order[frames:]
    if frames + (0 if definition.valid else n_valid) + (not definition.test) > len(source):
        raise SystemExit(
            f"{name}: {frames} frames to train on and {n_valid} others are more than the {len(source)} there are."
        )
    parts = {"train": [source[i] for i in sorted(order[:frames])]}
    if definition.valid:
        parts["valid"] = sample(read_frames(data / definition.valid), n_valid)
    else:
        parts["valid"], others = [source[i] for i in sorted(others[:n_valid])], others[n_valid:]
    if definition.test:
        parts["test"] = sample(read_frames(data / definition.test), tests)
    else:
        parts["test"] = [source[i] for i in sorted(others[:tests])]
    for part, chosen in parts.items():
        for atoms in chosen:
            if "REF_magforces" in atoms.arrays:
                atoms.arrays["REF_magforces"] *= definition.magforces
        write(paths[part].with_suffix(".part.xyz"), chosen, format="extxyz")
        paths[part].with_suffix(".part.xyz").replace(paths[part])
    return paths


def read_frames(path: Path) -> list[Atoms]:
    frames = read(path, ":")
    assert isinstance(frames, list)
    return frames


def sample(frames: list[Atoms], number: int) -> list[Atoms]:
    order = np.random.default_rng(123).permutation(len(frames))[:number]
    return [frames[i] for i in sorted(order)]


def settings_of(method: str) -> tuple[str, dict[str, str]]:
    """``elora+rank=8+training.ema=0.9`` as the method's name and dotted settings."""
    name, *options = method.split("+")
    settings = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise SystemExit(f"--methods {method}: write options as key=value.")
        settings[key if "." in key else f"method.{key}"] = value
    return name, settings


def run_job(
    job: Job, data: Path, tests: int, table: Mapping[str, Sequence[Mapping[str, Any]]] | None = None, **training: Any
) -> dict[str, Any]:
    """Fit, unless it is done; what it reached.

    Args:
        job: what to fit.
        data: folder of the sets.
        tests: most test frames.
        table: a method of its own instead of one by name, as ``method.table``.
        **training: options of ``training`` that go before the usual ones.
    """
    import forcetune
    from forcetune.config import SCHEDULE_FREE

    if job.is_finished:
        return job.results()
    files = draw_frames(data, job.out, job.set, job.frames, tests)
    name, settings = settings_of(job.method) if table is None else (job.method, {})
    batch = SETS[job.set].batch
    steps_per_epoch = math.ceil(job.frames / batch)
    epochs = max(2, round(job.steps / steps_per_epoch))
    every = max(1, epochs // 15)
    epochs -= epochs % every
    usual: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch,
        "learning_rate": job.rate,
        "seed": job.seed,
        "threads": 1,
        "valid_every": every,
    }
    warmup = {"warmup_epochs": max(1, epochs // 20)}
    optimizer = training["optimizer"] if table is not None else choose_optimizer_and_rate(job.set, job.method)[0]
    if optimizer in SCHEDULE_FREE:
        usual["schedule"] = warmup
    else:
        usual |= {"ema": 0.99, "schedule": {"name": "cosine", **warmup}}
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    forcetune.run_fit(
        forcetune.load_config(
            given={
                "data": {part: [str(path)] for part, path in files.items()},
                "model": {"model": job.base, "dtype": job.dtype, "head": job.head},
                "method": {"name": name} if table is None else {"name": name, "table": table},
                "training": usual | training,
                "output": {"run": str(job.folder), "overwrite": True, "forgetting": False},
            },
            settings=[f"{key}={value}" for key, value in {**SETS[job.set].settings, **settings}.items()],
        ),
        console=Console(quiet=True),
    )
    return job.results()


def choose_optimizer_and_rate(of_set: str, method: str, rates: Mapping[str, float] | None = None) -> tuple[str, float]:
    """The optimizer of a run, and the learning rate of one that names none.

    Args:
        of_set: name of the set, which may have settings of its own.
        method: with its options.
        rates: defaults of the base, by name of method.
    """
    import forcetune
    from forcetune.adapters.methods import build_method
    from forcetune.runs.method_defaults import choose_rate

    name, settings = settings_of(method)
    config = forcetune.load_config(
        given={"data": {"train": ["-"]}, "method": {"name": name}},
        settings=[f"{key}={value}" for key, value in {**SETS[of_set].settings, **settings}.items()],
    )
    made = build_method(config.method)
    return config.choose_optimizer(made.optimizer), choose_rate(config, made, rates)


def look_up_rate(path: Path, name: str, method: str) -> float:
    """The learning rate that another table found for a method on a set; on other sets the median over those it has."""
    table = json.loads(path.read_text(encoding="utf-8"))["table"]
    rates = {one: rows[method]["learning_rate"] for one, rows in table.items() if method in rows}
    if not rates:
        raise SystemExit(f"--rates {path}: no rate for {method}.")
    return rates.get(name) or statistics.median_low(rates.values())


def tried_rates(job_of: Any, default: float) -> Iterator[Job]:
    """Jobs of the search for a rate: around the default, then on until the best is not at the edge.

    ``job_of(rate)`` makes one; each has to be finished before the next is asked for. A run that failed (its loss became
    infinite) counts as the worst.
    """
    powers, losses = [0, -1, 1], {}
    while powers:
        power = powers.pop(0)
        job = job_of(float(f"{default * RATE_FACTOR**power:.2g}"))
        yield job
        losses[power] = job.results()["training"]["best_valid_loss"] if job.is_finished else math.inf
        if not powers and len(losses) < MOST_RATES:
            best = min(losses, key=lambda one: losses[one])
            if best == min(losses):
                powers.append(best - 1)
            elif best == max(losses):
                powers.append(best + 1)


def run_method(arguments: tuple[Any, ...]) -> str:
    """The search for a rate, unless the job has one, and all seeds of one method on one set."""
    job, seeds, default, data, tests = arguments
    from dataclasses import replace

    from forcetune.errors import ForcetuneError

    jobs = []
    for one in [job] if job.rate else tried_rates(lambda rate: replace(job, rate=rate), default):
        try:
            run_job(one, data, tests)
        except ForcetuneError as error:
            print(f"{one.folder.name}: {error}", flush=True)
        jobs.append(one)
    finished = [one for one in jobs if one.is_finished]
    if finished:
        best = min(finished, key=lambda one: one.results()["training"]["best_valid_loss"])
        for seed in range(2, seeds + 1):
            run_job(replace(best, seed=seed), data, tests)
    return f"{job.set} {job.method}"


def collect(job: Job, seeds: int) -> dict[str, Any] | None:
    """What all finished runs of one method on one set say."""
    pattern = f"{job.method}-*-*"
    runs: dict[float, dict[int, dict[str, Any]]] = {}
    for folder in job.folder.parent.glob(pattern.replace("[", "[[]")):
        rate, seed = folder.name.removeprefix(f"{job.method}-").rsplit("-", 1)
        try:
            key = float(rate), int(seed)
        except ValueError:  # another method whose name begins alike
            continue
        if (folder / "results.json").exists():
            runs.setdefault(key[0], {})[key[1]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if job.rate:
        runs = {rate: of_seed for rate, of_seed in runs.items() if math.isclose(rate, job.rate, rel_tol=5e-3)}
    searched = {rate: of_seed[1]["training"]["best_valid_loss"] for rate, of_seed in runs.items() if 1 in of_seed}
    if not searched:
        return None
    best = min(searched, key=lambda rate: searched[rate])
    chosen = [runs[best][seed] for seed in sorted(runs[best]) if seed <= seeds]
    row: dict[str, Any] = {
        "learning_rate": best,
        "at_edge": not job.rate and best in (min(searched), max(searched)),
        "valid_losses": {f"{rate:g}": searched[rate] for rate in sorted(searched)},
        "test_forces_of_rates": {
            f"{rate:g}": runs[rate][1]["errors"]["test"]["after"][FORCES] for rate in sorted(searched)
        },
        "seeds": len(chosen),
        "trainable": chosen[0]["parameters"]["trainable"],
        "adapter_bytes": chosen[0]["adapter_bytes"],
        "seconds_per_step": statistics.median(one["training"]["seconds_per_step"] for one in chosen),
        "before": {key: chosen[0]["errors"]["test"]["before"].get(key) for key in (ENERGY, FORCES, STRESS)},
    }
    for key in (ENERGY, FORCES, *OPTIONAL):
        values = [one["errors"]["test"]["after"].get(key) for one in chosen]
        if all(value is not None for value in values):
            row[key] = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    if "sparsity" in chosen[0] and chosen[0]["sparsity"]:
        row["zeros_of_wrapped_percent"] = statistics.median(100 * one["sparsity"]["zeros_of_wrapped"] for one in chosen)
    return row


def cell(row: dict[str, Any], key: str, digits: int) -> str:
    value = row.get(key)
    if value is None:
        return ""
    text = f"{value['median']:.{digits}f}"
    if row["seeds"] > 1:
        text += f" ({value['low']:.{digits}f}–{value['high']:.{digits}f})"
    return text


def markdown(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One table a set: medians over seeds, lowest and highest in brackets."""
    lines = []
    for name, rows in table.items():
        if not rows:
            continue
        first = next(iter(rows.values()))
        optional = {key: named for key, named in OPTIONAL.items() if any(key in row for row in rows.values())}
        sparse = any("zeros_of_wrapped_percent" in row for row in rows.values())
        head = ["method", "trained", "adapter kB", "rate", "seeds", "energy, meV/atom", "forces, meV/Å"]
        head += [*(title for title, _ in optional.values()), *["zeros, %"] * sparse, "s/step"]
        lines += [f"**{name}**", "", "| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
        before = first["before"]
        digits = {ENERGY: 2, FORCES: 1} | {key: digits for key, (_, digits) in optional.items()}
        known = {key: before.get(key) for key in digits}
        cells = ["zero-shot", "0", "", "", ""]
        cells += ["" if value is None else f"{value:.{digits[key]}f}" for key, value in known.items()]
        cells += [""] * sparse + [""]
        lines.append("| " + " | ".join(cells) + " |")
        for method, row in rows.items():
            cells = [
                method,
                f"{row['trainable']:,}",
                f"{row['adapter_bytes'] / 1e3:.0f}",
                f"{row['learning_rate']:g}" + (" (edge)" if row["at_edge"] else ""),
                str(row["seeds"]),
                *(cell(row, key, number) for key, number in digits.items()),
            ]
            zeros = row.get("zeros_of_wrapped_percent")
            cells += ["" if zeros is None else f"{zeros:.0f}"] * sparse
            lines.append("| " + " | ".join([*cells, f"{row['seconds_per_step']:.2f}"]) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(table: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Force errors of all sets that have such labels; below, what the learning rate does to them if it was varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    names = [name for name, rows in table.items() if rows and all(FORCES in row for row in rows.values())]
    if not names:
        return
    longest = max(len(method) for name in names for method in table[name])
    width = max((4.2 + 0.07 * longest) * len(names), 0.1 * longest + 1)
    varied = any(len(row["test_forces_of_rates"]) > 1 for name in names for row in table[name].values())
    figure, axes = pyplot.subplots(
        1 + varied, len(names), figsize=(width, 7.5 if varied else 3.5), squeeze=False, layout="constrained"
    )
    for (above, *belows), name in zip(axes.T, names, strict=True):
        rows = table[name]
        for place, (method, row) in enumerate(rows.items()):
            value = row[FORCES]
            bar = above.barh(place, value["median"], height=0.7)
            above.plot([value["low"], value["high"]], [place, place], color="black", linewidth=1.5)
            rates = {float(rate): error for rate, error in row["test_forces_of_rates"].items()}
            for below in belows:
                below.plot(list(rates), list(rates.values()), "o-", color=bar[0].get_facecolor(), label=method)
        above.set_yticks(range(len(rows)), list(rows))
        above.invert_yaxis()
        above.set_xlabel("test force MAE, meV/Å")
        above.set_title(f"{name}, zero-shot {next(iter(rows.values()))['before'][FORCES]:.0f}")
        for below in belows:
            below.set_xscale("log")
            below.set_yscale("log")
            below.set_xlabel("learning rate")
            below.set_ylabel("test force MAE, meV/Å")
            for axis in (below.xaxis, below.yaxis):
                axis.set_minor_formatter(NullFormatter())
    if varied:
        figure.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with rmd17, crystals, acac, 3bpa, water, …")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="sevennet-0", help="name or file of the foundation model")
    parser.add_argument("--head", help="head or modality of the base")
    parser.add_argument("--sets", default="ethanol,alloy", help=f"of {', '.join(SETS)}")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--frames", type=int, default=40, help="training frames of each set")
    parser.add_argument("--tests", type=int, default=60, help="most test frames of each set")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    no_search = parser.add_mutually_exclusive_group()
    no_search.add_argument("--default-rates", action="store_true", help="no search: what the methods have on this base")
    no_search.add_argument("--rates", type=Path, help="no search: the rates of this table (…/transfer/sets.json)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    parser.add_argument("--processes", type=int, default=2, help="fits at the same time, of one thread each")
    parser.add_argument("--name", default="transfer", help="name of the files with the tables")
    parser.add_argument("--finished", action="store_true", help="only write the tables of what is finished")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    from forcetune.backbones.loading import backbone_class
    from forcetune.backbones.registry import resolve
    from forcetune.utils.files import write_text

    names, methods = options.sets.split(","), options.methods.split(",")
    unknown = [name for name in names if name not in SETS]
    if unknown:
        raise SystemExit(f"--sets: {', '.join(unknown)} not known; there are {', '.join(SETS)}.")
    common = (options.frames, options.steps, options.dtype, options.head)
    base_rates = backbone_class(resolve(options.base).library).learning_rates

    def job(name: str, method: str) -> Job:
        rate = choose_optimizer_and_rate(name, method, base_rates)[1] if options.default_rates else 0.0
        if options.rates:
            rate = look_up_rate(options.rates, name, method)
        return Job(options.out, options.base, name, method, rate, 1, *common)

    work = [
        (
            job(name, method),
            options.seeds,
            choose_optimizer_and_rate(name, method)[1],
            options.data,
            options.tests,
        )
        for name in names
        for method in methods
    ]
    if not options.finished:
        for name in names:
            draw_frames(options.data, options.out, name, options.frames, options.tests)
        with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
            for number, label in enumerate(pool.imap_unordered(run_method, work), 1):
                print(f"{number}/{len(work)} {label}", flush=True)
    table = {}
    for name in names:
        rows = {method: collect(job(name, method), options.seeds) for method in methods}
        table[name] = {method: row for method, row in rows.items() if row}
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "base": options.base,
        **dict(zip(("frames", "steps", "dtype", "head"), common, strict=True)),
        "table": table,
    }
    write_text(options.out / f"{options.name}.json", json.dumps(content, indent=1) + "\n")
    text = f"Base {options.base}, {options.frames} training frames, {options.steps} steps, {options.dtype}.\n\n"
    write_text(options.out / f"{options.name}.md", text + markdown(table))
    if any(table.values()):
        draw(table, options.out / f"{options.name}.png")
    print(text + markdown(table))


if __name__ == "__main__":
    main()
