"""Is there a combination of updates that is ahead of the published methods? Searched on some sets, proven on others.

    python benchmarks/combinations.py --data DATA --out OUT --base sevennet-0 --search ethanol,alloy,acac-600 \
        --prove uracil,si,3bpa-mixed --trials 60 [--candidates 2] [--seeds 3] [--processes 2]

Sets, frames and steps are those of ``transfer.py``, DATA is the same folder, and OUT may be the same, too.

1. Optuna tries tables of updates: what changes the weights of linear layers, of tensor products and contractions, and
   of radial networks; gates or none; rank, threshold, optimizer, averaging, weight of energies, learning rate. The
   score of a trial is the mean over the sets of 0.3 ln(energy error) + 0.7 ln(force error) of validation frames, less
   that of elora as it is. A trial that is behind the median of the others after a set ends there.
2. The best trials, no two with the same table, run on the other sets with several seeds, with the learning rate that
   the search gave. Published methods run there with a rate chosen for each set, which is an advantage to them.

The verdict is the median over the other sets of a candidate's test errors divided by those of the best published method
of each set. Trials are kept in a journal, runs in their folders: a command that was interrupted goes on.

OUT/combinations.json and combinations.md have all trials and the proof.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transfer import (
    ENERGY,
    FORCES,
    Job,
    choose_optimizer_and_rate,
    collect,
    draw_frames,
    markdown,
    run_job,
    run_method,
)

PUBLISHED = "full,elora,mmea,sparse"
ENERGY_SHARE = 0.3
NO_PRUNING = 8
"""So many trials run on all sets, before any is pruned."""

# of linear layers and readouts; of tensor products and contractions; of radial networks
LINEAR = ("none", "low_rank", "sparse", "dense", "gain")
PRODUCT = ("none", "low_rank", "sparse", "dense", "gain")
RADIAL = ("none", "low_rank", "dense", "gain")


def suggest(trial: Any) -> dict[str, Any]:
    """A point of the space, as plain values."""
    return {
        "linear": trial.suggest_categorical("linear", LINEAR),
        "gates": trial.suggest_categorical("gates", (False, True)),
        "product": trial.suggest_categorical("product", PRODUCT),
        "radial": trial.suggest_categorical("radial", RADIAL),
        "rank": trial.suggest_categorical("rank", (4, 8, 16, 32)),
        "final_threshold": trial.suggest_float("final_threshold", 1e-3, 0.1, log=True),
        "optimizer": trial.suggest_categorical("optimizer", ("adam", "schedulefree")),
        "schedule": trial.suggest_categorical("schedule", ("cosine", "constant")),
        "energy": trial.suggest_categorical("energy", (1.0, 10.0)),
        "rate": trial.suggest_float("rate", 5e-4, 2e-2, log=True),
    }


STARTS = (
    {"linear": "low_rank", "gates": False, "product": "low_rank", "radial": "low_rank", "rate": 2e-3},
    {"linear": "none", "gates": True, "product": "low_rank", "radial": "low_rank", "rate": 2e-3},
    {"linear": "sparse", "gates": False, "product": "sparse", "radial": "dense", "rate": 1e-2},
    {"linear": "sparse", "gates": True, "product": "sparse", "radial": "dense", "rate": 5e-3},
    {"linear": "dense", "gates": False, "product": "dense", "radial": "dense", "rate": 9e-3},
    {"linear": "dense", "gates": True, "product": "dense", "radial": "dense", "rate": 5e-3},
)
"""Points that are tried first, all with schedule-free AdamW: the published ones and combinations of two."""


def build_table(point: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The table of updates of a point."""

    def weight(choice: str) -> list[dict[str, Any]]:
        return {
            "none": [],
            "low_rank": [{"update": "LowRank", "rank": point["rank"], "alpha": float(point["rank"])}],
            "sparse": [{"update": "SoftThreshold", "final_threshold": point["final_threshold"]}],
            "dense": [{"update": "Dense"}],
            "gain": [{"update": "Gain"}],
        }[choice]

    gate = [{"update": "Gate"}] if point["gates"] else []
    # what is not a matrix of channels is trained as it is, as all published methods do
    table = {
        "linear": weight(point["linear"]) + gate,
        "readout": weight(point["linear"]) + gate,
        "tensor_product": weight(point["product"]),
        "contraction": weight(point["product"]),
        "radial_mlp": weight(point["radial"]),
        "contraction_lower": weight("dense"),
        "radial_basis": weight("dense"),
        "modality": weight("dense"),
    }
    return {kind: updates for kind, updates in table.items() if updates}


def build_training(point: dict[str, Any]) -> dict[str, Any]:
    """What a point says about training."""
    training: dict[str, Any] = {"optimizer": point["optimizer"], "loss": {"energy": point["energy"]}}
    if point["optimizer"] == "adam" and point["schedule"] == "constant":
        training |= {"ema": 0.995, "schedule": {"name": "constant"}}
    return training


def describe(point: dict[str, Any]) -> str:
    """A point in a few words."""
    parts = [
        f"{kind} {point[kind].replace('_', ' ')}" for kind in ("linear", "product", "radial") if point[kind] != "none"
    ]
    parts += ["gates"] * point["gates"]
    if "low_rank" in point.values():
        parts.append(f"rank {point['rank']}")
    if "sparse" in point.values():
        parts.append(f"δ {point['final_threshold']:.2g}")
    name = point["optimizer"] if point["optimizer"] == "schedulefree" else f"adam, {point['schedule']}"
    return ", ".join([*parts, name, f"energy × {point['energy']:g}", f"rate {point['rate']:.2g}"])


def score(results: dict[str, Any]) -> float:
    """0.3 ln(energy error) + 0.7 ln(force error) of validation frames."""
    errors = results["errors"]["valid"]["after"]
    return ENERGY_SHARE * math.log(errors[ENERGY]) + (1 - ENERGY_SHARE) * math.log(errors[FORCES])


def open_study(out: Path, name: str) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(out / f"{name}.journal"))),
        sampler=optuna.samplers.TPESampler(seed=os.getpid(), multivariate=True, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=NO_PRUNING),
        load_if_exists=True,
    )


def search(arguments: tuple[Any, ...]) -> None:
    """Trials of one process, until there are as many as were asked for."""
    job, sets, references, data, tests, trials, name = arguments
    import optuna

    from forcetune.errors import ForcetuneError

    study = open_study(job.out, name)

    def objective(trial: Any) -> float:
        point = suggest(trial)
        if point["linear"] == "none" and not point["gates"]:
            raise optuna.TrialPruned("nothing acts on the linear layers")
        total = 0.0
        for number, of_set in enumerate(sets):
            one = replace(job, set=of_set, method=f"{name}-{trial.number}", rate=point["rate"])
            try:
                results = run_job(one, data, tests, build_table(point), **build_training(point))
            except ForcetuneError as error:
                raise optuna.TrialPruned(str(error)) from error
            total += score(results) - references[of_set]
            trial.report(total / (number + 1), number)
            if trial.should_prune():
                raise optuna.TrialPruned
        return total / len(sets)

    def enough(study: Any, _: Any) -> None:
        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        if len(study.get_trials(deepcopy=False, states=states)) >= trials:
            study.stop()

    study.optimize(objective, callbacks=[enough])


def best_points(study: Any, number: int) -> list[tuple[int, float, dict[str, Any]]]:
    """Number, score and point of the best trials, of each table one."""
    import optuna

    chosen: dict[str, tuple[int, float, dict[str, Any]]] = {}
    complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    for trial in sorted(complete, key=lambda one: one.value):
        kinds = " ".join(str(trial.params[kind]) for kind in ("linear", "gates", "product", "radial"))
        chosen.setdefault(kinds, (trial.number, trial.value, trial.params))
    return list(chosen.values())[:number]


def prove(arguments: tuple[Any, ...]) -> None:
    """One candidate on one set, all seeds."""
    job, point, seeds, data, tests = arguments
    for seed in range(1, seeds + 1):
        run_job(replace(job, seed=seed), data, tests, build_table(point), **build_training(point))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="sevennet-0")
    parser.add_argument("--search", default="ethanol,alloy,acac-600", help="sets to search on")
    parser.add_argument("--prove", default="uracil,si,3bpa-mixed", help="sets to prove on")
    parser.add_argument("--published", default=PUBLISHED, help="methods to compare with, as in transfer.py")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--tests", type=int, default=60)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--name", default="combinations")
    parser.add_argument("--finished", action="store_true", help="only write the tables of what is finished")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from forcetune.utils.files import write_text

    searched, proving = options.search.split(","), options.prove.split(",")
    job = Job(
        options.out,
        options.base,
        "",
        "elora+training.optimizer=adam",
        2e-3,
        1,
        options.frames,
        options.steps,
        options.dtype,
    )
    for of_set in searched + proving:
        draw_frames(options.data, options.out, of_set, options.frames, options.tests)
    study = open_study(options.out, options.name)
    published = [
        (
            replace(job, set=of_set, method=method, rate=0.0),
            options.seeds,
            choose_optimizer_and_rate(of_set, method)[1],
            options.data,
            options.tests,
        )
        for of_set in proving
        for method in options.published.split(",")
    ]
    if not options.finished:
        references = {
            of_set: score(run_job(replace(job, set=of_set), options.data, options.tests)) for of_set in searched
        }
        if not study.trials:
            usual = {
                "rank": 16,
                "final_threshold": 0.003,
                "optimizer": "schedulefree",
                "schedule": "constant",
                "energy": 1.0,
            }
            for point in STARTS:
                study.enqueue_trial(usual | point)
        common = (job, searched, references, options.data, options.tests, options.trials, options.name)
        with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
            pool.map(search, [common] * options.processes, chunksize=1)
            for label in pool.imap_unordered(run_method, published):
                print(label, flush=True)
            candidates = [
                (
                    replace(job, set=of_set, method=f"{options.name}-{number}", rate=point["rate"]),
                    point,
                    options.seeds,
                    options.data,
                    options.tests,
                )
                for number, _, point in best_points(study, options.candidates)
                for of_set in proving
            ]
            pool.map(prove, candidates, chunksize=1)
    write_tables(options, job, study, searched, proving, write_text)


def write_tables(
    options: argparse.Namespace, job: Job, study: Any, searched: Sequence[str], proving: Sequence[str], write_text: Any
) -> None:
    """All trials that are finished, and the proof as far as it is."""
    points = best_points(study, options.candidates)
    methods = [*options.published.split(","), *(f"{options.name}-{number}" for number, _, _ in points)]
    table: dict[str, dict[str, Any]] = {}
    for of_set in proving:
        rows = {method: collect(replace(job, set=of_set, method=method), options.seeds) for method in methods}
        table[of_set] = {method: row for method, row in rows.items() if row}
    complete = sorted((trial for trial in study.trials if trial.state.name == "COMPLETE"), key=lambda one: one.value)
    pruned = sum(trial.state.name == "PRUNED" for trial in study.trials)
    lines = [
        f"Base {options.base}, {options.frames} training frames, {options.steps} steps, {options.dtype}.",
        f"Searched on {', '.join(searched)}: {len(complete)} trials complete, {pruned} pruned.",
        "",
        "| trial | score against elora | what |",
        "|--:|--:|---|",
        *(f"| {trial.number} | {trial.value:+.3f} | {describe(trial.params)} |" for trial in complete[:15]),
        "",
    ]
    verdicts = {}
    for number, _, point in points:
        name = f"{options.name}-{number}"
        ratios = {}
        for key in (ENERGY, FORCES):
            of_sets = []
            for rows in table.values():
                others = [row[key]["median"] for method, row in rows.items() if method in options.published.split(",")]
                if name in rows and others:
                    of_sets.append(rows[name][key]["median"] / min(others))
            if of_sets:
                ratios[key] = {"median": statistics.median(of_sets), "low": min(of_sets), "high": max(of_sets)}
        verdicts[name] = ratios
        lines.append(f"- {name} ({describe(point)}), errors by those of the best published method of each set:")
        lines += [
            f"    - {key}: {one['median']:.2f} ({one['low']:.2f}–{one['high']:.2f})" for key, one in ratios.items()
        ]
    text = "\n".join(lines) + "\n\n" + markdown(table)
    content = {
        "base": options.base,
        "frames": options.frames,
        "steps": options.steps,
        "dtype": options.dtype,
        "searched": list(searched),
        "trials": [{"number": trial.number, "score": trial.value, **trial.params} for trial in complete],
        "proof": table,
        "verdicts": verdicts,
    }
    write_text(options.out / f"{options.name}.json", json.dumps(content, indent=1) + "\n")
    write_text(options.out / f"{options.name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
