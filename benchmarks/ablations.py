"""Ablations of MMEA and sparse, and what goes beyond the papers, from ``mini`` on 50 frames of rMD17 aspirin.

    python benchmarks/ablations.py --data DATA/rmd17 --out OUT [--seeds 2] [--steps 600] [--processes 2]

Every row is a fit with the budget and the data of ``rmd17.py``. MMEA: the gate without SiLU, with separate bottlenecks,
without shift of the scalars, without gain of the higher orders, with one gain for all channels of an irrep, with 1 + x
instead of the exponential, with gates on skip connections, and the conventional adapter that breaks symmetry. Low rank:
half the rank, the same number of parameters shared by gradient, norms apart from directions, other scaling and start,
L-BFGS at the end. Sparse: which weights are wrapped (all, linears, tensor products), and the decay of the thresholds,
λ_τ, which trades zeros for errors.

Finished runs in OUT are not repeated. ``ablations.json`` and ``ablations.md`` there hold the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rmd17 import BATCH, FRAMES, Job, markdown, run_all, table

MMEA, ELORA = 0.015, 0.015
"""Learning rates as ``rmd17.py`` chose them; other methods have three times their default, as chosen there for all."""

GATES: dict[str, dict[str, Any]] = {
    " without SiLU": {"method.activation": False},
    ", separate bottlenecks": {"method.shared_bottleneck": False},
    " without shift": {"method.shift": False},
    " without gain": {"method.modulation": False},
    ", shared gain": {"method.shared_gain": True},
    ", gain 1 + x": {"method.gain": "linear"},
    ", skip connections": {"method.skip": True},
}
LOW_RANK: dict[str, dict[str, Any]] = {
    ", rank 8": {"method.rank": 8},
    ", budget of rank 8": {"method.budget": 29_472},
    ", norms": {"method.norms": True},
    ", rank-stabilised": {"method.alpha": 64.0},
    ", gradient start": {"method.init": "gradient"},
    ", L-BFGS at the end": {"training.refine": 30},
}
ROWS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "mmea": ("mmea", MMEA, {}),
    **{f"mmea{label}": ("mmea", MMEA, settings) for label, settings in GATES.items()},
    "mmea-pure": ("mmea-pure", MMEA, {}),
    **{f"mmea-pure{label}": ("mmea-pure", MMEA, settings) for label, settings in GATES.items()},
    "adapter (not equivariant)": ("adapter", 0.015, {}),
    "elora": ("elora", ELORA, {}),
    **{f"elora{label}": ("elora", ELORA, settings) for label, settings in LOW_RANK.items()},
    "full": ("full", 0.003, {}),
    "full, L-BFGS at the end": ("full", 0.003, {"training.refine": 30}),
    "gain": ("gain", 0.015, {}),
    "gain, L-BFGS at the end": ("gain", 0.015, {"training.refine": 30}),
    "bias": ("bias", 0.015, {}),
    "freeze, last layer": ("freeze", 0.003, {}),
    "sparse, linears": ("sparse", 0.01, {"method.wrap": "linears"}),
    "sparse, tensor products": ("sparse", 0.01, {"method.wrap": "tensor_products"}),
    **{
        f"sparse, λ_τ = {decay:g}": ("sparse", 0.01, {"method.threshold_decay": decay})
        for decay in (0.01, 0.1, 0.3, 1, 3)
    },
}
"""Row → method, learning rate, settings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the molecules of rMD17")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=lambda text: text.split(";"), default=list(ROWS), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--finished", action="store_true", help="only write the table of what is finished")
    given = parser.parse_args()
    from forcetune.utils.files import write_text

    epochs = max(2, given.steps * BATCH // FRAMES)
    jobs = []
    for seed in range(1, given.seeds + 1):
        for row in given.rows:
            name, rate, settings = ROWS[row]
            chosen = tuple(settings.items())
            jobs.append(Job(given.data, given.out, "aspirin", name, rate, seed, epochs, True, "mini", chosen, row))
    if not given.finished:
        run_all(jobs, given.processes, "ablations")
    errors = table(jobs)
    write_text(given.out / "ablations.json", json.dumps({"steps": given.steps, "errors": errors}, indent=2) + "\n")
    text = markdown(errors)
    write_text(given.out / "ablations.md", text)
    print(text)


if __name__ == "__main__":
    main()
