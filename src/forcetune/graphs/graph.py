"""A frame as a graph, and several graphs as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame, IntArray
from forcetune.frames.neighbours import neighbours

_LARGEST_EXTENT = 1000.0
_MOST_IMAGES = 1e6
_MOST_EDGES = 1e9
_MOST_BOXES = 1e8


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
        weight: (graphs,), how much each graph counts in the loss; float64.
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
    weight: Tensor

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
        """The same batch elsewhere; ``dtype`` applies to the real-valued tensors but energy and weight."""
        moved = {}
        for field in fields(self):
            tensor: Tensor = getattr(self, field.name)
            converted = tensor.is_floating_point() and field.name not in ("energy", "weight")
            moved[field.name] = tensor.to(device=device, dtype=dtype if converted else None)
        return replace(self, **moved)

    def weighted(self, weight: float) -> Batch:
        """The same batch with this weight for every graph."""
        return replace(self, weight=torch.full_like(self.weight, weight))


def _check_extent(frame: Frame, cutoff: float) -> None:
    """
    Raises:
        InputError: the frame is so large, or its cell so small, that its neighbours would exhaust memory.
    """
    pbc = frame.pbc
    if not pbc.all():
        # in open directions the box is as large as the frame
        extent = float(np.ptp(frame.positions, axis=0).max())
        if not extent < _LARGEST_EXTENT:
            raise InputError(
                f"{frame.origin}: its atoms are {extent:.3g} Å apart; bring them together, or give the frame the cell "
                "it has."
            )
    _, crowd = np.unique(np.floor(frame.positions / cutoff), axis=0, return_counts=True)
    if not float((crowd.astype(float) ** 2).sum()) < _MOST_EDGES:
        raise InputError(f"{frame.origin}: {crowd.max()} of its atoms are in one place; mend or remove the frame.")
    if pbc.any():
        vectors = frame.cell[pbc]
        spanned = float(np.sqrt(np.linalg.det(vectors @ vectors.T)))
        images = (2 * cutoff) ** len(vectors) / spanned if spanned > 0 else np.inf
        boxes = float(np.prod(np.linalg.norm(vectors, axis=1)) / cutoff ** len(vectors))
        if not images * len(frame) ** 2 < _MOST_EDGES or not images < _MOST_IMAGES or not boxes < _MOST_BOXES:
            lengths = ", ".join(f"{length:.3g}" for length in np.linalg.norm(vectors, axis=1))
            raise InputError(
                f"{frame.origin}: a cell with vectors of {lengths} Å makes no sense for {len(frame)} atoms and a "
                f"cutoff of {cutoff:g} Å; mend it."
            )


def edges_of(frame: Frame, cutoff: float) -> tuple[IntArray, FloatArray]:
    """Neighbours in one frame as :func:`forcetune.frames.neighbours.neighbours` gives them.

    Raises:
        InputError: the frame is periodic in a direction whose lattice vector is zero or dependent on the others, or
            so large that its neighbours would exhaust memory.
    """
    pbc = frame.pbc
    if pbc.any() and np.linalg.matrix_rank(frame.cell[pbc]) < pbc.sum():
        raise InputError(
            f"{frame.origin}: periodic, but its lattice vectors are zero or linearly dependent; "
            "give the frame a cell or set pbc to F F F."
        )
    _check_extent(frame, cutoff)
    return neighbours(frame.positions, frame.cell, pbc, cutoff)


def graph_of(frame: Frame, cutoff: float, dtype: torch.dtype = torch.float64) -> Batch:
    """The graph of one frame as a batch of one.

    Raises:
        InputError: as :func:`edges_of`.
    """
    return graph_with(frame, *edges_of(frame, cutoff), dtype)


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
        stress=label(frame.stress, (1, 3, 3)),
        weight=torch.ones(1, dtype=torch.float64),
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
        ptr=torch.cat(
            [torch.zeros(1, dtype=torch.int64)] + [g.ptr[1:] + int(o) for g, o in zip(graphs, offsets, strict=False)]
        ),
        energy=joined("energy"),
        forces=joined("forces"),
        stress=joined("stress"),
        weight=joined("weight"),
    )
