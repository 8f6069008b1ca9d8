"""Plans made by PyTorch's operations where the edges are: on a CPU they are those that NumPy makes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forcetune.frames.neighbor_list import neighbours
from forcetune.kernels.device_plan import make_device_plan
from forcetune.kernels.edge_plan import CPU_CHUNK, Chunk, Plan, make_plan
from systems import cluster, crystal


class Reads(TorchDispatchMode):
    """Notes operations that would wait for a device; copies to the CPU are none on a CPU, and are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def assert_equal(one: Plan | Chunk, other: Plan | Chunk) -> None:
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, Tensor):
            assert left.dtype == right.dtype and torch.equal(left, right), field.name
        elif field.name == "chunks":
            assert len(left) == len(right)
            for a, b in zip(left, right, strict=True):
                assert_equal(a, b)
        else:
            assert left == right, field.name


def batch_of(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Edges, their images and species."""
    if name == "no edges":
        return torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3), torch.tensor([2, 0, 2])
    atoms = crystal() if name in ("crystal", "twice", "itself") else cluster((1, 6, 8), 27)
    atoms = atoms * (2, 2, 1) if name == "crystal" else atoms
    cutoff = 6.0 if name == "itself" else 3.5
    edges, shifts = neighbours(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
    if name == "shuffled":
        chosen = np.random.default_rng(0).permutation(edges.shape[1])
        edges, shifts = edges[:, chosen], shifts[chosen]
    if name == "one way":
        edges, shifts = edges[:, edges[0] < edges[1]], shifts[edges[0] < edges[1]]
    if name == "twice":
        edges, shifts = np.concatenate((edges, edges), axis=1), np.concatenate((shifts, shifts))
    return torch.tensor(edges), torch.tensor(shifts), torch.tensor(atoms.numbers % 5)


@pytest.mark.parametrize("name", ["cluster", "crystal", "itself", "shuffled", "one way", "twice", "no edges"])
@pytest.mark.parametrize("paired", [True, False])
def test_plans_are_those_of_the_cpu(name: str, paired: bool) -> None:
    edges, shifts, species = batch_of(name)
    with Reads() as reads:
        plan = make_device_plan(edges, shifts, species, paired=paired, limit=CPU_CHUNK)
    assert not reads.names
    assert_equal(plan, make_plan(edges, shifts, species, paired=paired))
    whole = make_device_plan(edges, shifts, species, paired=paired)
    assert torch.equal(whole.edges, plan.edges) and sum(chunk.receivers for chunk in whole.chunks) == len(species)


def test_images_too_far_for_keys_are_pairs_of_their_own() -> None:
    edges = torch.tensor([[0, 1], [1, 0]])
    shifts = torch.tensor([[2.0**21, 0.0, 0.0], [-(2.0**21), 0.0, 0.0]])
    species = torch.tensor([0, 0])
    plan = make_device_plan(edges, shifts, species, limit=CPU_CHUNK)
    assert plan.n_pairs == 2
    assert_equal(plan, make_plan(edges, shifts, species))
