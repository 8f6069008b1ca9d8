"""The error that linear layers in bfloat16 would add to energies and forces, on the CPU.

    python benchmarks/bfloat16.py --data DATA/rmd17/aspirin/train.xyz [--model mini] [--frames 10]

Features and weights of all linear layers are rounded to bfloat16 and multiplied in float32, as a GPU's tensor cores do;
gradients pass unrounded, so that the errors are lower bounds. Everything else is float64, the reference throughout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from torch import Tensor

import forcetune
from forcetune.deployment.calculator import build_frame
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import collate
from forcetune.kernels import layers
from forcetune.kernels.linear import equivariant_linear, species_linear


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in another precision; its gradient is that of the value itself."""
    return value + (value.detach().to(dtype).to(value.dtype) - value.detach())


def round_linears(dtype: torch.dtype) -> None:
    """From now on linear layers round their features and weights."""

    def linear(blocks: Any, weight: Tensor, inputs: Sequence[Tensor], *others: Any) -> list[Tensor]:
        return equivariant_linear(blocks, rounded(weight, dtype), [rounded(x, dtype) for x in inputs], *others)

    def by_species(blocks: Any, weight: Tensor, n_species: int, inputs: Sequence[Tensor], *others: Any) -> list[Tensor]:
        return species_linear(blocks, rounded(weight, dtype), n_species, [rounded(x, dtype) for x in inputs], *others)

    layers.equivariant_linear, layers.species_linear = linear, by_species


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--frames", type=int, default=10)
    arguments = parser.parse_args()
    frames = [build_frame(atoms) for atoms in ase.io.read(arguments.data, index=f":{arguments.frames}")]
    model: Any = forcetune.load(arguments.model, dtype="float64", kernels="torch", device="cpu")
    batch = collate(build_graphs(model, frames))
    atoms = np.array([len(frame) for frame in frames])
    exact = model.predict(batch)
    for dtype in (torch.float32, torch.bfloat16):
        round_linears(dtype)
        other = model.predict(batch)
        energy = 1000 * (other.energy - exact.energy).detach().numpy() / atoms
        forces = 1000 * (other.forces - exact.forces).detach().numpy()
        print(
            f"{arguments.model}, linears in {str(dtype).removeprefix('torch.')}: energies {abs(energy).mean():.2g} "
            f"meV/atom ({energy.std():.2g} about their mean), forces {abs(forces).mean():.2g} meV/Å "
            f"(largest {abs(forces).max():.2g})"
        )


if __name__ == "__main__":
    main()
