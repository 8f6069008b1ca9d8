"""Does the sparse update choose the same weights again, and do sets of a kind choose alike?

    python benchmarks/supports.py --data DATA --out OUT [--base sevennet-0] [--method sparse+final_threshold=0.05] \
        [--sets ethanol,uracil,acac-600,si,ge,li,cu,ni,alloy] [--seeds 3] [--rate 0.01]

DATA, OUT and sets are those of `transfer.py`, whose runs in OUT are used where they are finished. The first set is
trained with all seeds, the others with one. Of every two runs: 1 − R² between their changes of all weights and between
the relative changes of their paths, and which share of the weights that either changed was changed by both, beside what
independent choices as many in every path would share. OUT/supports.json and supports.md hold the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transfer import SETS, Job, run_job

METALS = {"cu", "ni", "alloy"}


def table(pairs: list[dict[str, Any]]) -> str:
    """Markdown: one row for every two runs."""
    lines = [
        "| runs | zeros, % | 1 − R² of weights | 1 − R² of paths | shared, % | by chance, % |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for pair in pairs:
        zeros = " / ".join(f"{100 * value:.0f}" for value in pair["zeros"])
        cells = [f"{pair[key]:.3f}" for key in ("weights", "paths")]
        cells += [f"{100 * pair[key]:.1f}" for key in ("shared", "shared_by_chance")]
        lines.append(f"| {' – '.join(pair['runs'])} | {zeros} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summarize(pairs: list[dict[str, Any]]) -> str:
    """Means over pairs of a kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        first, second = (name.rpartition(" ")[0] for name in pair["runs"])
        if first == second:
            kind = "one set, two seeds"
        else:
            sides = sorted("metals" if name in METALS else "others" for name in (first, second))
            kind = f"two sets, {' and '.join(dict.fromkeys(sides))}"
        kinds.setdefault(kind, []).append(pair)
    keys = ("weights", "paths", "shared", "shared_by_chance")
    lines = [
        "| pairs | number | 1 − R² of weights | 1 − R² of paths | shared | by chance |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, chosen in kinds.items():
        cells = [f"{sum(pair[key] for pair in chosen) / len(chosen):.3f}" for key in keys]
        lines.append(f"| {kind} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="sevennet-0")
    parser.add_argument("--method", default="sparse+final_threshold=0.05")
    parser.add_argument("--sets", default="ethanol,uracil,acac-600,si,ge,li,cu,ni,alloy")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from forcetune.adapters.changes import likeness
    from forcetune.deployment.loading import deploy
    from forcetune.utils.files import write_text

    names = options.sets.split(",")
    if unknown := [name for name in names if name not in SETS]:
        raise SystemExit(f"--sets: {', '.join(unknown)} not known; there are {', '.join(SETS)}.")
    common = (options.rate, 1, options.frames, options.steps, "float32")
    first = Job(options.out, options.base, names[0], options.method, *common)
    jobs = {f"{names[0]} {seed}": Job(**{**asdict(first), "seed": seed}) for seed in range(1, options.seeds + 1)}
    jobs |= {f"{name} 1": Job(**{**asdict(first), "set": name}) for name in names[1:]}
    zeros, models = {}, {}
    for name, job in jobs.items():
        print(name, flush=True)
        zeros[name] = run_job(job, options.data, 60)["sparsity"]["zeros_of_wrapped"]
        models[name] = deploy(None, job.folder, device="cpu", fold=False).backbone
    pairs = [
        {"runs": pair, "zeros": [zeros[name] for name in pair], **asdict(likeness(*(models[name] for name in pair)))}
        for pair in itertools.combinations(jobs, 2)
    ]
    settings = {key: value for key, value in vars(options).items() if key not in ("data", "out")}
    settings["base"] = Path(options.base).stem
    write_text(options.out / "supports.json", json.dumps({"settings": settings, "pairs": pairs}, indent=1) + "\n")
    text = summarize(pairs) + "\n" + table(pairs)
    write_text(options.out / "supports.md", text)
    print(text)


if __name__ == "__main__":
    main()
