"""A small MACE of iron's lattice, which knows no spin.

python -m recipes.spin_lattice.foundation --data FOLDER --out FILE.model [--epochs N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import forcetune
from forcetune.backbones.mace.architecture import MaceArchitecture
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.content import draw_network
from forcetune.deployment.merge import merge
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.read import read_frames
from recipes.spin_lattice.data import cell
from recipes.spin_lattice.hamiltonian import CUTOFF, solve

SETTINGS: dict[str, Any] = {
    "references.mode": "model",
    "training.batch_size": 8,
    "training.learning_rate": 1e-2,
    "training.schedule.name": "cosine",
    "training.clip": 10.0,
    "training.loss.form": "huber",
    "training.loss.energy": 10.0,
    "training.loss.forces": 1.0,
    "training.loss.stress": 10.0,
    "training.loss.energy_per_atom": True,
    "output.forgetting": False,
    "data.doctor": "off",
}


def random_model(data: Path, channels: int) -> MaceBackbone:
    """Random weights; neighbours and scale from the data, E0 the energy of an atom in the perfect crystal."""
    perfect = cell((2, 2, 2))
    architecture = MaceArchitecture(
        kind="ScaleShiftMACE",
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=2,
        interactions=("RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock"),
        atomic_numbers=(26,),
        hidden_irreps=f"{channels}x0e+{channels}x1o",
        MLP_irreps="16x0e",
        avg_num_neighbors=(14.0, 14.0),
        correlation=(3, 3),
        gate="silu",
    )
    model: Any = draw_network(architecture)
    frames = read_frames(data / "lattice_train.xyz", require=("energy", "forces")).frames
    size = np.concatenate([frame.forces for frame in frames if frame.forces is not None]).std()
    with torch.no_grad():
        model.scale_shift.scale.fill_(float(size))
        model.scale_shift.shift.fill_(0.0)
    backbone = MaceBackbone.from_module(model)
    backbone.set_reference_energies({26: solve(perfect, None).energy / len(perfect)})
    assert build_graphs(backbone, frames[:1])[0].n_edges
    return backbone


def train(data: Path, path: Path, *, epochs: int = 120, channels: int = 16) -> forcetune.Run:
    """Train it and write it to ``path``."""
    start = path.with_suffix(".random.safetensors")
    torch.manual_seed(1)
    random_model(data, channels).save(start)
    run = forcetune.fit(
        data / "lattice_train.xyz",
        model=start,
        method="full",
        valid=data / "lattice_valid.xyz",
        epochs=epochs,
        out=path.with_suffix(".run"),
        settings=SETTINGS | {"output.overwrite": True},
    )
    merge(run.folder, path)
    start.unlink()
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=120)
    given = parser.parse_args()
    found = train(given.data, given.out, epochs=given.epochs)
    print(found.after["valid"])
