"""The published ablations of MMEA and of the sparse method, from ``mini`` on 50 frames of rMD17 aspirin.

    python benchmarks/ablations.py --data DATA/rmd17 --out OUT [--seeds 2] [--steps 600] [--processes 2]

Every row is a fit with the budget and the data of ``rmd17.py``. MMEA: the gate without SiLU, with separate bottlenecks,
without shift of the scalars, without gain of the higher orders, with one gain for all channels of an irrep, with 1 + x
instead of the exponential, and the conventional adapter that breaks symmetry. Sparse: which weights are wrapped (all,
linears, tensor products), and the decay of the thresholds, λ_τ, which trades zeros for errors.

Finished runs in OUT are not repeated. ``ablations.json`` and ``ablations.md`` there hold the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rmd17 import BATCH, FRAMES, Job, markdown, run_all, table

ROWS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "mmea": ("mmea", 0.015, {}),
    "mmea without SiLU": ("mmea", 0.015, {"activation": False}),
    "mmea, separate bottlenecks": ("mmea", 0.015, {"shared_bottleneck": False}),
    "mmea without shift": ("mmea", 0.015, {"shift": False}),
    "mmea without gain": ("mmea", 0.015, {"modulation": False}),
    "mmea, shared gain": ("mmea", 0.015, {"shared_gain": True}),
    "mmea, gain 1 + x": ("mmea", 0.015, {"gain": "linear"}),
    "mmea-pure": ("mmea-pure", 0.015, {}),
    "mmea-pure without SiLU": ("mmea-pure", 0.015, {"activation": False}),
    "mmea-pure, separate bottlenecks": ("mmea-pure", 0.015, {"shared_bottleneck": False}),
    "mmea-pure without shift": ("mmea-pure", 0.015, {"shift": False}),
    "mmea-pure without gain": ("mmea-pure", 0.015, {"modulation": False}),
    "mmea-pure, shared gain": ("mmea-pure", 0.015, {"shared_gain": True}),
    "mmea-pure, gain 1 + x": ("mmea-pure", 0.015, {"gain": "linear"}),
    "adapter (not equivariant)": ("adapter", 0.005, {}),
    "sparse, linears": ("sparse", 0.01, {"wrap": "linears"}),
    "sparse, tensor products": ("sparse", 0.01, {"wrap": "tensor_products"}),
    **{f"sparse, λ_τ = {decay:g}": ("sparse", 0.01, {"threshold_decay": decay}) for decay in (0.01, 0.1, 0.3, 1, 3)},
}
"""Row → method, learning rate (of mmea as ``rmd17.py`` chose it, the others' default), options."""


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
    from forcetune.files import write_text

    epochs = max(2, given.steps * BATCH // FRAMES)
    jobs = []
    for seed in range(1, given.seeds + 1):
        for row in given.rows:
            name, rate, options = ROWS[row]
            chosen = tuple(options.items())
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
