"""Does the sparse update find what really changed? A target that differs from its base in a few known weights.

    python benchmarks/interpretation.py --out OUT [--decays 0.01,0.1,0.3,1] [--epochs 200]
    python benchmarks/interpretation.py --out OUT --base sevennet-0 --structures A.xyz,B.xyz --batch 5 \
        --changed 2_self_interaction_1.linear.weight:0,3_self_interaction_2.linear.weight:1

The target is the base with a known change of some weights of two paths; it labels the demo's DFT structures, or those
of other files (positions only). ``sparse`` is trained on them from the base with several decays of its thresholds.
Reported is how well the support of the learned update agrees with the changed paths and weights: precision (of what it
changed, how much was to be changed; weighted by the size of the change) and recall, beside the share of right weights
that a random choice would have.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from rich.console import Console
from rich.table import Table

import forcetune
from forcetune.adapters.changes import weight_changes
from forcetune.deployment.loading import deploy
from forcetune.utils.files import write_text

CHANGED = "interactions.1.linear_up.weight:1,products.0.linear.weight:0"
SHARE = 0.1


def changed_target(
    base: str, elements: list[int], changed: str, size: float, seed: int = 0
) -> tuple[Any, dict[tuple[str, str], np.ndarray]]:
    """The base with a tenth of the weights of some paths moved, and which."""
    target = forcetune.load(base, elements=elements)
    sites = {site.name: site for site in target.sites()}
    generator = np.random.default_rng(seed)
    truth: dict[tuple[str, str], np.ndarray] = {}
    for text in changed.split(","):
        name, _, index = text.rpartition(":")
        if name not in sites:
            raise SystemExit(f"--changed {text}: {base} has no such weights; it has {', '.join(sites)}.")
        site = sites[name]
        if not index.isdigit() or int(index) >= len(site.paths):
            raise SystemExit(f"--changed {text}: write weights:path, the latter from 0 to {len(site.paths) - 1}.")
        path = site.paths[int(index)]
        chosen = generator.random(path.size) < SHARE
        weight = target.model.get_submodule(site.module)._parameters[site.parameter]
        with torch.no_grad():
            part = weight.view(-1)[path.start : path.start + path.size]
            part += torch.tensor(np.where(chosen, size * generator.choice([-1, 1], path.size), 0.0)).to(part)
        truth[name, path.name] = chosen
    return target, truth


def read_structures(source: str | Path) -> list[Atoms]:
    return list(ase.io.read(source, ":"))  # pyright: ignore[reportReturnType, reportArgumentType]


def label(target: Any, frames: list[Atoms], out: Path) -> Path:
    """The structures with the target's energies and forces."""
    calculator = forcetune.calculator(target)
    for atoms in frames:
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = None
        atoms.info = {"REF_energy": energy}
        atoms.arrays = {name: atoms.arrays[name] for name in ("numbers", "positions")} | {"REF_forces": forces}
    ase.io.write(out, frames, format="extxyz")
    return out


def agreement(run: Path, truth: dict[tuple[str, str], np.ndarray]) -> dict[str, float]:
    """Precision and recall of the learned support."""
    backbone = deploy(None, run, device="cpu", fold=False).backbone
    rows = {(row.site, row.path): row for row in weight_changes(backbone)}
    total = sum((row.relative) ** 2 for row in rows.values()) or 1.0
    right = sum(rows[key].relative ** 2 for key in truth)
    order = sorted(rows, key=lambda key: -rows[key].relative)
    stored = backbone.model.forcetune_adapter
    hit = changed = wanted = wrapped = 0
    for site in backbone.sites():
        part = dict(stored.parts.items()).get(f"{site.name.replace('.', '/')}|weight")
        if part is None:
            continue
        update = part.update().detach().reshape(-1).numpy() != 0
        for path in site.paths:
            found = update[path.start : path.start + path.size]
            asked = truth.get((site.name, path.name), np.zeros(path.size, dtype=bool))
            hit, changed, wanted = hit + (found & asked).sum(), changed + found.sum(), wanted + asked.sum()
            wrapped += path.size
    return {
        "paths_precision": right / total,
        "paths_recall": sum(key in order[: len(truth)] for key in truth) / len(truth),
        "weights_precision": float(hit / max(changed, 1)),
        "weights_recall": float(hit / wanted),
        "weights_precision_of_chance": float(wanted / wrapped),
        "changed_weights": int(changed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--decays", default="0.01,0.1,0.3,1")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch", type=int, default=20, help="frames of a step")
    parser.add_argument("--base", default="mini")
    parser.add_argument(
        "--changed", default=CHANGED, help="weights and the index of one of their paths, for each change"
    )
    parser.add_argument("--size", type=float, default=0.5, help="what a changed weight moves by, up or down")
    parser.add_argument(
        "--structures", help="files, comma-separated; every tenth frame validates (default: the demo's)"
    )
    parser.add_argument("--limit", type=int, default=200, help="most structures of each file")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.structures:
        known = [atoms for name in given.structures.split(",") for atoms in read_structures(name)[: given.limit]]
        parts = {"test": [atoms for k, atoms in enumerate(known) if k % 10], "valid": known[::10]}
    else:
        parts = {part: read_structures(forcetune.demo_file(part)) for part in ("test", "valid")}
    elements = sorted({int(number) for frames in parts.values() for atoms in frames for number in atoms.numbers})
    target, truth = changed_target(given.base, elements, given.changed, given.size)
    files = {part: label(target, frames, given.out / f"{part}.xyz") for part, frames in parts.items()}
    rows = {}
    table = Table(
        "λ_τ",
        "F MAE before",
        "after",
        "zeros %",
        "paths: precision",
        "recall",
        "weights: precision",
        "recall",
        "chance",
    )
    for decay in map(float, given.decays.split(",")):
        run = forcetune.fit(
            files["test"],
            model=given.base,
            method="sparse",
            valid=files["valid"],
            epochs=given.epochs,
            out=given.out / f"sparse-{decay:g}",
            settings={
                "method.threshold_decay": decay,
                "references.mode": "model",
                "training.batch_size": given.batch,
                "training.valid_every": min(5, given.epochs),
                "output.overwrite": True,
            },
        )
        found = agreement(run.folder, truth) | {
            "zeros_of_wrapped": run.results["sparsity"]["zeros_of_wrapped"],
            "forces_before": run.before["valid"].forces_mae_mev_per_ang,
            "forces_after": run.after["valid"].forces_mae_mev_per_ang,
        }
        rows[f"{decay:g}"] = found
        keys = ("paths_precision", "paths_recall", "weights_precision", "weights_recall", "weights_precision_of_chance")
        errors = (f"{found['forces_before']:.1f}", f"{found['forces_after']:.2f}")
        table.add_row(
            f"{decay:g}", *errors, f"{100 * found['zeros_of_wrapped']:.1f}", *(f"{found[k]:.3f}" for k in keys)
        )
    write_text(given.out / "interpretation.json", json.dumps(rows, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
