"""The published protocols to the letter, and beside them the same from a fair start.

    python benchmarks/published.py --data DATA/rmd17 --out OUT [--base mini] [--molecules ethanol] \
        [--protocols mmea,sparse] [--methods full,elora,mmea] [--seeds 1] [--scale 1.0]

``mmea`` (AAAI 2026): 50 frames, batches of 5, 500 epochs, Adam with amsgrad at 5e-3, loss 1·MSE(E) + 1000·MSE(F), EMA
0.995, clipping at 100, weight decay 1e-8, plateau 0.8 with patience 5, from epoch 401 a second stage (energies per atom
1000, forces 100, rate 1e-3), float64. As published, reference energies are least squares on the labels of one
composition, far from those that the base was trained with (``average``); beside it stands the fair start, least
squares on what the base leaves (``estimate``). An additive gate can absorb the difference and a bias-free low-rank
update cannot.

``sparse`` (ICLR 2026): schedule-free AdamW at 1e-2, batches of 64, thresholds that decay with 0.01 (L) and 0.3 (H),
here on 400 frames, with enough steps that the thresholds of H settle, beside ``full`` under the same optimizer.

Test frames are in no training and choose nothing. ``--scale`` shortens all runs, to try it out. What is finished in
OUT is not repeated; ``published.json`` and ``published.md`` there hold the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from ase.io import read, write
from rich.console import Console

import forcetune
from forcetune.utils.files import write_text

STARTS = ("average", "estimate")
SPARSE_METHODS = ("sparse", "sparse-h", "full")
KEYS = ("energy_mae_mev_per_atom", "forces_mae_mev_per_ang")
console = Console(stderr=True)


def mmea_settings(start: str, scale: float) -> dict[str, Any]:
    """All options of MMEA's published runs, those included that are forcetune's defaults."""
    epochs = max(10, round(500 * scale))
    return {
        "references.mode": start,
        "training.epochs": epochs,
        "training.batch_size": 5,
        "training.optimizer": "adam",
        "training.learning_rate": 5e-3,
        "training.loss.energy": 1.0,
        "training.loss.forces": 1000.0,
        "training.ema": 0.995,
        "training.clip": 100.0,
        "training.weight_decay": 1e-8,
        "training.schedule": {"name": "plateau", "factor": 0.8, "patience": 5},
        "training.second_stage": {
            "start": round(0.8 * epochs) + 1,
            "learning_rate": 1e-3,
            "loss": {"energy": 1000.0, "forces": 100.0, "energy_per_atom": True},
        },
        "model.dtype": "float64",
    }


def sparse_settings(scale: float, steps_per_epoch: int) -> dict[str, Any]:
    """Of the sparse paper's runs, with 2,000 steps."""
    epochs = max(10, round(2000 * scale / steps_per_epoch))
    return {
        "references.mode": "estimate",
        "training.epochs": epochs,
        "training.valid_every": max(1, epochs // 50),
        "training.batch_size": 64,
        "training.optimizer": "schedulefree",
        "training.learning_rate": 1e-2,
        "training.ema": None,
        "training.weight_decay": 1e-8,
        "model.dtype": "float64",
    }


def write_frames(arguments: argparse.Namespace, molecule: str, protocol: str) -> dict[str, Path]:
    """Files to train, validate and test on: the published 50 and 50, or 400 and 50 of those to test on."""
    source, folder = arguments.data / molecule, arguments.out / "frames"
    folder.mkdir(parents=True, exist_ok=True)
    if protocol == "mmea":
        known = read(source / "train.xyz", ":")
        parts = {"train": known[:50], "valid": known[50:100], "test": read(source / "test.xyz", ":")[500:]}
    else:
        known = read(source / "test.xyz", ":")
        parts = {"train": known[:400], "valid": known[400:450], "test": known[500:]}
    paths = {part: folder / f"{molecule}-{protocol}-{part}.xyz" for part in parts}
    for part, frames in parts.items():
        if not paths[part].exists():
            write(paths[part], frames, format="extxyz")
    return paths


def fit(
    arguments: argparse.Namespace, run: Path, molecule: str, protocol: str, method: str, **more: Any
) -> dict[str, Any]:
    """A finished run's results."""
    if not (run / "results.json").exists():
        files = write_frames(arguments, molecule, protocol)
        settings = {"output.overwrite": True, "output.forgetting": False, "training.threads": 1, **more}
        forcetune.fit(
            files["train"],
            model=arguments.base,
            method=method,
            valid=files["valid"],
            test=files["test"],
            out=run,
            settings=settings,
        )
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, each with its errors over seeds; written after each."""
    plans: list[tuple[str, str, str, dict[str, Any]]] = []
    if "mmea" in arguments.protocols.split(","):
        for method in arguments.methods.split(","):
            plans += [("mmea", method, start, mmea_settings(start, arguments.scale)) for start in STARTS]
    if "sparse" in arguments.protocols.split(","):
        plans += [("sparse", method, "estimate", sparse_settings(arguments.scale, 7)) for method in SPARSE_METHODS]
    done: list[dict[str, Any]] = []
    for molecule in arguments.molecules.split(","):
        for protocol, method, start, settings in plans:
            results = []
            for seed in range(1, arguments.seeds + 1):
                name = f"{Path(arguments.base).stem}-{molecule}-{protocol}-{method}-{start}-{arguments.scale:g}-{seed}"
                console.print(name)
                run = arguments.out / "runs" / name
                results.append(fit(arguments, run, molecule, protocol, method, **settings, **{"training.seed": seed}))
            errors = [one["errors"]["test"] for one in results]
            done.append(
                {
                    "molecule": molecule,
                    "protocol": protocol,
                    "method": method,
                    "references": start,
                    "seeds": len(results),
                    "trainable": results[0]["parameters"]["trainable"],
                    "adapter_bytes": results[0]["adapter_bytes"],
                    "zeros": (results[0].get("sparsity") or {}).get("zeros_of_wrapped"),
                    "seconds": [one["training"]["seconds"] for one in results],
                    "offset_mev_per_atom": results[0]["reference_energies"]["offset_after_mev_per_atom"],
                    **{f"before_{key}": errors[0]["before"][key] for key in KEYS},
                    **{key: [error["after"][key] for error in errors] for key in KEYS},
                }
            )
            given = {key: value for key, value in vars(arguments).items() if key not in ("data", "out")}
            content = {"settings": given | {"base": Path(arguments.base).stem}, "rows": done}
            write_text(arguments.out / "published.json", json.dumps(content, indent=1) + "\n")
            write_text(arguments.out / "published.md", table(done))
    return done


def table(done: list[dict[str, Any]]) -> str:
    """Markdown: medians over seeds, lowest and highest in brackets."""
    lines = [
        "| molecule | protocol | method | E0 | before, meV/atom / meV/Å | meV/atom | meV/Å | zeros, % |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]
    for row in done:
        cells = [row[key] for key in ("molecule", "protocol", "method", "references")]
        cells.append(" / ".join(f"{row[f'before_{key}']:,.1f}" for key in KEYS))
        for key, digits in zip(KEYS, (2, 1), strict=True):
            text = f"{statistics.median(row[key]):.{digits}f}"
            spread = f" ({min(row[key]):.{digits}f}–{max(row[key]):.{digits}f})" if len(row[key]) > 1 else ""
            cells.append(text + spread)
        cells.append("" if row["zeros"] is None else f"{100 * row['zeros']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of rMD17")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="mini", help="name or file of the foundation model")
    parser.add_argument("--molecules", default="ethanol")
    parser.add_argument("--protocols", default="mmea,sparse")
    parser.add_argument("--methods", default="full,elora,mmea")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published number of epochs or steps")
    arguments = parser.parse_args()
    print(table(rows(arguments)))


if __name__ == "__main__":
    main()
