"""Few-shot fine-tuning on rMD17 aspirin from a small base that has never seen it: methods from the same start.

    python benchmarks/rmd17_transfer.py --data DATA/rmd17 --out OUT

1. A MACE of 32x0e+32x1o with random weights is trained (method ``full``) on the ``train`` frames of the nine other
   molecules and merged into a plain model, the base.
2. Every method is fitted to 50 of the 100 ``train`` frames of aspirin (the published split, the other 50 validate)
   and tested on the 1000 ``test`` frames.

Both steps are kept in OUT: a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import forcetune
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.library import import_mace

MOLECULES = (
    *("azobenzene", "benzene", "ethanol", "malonaldehyde", "naphthalene"),
    *("paracetamol", "salicylic", "toluene", "uracil"),
)


def random_base(path: Path, seed: int = 0) -> None:
    """A MACE of 32x0e+32x1o for H, C, N, O with random weights."""
    modules = import_mace()
    from e3nn import o3

    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float64)
    try:
        model = modules.ScaleShiftMACE(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
            num_interactions=2,
            num_elements=4,
            hidden_irreps=o3.Irreps("32x0e+32x1o"),
            MLP_irreps=o3.Irreps("16x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.zeros(4),
            avg_num_neighbors=13.0,
            atomic_numbers=[1, 6, 7, 8],
            correlation=3,
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
            radial_MLP=[64, 64, 64],
            radial_type="bessel",
        )
    finally:
        torch.set_default_dtype(torch.float32)
    MaceBackbone.from_module(model).save(path)


def make_base(data: Path, out: Path, epochs: int) -> Path:
    """The base: trained on the nine other molecules."""
    base = out / "base.model"
    if base.exists():
        return base
    start = out / "random.model"
    random_base(start)
    run = forcetune.fit(
        [data / molecule / "train.xyz" for molecule in MOLECULES],
        model=start,
        method="full",
        valid=[data / molecule / "valid.xyz" for molecule in MOLECULES],
        epochs=epochs,
        out=out / "pretraining",
        settings={
            "references.mode": "average",
            "training.batch_size": 10,
            "training.learning_rate": 1e-2,
            "training.schedule.name": "cosine",
            "training.schedule.warmup_epochs": 1,
            "training.valid_every": 2,
            "output.adapter_dtype": "float64",
            "output.overwrite": True,
        },
    )
    forcetune.merge(run.folder, base)
    return base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the molecules of rMD17")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pretrain-epochs", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--methods", default="mmea,elora,full")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = make_base(arguments.data, arguments.out, arguments.pretrain_epochs)
    aspirin = arguments.data / "aspirin"
    rows = {}
    for method in arguments.methods.split(","):
        folder = arguments.out / f"{method}-{arguments.epochs}"
        if not (folder / "results.json").exists():
            forcetune.fit(
                aspirin / "train.xyz",
                model=base,
                method=method,
                valid=0.5,
                test=aspirin / "test.xyz",
                epochs=arguments.epochs,
                out=folder,
                settings={"output.overwrite": True},
            )
        rows[method] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    table = Table("method", "trained", "E MAE meV", "F MAE meV/Å", "s/step", "adapter kB")
    before = next(iter(rows.values()))["errors"]["test"]["before"]
    table.add_row("zero-shot", "0", *(f"{before[key]:.1f}" for key in ("energy_mae_mev", "forces_mae_mev_per_ang")))
    for method, row in rows.items():
        after = row["errors"]["test"]["after"]
        table.add_row(
            method,
            f"{row['parameters']['trainable']:,}",
            f"{after['energy_mae_mev']:.1f}",
            f"{after['forces_mae_mev_per_ang']:.1f}",
            f"{row['training']['seconds_per_step']:.3f}",
            f"{row['adapter_bytes'] / 1e3:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
