"""Does the sparse update find what really changed? A target that differs from its base in a few known weights.

    python benchmarks/interpretation.py --out OUT [--decays 0.01,0.1,0.3,1] [--epochs 200]

The base is ``mini``, the target is ``mini`` with a known change of some weights of two paths; the target labels the
demo's DFT structures (positions only). ``sparse`` is trained on them from the base with several decays of its
thresholds. Reported is how well the support of the learned update agrees with the changed paths and weights: precision
(of what it changed, how much was to be changed; weighted by the size of the change) and recall.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import forcetune
from forcetune.adapters.changes import weight_changes
from forcetune.deployment.loading import deploy
from forcetune.utils.files import write_text

ELEMENTS = (1, 6, 7, 8)
CHANGED = (("interactions.1.linear_up.weight", 1), ("products.0.linear.weight", 0))
SHARE = 0.1
SIZE = 0.5


def changed_target(seed: int = 0) -> tuple[Any, dict[tuple[str, str], np.ndarray]]:
    """``mini`` with a tenth of the weights of two paths moved, and which."""
    target = forcetune.load("mini", elements=ELEMENTS)
    sites = {site.name: site for site in target.sites()}
    generator = np.random.default_rng(seed)
    truth: dict[tuple[str, str], np.ndarray] = {}
    for name, index in CHANGED:
        site = sites[name]
        path = site.paths[index]
        chosen = generator.random(path.size) < SHARE
        weight = target.model.get_submodule(site.module)._parameters[site.parameter]
        with torch.no_grad():
            part = weight.view(-1)[path.start : path.start + path.size]
            part += torch.tensor(np.where(chosen, SIZE * generator.choice([-1, 1], path.size), 0.0)).to(part)
        truth[name, path.name] = chosen
    return target, truth


def label(target: Any, source: Path, out: Path) -> Path:
    """The structures of a file with the target's energies and forces."""
    calculator = forcetune.calculator(target)
    frames = ase.io.read(source, ":")
    for atoms in frames:
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = None
        atoms.info = {"REF_energy": energy}
        atoms.arrays["REF_forces"] = forces
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
    hit = changed = wanted = 0
    for site in backbone.sites():
        part = dict(stored.parts.items()).get(f"{site.name.replace('.', '/')}|weight")
        if part is None:
            continue
        update = part.update().detach().reshape(-1).numpy() != 0
        for path in site.paths:
            found = update[path.start : path.start + path.size]
            asked = truth.get((site.name, path.name), np.zeros(path.size, dtype=bool))
            hit, changed, wanted = hit + (found & asked).sum(), changed + found.sum(), wanted + asked.sum()
    return {
        "paths_precision": right / total,
        "paths_recall": sum(key in order[: len(truth)] for key in truth) / len(truth),
        "weights_precision": float(hit / max(changed, 1)),
        "weights_recall": float(hit / wanted),
        "changed_weights": int(changed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--decays", default="0.01,0.1,0.3,1")
    parser.add_argument("--epochs", type=int, default=200)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    target, truth = changed_target()
    files = {part: label(target, forcetune.demo_file(part), given.out / f"{part}.xyz") for part in ("test", "valid")}
    rows = {}
    table = Table(
        "λ_τ", "F MAE before", "after", "zeros %", "paths: precision", "recall", "weights: precision", "recall"
    )
    for decay in map(float, given.decays.split(",")):
        run = forcetune.fit(
            files["test"],
            model="mini",
            method="sparse",
            valid=files["valid"],
            epochs=given.epochs,
            out=given.out / f"sparse-{decay:g}",
            settings={
                "method.threshold_decay": decay,
                "references.mode": "model",
                "training.batch_size": 20,
                "training.valid_every": 5,
                "output.overwrite": True,
            },
        )
        found = agreement(run.folder, truth) | {
            "zeros_of_wrapped": run.results["sparsity"]["zeros_of_wrapped"],
            "forces_before": run.before["valid"].forces_mae_mev_per_ang,
            "forces_after": run.after["valid"].forces_mae_mev_per_ang,
        }
        rows[f"{decay:g}"] = found
        keys = ("paths_precision", "paths_recall", "weights_precision", "weights_recall")
        errors = (f"{found['forces_before']:.1f}", f"{found['forces_after']:.2f}")
        table.add_row(
            f"{decay:g}", *errors, f"{100 * found['zeros_of_wrapped']:.1f}", *(f"{found[k]:.2f}" for k in keys)
        )
    write_text(given.out / "interpretation.json", json.dumps(rows, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
