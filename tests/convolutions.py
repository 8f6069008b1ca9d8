"""A small convolution with its plan and inputs, for tests of several kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from forcetune.frames.neighbor_list import neighbours
from forcetune.kernels.convolution import Path, Paths
from forcetune.kernels.edge_plan import Plan, make_plan
from systems import cluster, crystal

PATHS = Paths(
    (
        Path(source=0, channels=2, dim_in=1, dim_out=1, odd=False, group=0, column=0),
        Path(source=1, channels=3, dim_in=3, dim_out=1, odd=True, group=0, column=2),
        Path(source=0, channels=2, dim_in=1, dim_out=3, odd=True, group=1, column=3),
        Path(source=1, channels=3, dim_in=3, dim_out=3, odd=False, group=1, column=0),
    ),
    ((1, 5), (3, 5)),
)


def plan_for(name: str, *, paired: bool = True) -> tuple[Plan, Tensor]:
    if name == "no edges":
        edges, shifts = np.zeros((2, 0), dtype=np.int64), np.zeros((0, 3))
        species = torch.tensor([1, 0, 1])
    else:
        atoms = crystal() if name == "crystal" else cluster((1, 6), 5)
        edges, shifts = neighbours(atoms.positions, atoms.cell.array, atoms.pbc, 3.0)
        if name == "one way":
            edges, shifts = edges[:, edges[0] < edges[1]], shifts[edges[0] < edges[1]]
        species = torch.tensor(atoms.numbers % 3)
    index = torch.tensor(edges)
    return make_plan(index, torch.tensor(shifts), species, paired=paired), index


def tensors(plan: Plan, seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    angular = [random(plan.n_pairs, path.dim_in * path.dim_out) for path in PATHS.paths]
    return random(plan.n_pairs, 10), angular, [random(plan.n_atoms, 1, 2), random(plan.n_atoms, 3, 3)]
