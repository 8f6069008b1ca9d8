"""Neighbours in a frame, once it is certain that they fit in memory; without PyTorch, so that workers start soon."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame, IntArray
from forcetune.frames.neighbor_list import neighbours
from forcetune.frames.store.rows import Column, RowReader, packed
from forcetune.frames.store.stored_frames import StoredFrames

EDGE_COLUMNS = (Column("edges", "int32", (2,)), Column("shifts", "int32", (3,)))
"""What is stored of the neighbours in a frame."""

COINCIDING = 1e-3
"""Å; two atoms nearer than this are at one place."""

_LARGEST_EXTENT = 1000.0
_MOST_IMAGES = 1e6
_MOST_EDGES = 1e9
_MOST_BOXES = 1e8


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
        raise InputError(f"{frame.origin}: {crowd.max()} of its atoms are in one place; fix or remove the frame.")
    if pbc.any():
        vectors = frame.cell[pbc]
        spanned = float(np.sqrt(np.linalg.det(vectors @ vectors.T)))
        images = (2 * cutoff) ** len(vectors) / spanned if spanned > 0 else np.inf
        boxes = float(np.prod(np.linalg.norm(vectors, axis=1)) / cutoff ** len(vectors))
        if not images * len(frame) ** 2 < _MOST_EDGES or not images < _MOST_IMAGES or not boxes < _MOST_BOXES:
            lengths = ", ".join(f"{length:.3g}" for length in np.linalg.norm(vectors, axis=1))
            raise InputError(
                f"{frame.origin}: a cell with vectors of {lengths} Å makes no sense for {len(frame)} atoms and a "
                f"cutoff of {cutoff:g} Å; fix it."
            )


def find_edges(frame: Frame, cutoff: float) -> tuple[IntArray, FloatArray]:
    """Neighbours in one frame as :func:`forcetune.frames.neighbor_list.neighbours` gives them.

    Raises:
        InputError: the frame is periodic in a direction whose lattice vector is zero or dependent on the others, so
            large that its neighbours would exhaust memory, or has two atoms at one place.
    """
    pbc = frame.pbc
    if pbc.any() and np.linalg.matrix_rank(frame.cell[pbc]) < pbc.sum():
        raise InputError(
            f"{frame.origin}: periodic, but its lattice vectors are zero or linearly dependent; "
            "give the frame a cell or set pbc to F F F."
        )
    _check_extent(frame, cutoff)
    edge_index, shifts = neighbours(frame.positions, frame.cell, pbc, cutoff)
    check_apart(frame, edge_index, shifts)
    return edge_index, shifts


def check_apart(frame: Frame, edge_index: IntArray, shifts: FloatArray) -> None:
    """
    Raises:
        InputError: two atoms are at one place, where no direction leads from one to the other.
    """
    sender, receiver = edge_index
    vectors = frame.positions[receiver] - frame.positions[sender] + shifts @ frame.cell
    together = np.einsum("ij,ij->i", vectors, vectors) < COINCIDING**2
    if together.any():
        edge = int(np.argmax(together))
        one, other = sorted((int(sender[edge]), int(receiver[edge])))
        raise InputError(
            f"{frame.origin}: atoms {one} and {other} are at the same place; remove one of them, or the frame."
            if one != other
            else f"{frame.origin}: atom {one} is at the place of its own periodic image; correct the cell."
        )


@dataclass(frozen=True, slots=True)
class EdgeSearch:
    """Frames ``first`` to ``end`` of a store, whose neighbours are wanted."""

    frames: RowReader
    first: int
    end: int
    cutoff: float


def search_store(task: EdgeSearch) -> tuple[list[bytes], list[int]]:
    """Rows of neighbours for a store, and the number of edges in each; runs in a worker.

    Raises:
        InputError: as :func:`find_edges`.
    """
    rows, counts = [], []
    for frame in StoredFrames(task.frames, np.arange(task.first, task.end)):
        edge_index, shifts = find_edges(frame, task.cutoff)
        rows.append(packed(EDGE_COLUMNS, {"edges": edge_index.T, "shifts": shifts}))
        counts.append(edge_index.shape[1])
    return rows, counts
