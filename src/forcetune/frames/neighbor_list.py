"""Which atoms are near each other, periodic images included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matscipy.neighbours import neighbour_list

from forcetune.frames.frame import FloatArray, IntArray


def neighbours(
    positions: FloatArray, cell: FloatArray, pbc: Sequence[bool] | np.ndarray, cutoff: float
) -> tuple[IntArray, FloatArray]:
    """All ordered pairs of atoms nearer than ``cutoff``, periodic images included.

    Args:
        positions: (atoms, 3), Å.
        cell: (3, 3), rows are lattice vectors, Å; rows of open directions are ignored.
        pbc: (3,) periodic directions.
        cutoff: Å.

    Returns:
        ``edge_index`` (2, edges), sender first; ``unit_shifts`` (edges, 3), so that the vector of an edge is
        ``positions[receiver] - positions[sender] + unit_shifts @ cell``. Sorted by receiver, then sender.
    """
    pbc = np.asarray(pbc, dtype=bool)
    box = _closed_box(positions, np.asarray(cell, dtype=float), pbc, cutoff)
    sender, receiver, shifts = neighbour_list("ijS", positions=positions, cell=box, pbc=pbc, cutoff=cutoff)
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], sender, receiver))
    edge_index = np.stack((sender, receiver)).astype(np.int64)[:, order]
    return edge_index, shifts[order].astype(np.float64)


def _closed_box(positions: FloatArray, cell: FloatArray, pbc: np.ndarray, cutoff: float) -> FloatArray:
    """The cell with vectors of open directions replaced by ones at right angles to the periodic ones."""
    if pbc.all():
        return cell
    extent = float(np.ptp(positions, axis=0).max()) + 2 * cutoff + 1.0
    periodic = cell[pbc]
    # the rows of vh past the rank span what the periodic vectors leave open
    open_directions = np.linalg.svd(periodic, full_matrices=True)[2][len(periodic) :] if len(periodic) else np.eye(3)
    box = cell.copy()
    box[~pbc] = extent * open_directions
    return box
