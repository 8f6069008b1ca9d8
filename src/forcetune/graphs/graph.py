"""A frame as a graph, and several graphs as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from forcetune.frames.frame import FloatArray, Frame, IntArray
from forcetune.graphs.edges import find_edges

GRAPH_FIELDS = ("cell", "energy", "stress", "weight", "file_weights", "replayed")
"""Fields of a batch with one row for each graph."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Graphs laid one after another; a single graph is a batch of one.

    Attributes:
        numbers: (atoms,) atomic numbers.
        positions: (atoms, 3), Å.
        cell: (graphs, 3, 3), Å.
        edge_index: (2, edges), sender and receiver.
        unit_shifts: (edges, 3), periodic image of the receiver, in lattice vectors.
        graph_index: (atoms,) the graph of each atom.
        ptr: (graphs + 1,) first atom of each graph, and the number of atoms.
        energy: (graphs,), eV, always float64: in float32 a total energy of 10⁵ eV has steps of 8 meV; NaN where
            there is no label.
        forces: (atoms, 3), eV/Å; NaN where there is no label.
        stress: (graphs, 3, 3), eV/Å³; NaN where there is no label.
        moments: (atoms, 3), μB; NaN where there is no label.
        spins: (atoms, 3), the magnetic state; NaN where none was given.
        magforces: (atoms, 3), −∂E/∂spins, eV per unit of the state; NaN where there is no label.
        weight: (graphs,), how much each graph counts in the means of the loss; float64.
        file_weights: (graphs, 4), factors of the errors of energy, forces, stress and moments (magnetic forces
            included) in the loss, from the weights in the file; float64.
        replayed: (graphs,), whether it is a replay frame, which may have a head of its own.
    """

    numbers: Tensor
    positions: Tensor
    cell: Tensor
    edge_index: Tensor
    unit_shifts: Tensor
    graph_index: Tensor
    ptr: Tensor
    energy: Tensor
    forces: Tensor
    stress: Tensor
    moments: Tensor
    spins: Tensor
    magforces: Tensor
    weight: Tensor
    file_weights: Tensor
    replayed: Tensor

    @property
    def n_graphs(self) -> int:
        return len(self.ptr) - 1

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)

    @property
    def n_edges(self) -> int:
        return self.edge_index.shape[1]

    @property
    def atoms_per_graph(self) -> Tensor:
        """(graphs,) number of atoms of each graph."""
        return self.ptr[1:] - self.ptr[:-1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The same batch elsewhere; ``dtype`` applies to the real-valued tensors but energy and weights."""
        moved = {}
        for field in fields(self):
            tensor: Tensor = getattr(self, field.name)
            converted = tensor.is_floating_point() and field.name not in ("energy", "weight", "file_weights")
            moved[field.name] = tensor.to(device=device, dtype=dtype if converted else None)
        return replace(self, **moved)

    def weighted(self, weight: float) -> Batch:
        """The same batch with this weight for every graph."""
        return replace(self, weight=torch.full_like(self.weight, weight))

    def for_replay(self) -> Batch:
        """The same batch as replay frames."""
        return replace(self, replayed=torch.ones_like(self.replayed))


def build_graph(frame: Frame, cutoff: float, dtype: torch.dtype = torch.float64) -> Batch:
    """The graph of one frame as a batch of one.

    Raises:
        InputError: as :func:`find_edges`.
    """
    return graph_with(frame, *find_edges(frame, cutoff), dtype)


def graph_with(frame: Frame, edge_index: IntArray, unit_shifts: FloatArray, dtype: torch.dtype) -> Batch:
    """The graph of one frame whose neighbours are known."""
    atoms = len(frame)

    def label(value: FloatArray | float | None, shape: tuple[int, ...], dtype: torch.dtype = dtype) -> Tensor:
        if value is None:
            return torch.full(shape, torch.nan, dtype=dtype)
        return torch.as_tensor(np.asarray(value), dtype=dtype).reshape(shape)

    return Batch(
        numbers=torch.as_tensor(frame.numbers, dtype=torch.int64),
        positions=torch.as_tensor(frame.positions, dtype=dtype),
        cell=torch.as_tensor(frame.cell, dtype=dtype).reshape(1, 3, 3),
        edge_index=torch.as_tensor(edge_index),
        unit_shifts=torch.as_tensor(unit_shifts, dtype=dtype),
        graph_index=torch.zeros(atoms, dtype=torch.int64),
        ptr=torch.tensor([0, atoms]),
        energy=label(frame.energy, (1,), torch.float64),
        forces=label(frame.forces, (atoms, 3)),
        # without a volume there is no stress to compare a label with
        stress=label(frame.stress if frame.has_volume else None, (1, 3, 3)),
        moments=label(frame.moments, (atoms, 3)),
        spins=label(frame.spins, (atoms, 3)),
        magforces=label(frame.magforces, (atoms, 3)),
        weight=torch.ones(1, dtype=torch.float64),
        file_weights=torch.tensor(
            [[frame.energy_weight, frame.forces_weight, frame.stress_weight, frame.moments_weight]], dtype=torch.float64
        ),
        replayed=torch.zeros(1, dtype=torch.bool),
    )


def unlabelled_batch(
    numbers: Tensor, positions: Tensor, cell: Tensor, graph_index: Tensor, edge_index: Tensor, unit_shifts: Tensor
) -> Batch:
    """Several graphs without labels, from tensors that stay where they are.

    Args:
        numbers: (atoms,) atomic numbers.
        positions: (atoms, 3), Å; their dtype is that of the batch.
        cell: (graphs, 3, 3), rows are lattice vectors, Å.
        graph_index: (atoms,) the graph of each atom, ascending.
        edge_index, unit_shifts: as in :class:`Batch`.
    """
    graphs, atoms = len(cell), len(numbers)
    unknown = positions.new_full((atoms, 3), torch.nan)
    weight = torch.ones(graphs, dtype=torch.float64, device=positions.device)
    return Batch(
        numbers=numbers,
        positions=positions,
        cell=cell,
        edge_index=edge_index,
        unit_shifts=unit_shifts,
        graph_index=graph_index,
        # counting them would make the host wait on a GPU
        ptr=torch.searchsorted(graph_index, torch.arange(graphs + 1, device=positions.device)),
        energy=torch.full_like(weight, torch.nan),
        forces=unknown,
        stress=positions.new_full((graphs, 3, 3), torch.nan),
        moments=unknown,
        spins=unknown,
        magforces=unknown,
        weight=weight,
        file_weights=weight.unsqueeze(1).expand(graphs, 4),
        replayed=torch.zeros(graphs, dtype=torch.bool, device=positions.device),
    )


def collate(graphs: Sequence[Batch]) -> Batch:
    """Lay graphs one after another."""
    offsets = np.cumsum([0, *(graph.n_atoms for graph in graphs)])
    counts = np.cumsum([0, *(graph.n_graphs for graph in graphs)])

    def joined(name: str, dim: int = 0) -> Tensor:
        return torch.cat([getattr(graph, name) for graph in graphs], dim=dim)

    return Batch(
        numbers=joined("numbers"),
        positions=joined("positions"),
        cell=joined("cell"),
        edge_index=torch.cat([g.edge_index + int(o) for g, o in zip(graphs, offsets, strict=False)], dim=1),
        unit_shifts=joined("unit_shifts"),
        graph_index=torch.cat([g.graph_index + int(c) for g, c in zip(graphs, counts, strict=False)]),
        ptr=torch.cat([graphs[0].ptr[:1]] + [g.ptr[1:] + int(o) for g, o in zip(graphs, offsets, strict=False)]),
        energy=joined("energy"),
        forces=joined("forces"),
        stress=joined("stress"),
        moments=joined("moments"),
        spins=joined("spins"),
        magforces=joined("magforces"),
        weight=joined("weight"),
        file_weights=joined("file_weights"),
        replayed=joined("replayed"),
    )


def split_batch(batch: Batch, most: int) -> list[Batch]:
    """Cut a batch into runs of at most so many graphs, as equal as can be; edges lie in the order of their graphs."""
    count = -(-batch.n_graphs // most)
    bounds = [batch.n_graphs * index // count for index in range(count + 1)]
    first_atoms = [int(batch.ptr[bound]) for bound in bounds]
    graph_of_edge = batch.graph_index[batch.edge_index[0]]
    first_edges = torch.searchsorted(graph_of_edge, torch.tensor(bounds, device=graph_of_edge.device)).tolist()
    parts = []
    for index in range(count):
        graphs, atoms, edges = (
            slice(firsts[index], firsts[index + 1]) for firsts in (bounds, first_atoms, first_edges)
        )
        cut = {
            name: getattr(batch, name)[atoms]
            for name in ("numbers", "positions", "graph_index", "forces", "moments", "spins", "magforces")
        } | {name: getattr(batch, name)[graphs] for name in GRAPH_FIELDS}
        parts.append(
            Batch(
                **cut | {"graph_index": cut["graph_index"] - graphs.start},
                edge_index=batch.edge_index[:, edges] - atoms.start,
                unit_shifts=batch.unit_shifts[edges],
                ptr=batch.ptr[graphs.start : graphs.stop + 1] - atoms.start,
            )
        )
    return parts


def with_spin_leaf(batch: Batch) -> Batch:
    """The batch with spins that an energy can be differentiated by; those that require gradients stay what they are."""
    return batch if batch.spins.requires_grad else replace(batch, spins=batch.spins.detach().requires_grad_())


def moment_labels(predicted: Tensor, labels: Tensor) -> Tensor:
    """Labels of what is predicted: vectors (atoms, 3), or magnitudes (atoms, 1)."""
    return labels if predicted.shape[1] == 3 else torch.linalg.vector_norm(labels, dim=1, keepdim=True)
