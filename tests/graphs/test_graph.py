"""Neighbours against ASE's, batches, and what a graph refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from forcetune.errors import InputError
from forcetune.frames.neighbor_list import neighbours
from forcetune.graphs.graph import build_graph, collate
from systems import cluster, crystal, frames_of


def find_edges(atoms: Atoms, cutoff: float) -> list[tuple[int, int, float]]:
    """Sender, receiver and length of every edge, as ASE finds them."""
    sender, receiver, length = neighbor_list("ijd", atoms, cutoff)
    return sorted((int(i), int(j), round(float(d), 8)) for i, j, d in zip(sender, receiver, length, strict=True))


def same_as_ase(atoms: Atoms, cutoff: float) -> None:
    edge_index, unit_shifts = neighbours(atoms.positions, atoms.cell.array, atoms.pbc, cutoff)
    sender, receiver = edge_index
    vectors = atoms.positions[receiver] - atoms.positions[sender] + unit_shifts @ atoms.cell.array
    lengths = np.linalg.norm(vectors, axis=1)
    edges = sorted((int(i), int(j), round(float(d), 8)) for i, j, d in zip(sender, receiver, lengths, strict=True))
    assert edges == find_edges(atoms, cutoff)
    assert (np.diff(receiver) >= 0).all()


@pytest.mark.parametrize(
    "atoms",
    [molecule("C6H6"), bulk("Cu"), bulk("Fe", cubic=True), fcc111("Al", (2, 2, 3), vacuum=6.0), crystal(), Atoms("H")],
    ids=["molecule", "primitive cell", "cubic cell", "slab", "skewed cell", "atom"],
)
@pytest.mark.parametrize("cutoff", [3.0, 6.0])
def test_neighbours_agree_with_ase(atoms: Atoms, cutoff: float) -> None:
    same_as_ase(atoms, cutoff)


@given(st.integers(0, 10_000), st.lists(st.booleans(), min_size=3, max_size=3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_neighbours_of_random_cells_with_atoms_outside(seed: int, pbc: list[bool], far: bool) -> None:
    rng = np.random.default_rng(seed)
    cell = 4.0 * np.eye(3) + 0.8 * rng.standard_normal((3, 3))
    positions = rng.uniform(-1, 2, (5, 3)) @ cell + (100.0 if far else 0.0)
    same_as_ase(Atoms("H5", positions, cell=cell, pbc=pbc), 3.7)


def test_batch_is_the_sum_of_its_graphs() -> None:
    graphs = [build_graph(frame, 4.0) for frame in frames_of(cluster(), crystal(), Atoms("O"))]
    batch = collate(graphs)
    assert batch.n_graphs == 3
    assert batch.n_atoms == 9 + 8 + 1
    assert batch.n_edges == sum(graph.n_edges for graph in graphs)
    assert batch.ptr.tolist() == [0, 9, 17, 18]
    assert batch.atoms_per_graph.tolist() == [9, 8, 1]
    assert torch.equal(batch.graph_index[batch.edge_index[0]], batch.graph_index[batch.edge_index[1]])
    nested = collate([collate(graphs[:2]), graphs[2]])
    assert torch.equal(nested.edge_index, batch.edge_index)
    assert torch.equal(nested.ptr, batch.ptr)


def test_float32_keeps_total_energies_in_float64() -> None:
    atoms = cluster()
    frame = frames_of(atoms)[0]
    batch = build_graph(frame, 4.0, torch.float32).to(dtype=torch.float32)
    assert batch.positions.dtype == torch.float32
    assert batch.energy.dtype == torch.float64


def test_periodic_frame_without_a_cell_is_refused() -> None:
    atoms = cluster()
    atoms.pbc = [True, False, False]
    with pytest.raises(InputError, match=r"<atoms>, frame 0: periodic, but its lattice vectors"):
        build_graph(frames_of(atoms)[0], 4.0)
