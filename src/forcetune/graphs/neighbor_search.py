"""Neighbors of many structures at once, computed where their positions are.

A linked-cell search by tensor operations only: on a GPU nothing but a few sizes is read back. It gives the same edges
as :func:`forcetune.frames.neighbor_list.neighbours`, in another order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from forcetune.errors import InputError
from forcetune.graphs.edges import COINCIDING

_MOST_BINS = 1024
_MOST_CANDIDATES = 2e9
_LARGEST_REACH = 200


class Edges(NamedTuple):
    """Neighbors of a batch.

    Attributes:
        edge_index: (2, edges) sender and receiver; receivers ascend.
        unit_shifts: (edges, 3) periodic image, in lattice vectors, in the dtype of the positions: the vector of an
            edge is ``positions[receiver] - positions[sender] + unit_shifts @ cell``.
    """

    edge_index: Tensor
    unit_shifts: Tensor


class _Grid(NamedTuple):
    """Bins of every system: (systems, 3) each."""

    counts: Tensor
    reach: Tensor


def search_neighbors(positions: Tensor, cell: Tensor, pbc: Tensor, system: Tensor, cutoff: float) -> Edges:
    """All ordered pairs of atoms of one system nearer than ``cutoff``, periodic images included.

    Args:
        positions: (atoms, 3), Å.
        cell: (systems, 3, 3), rows are lattice vectors, Å; rows of open directions are ignored.
        pbc: (systems, 3) periodic directions.
        system: (atoms,) the system of each atom, ascending.
        cutoff: Å.

    Raises:
        InputError: a position or a periodic cell is not finite, lattice vectors are zero or dependent, two atoms are
            at one place, or a cell is so small that its images would exhaust memory.
    """
    points = positions.detach().double()
    rows = torch.where(pbc.unsqueeze(2), cell.detach().double(), 0.0)
    _check_finite(points, rows, system)
    box = closed_box(rows, pbc)
    inverse = torch.linalg.inv(box)
    fractional = torch.einsum("ai,aij->aj", points, inverse[system])
    periodic = pbc[system]
    floor = torch.where(periodic, torch.floor(fractional), 0.0)
    inside = fractional - floor
    grid, low, width = _grid(inside, inverse, pbc, system, cutoff)
    counts = grid.counts[system]
    bins = (
        torch.floor((inside - low[system]) / width[system]).long().clamp(min=torch.zeros_like(counts), max=counts - 1)
    )
    receiver, sender, image = _candidates(bins, grid, pbc, system)
    shifts = floor[sender] - floor[receiver] - image
    vectors = points[receiver] - points[sender] + torch.einsum("ei,eij->ej", shifts, box[system[receiver]])
    squared = (vectors * vectors).sum(1)
    near = (squared < cutoff**2) & ((receiver != sender) | (shifts != 0).any(1))
    chosen = near.nonzero().squeeze(1)
    _check_apart(sender[chosen], receiver[chosen], squared[chosen], system)
    return Edges(torch.stack((sender[chosen], receiver[chosen])), shifts[chosen].to(positions.dtype))


def closed_box(cell: Tensor, pbc: Tensor) -> Tensor:
    """(systems, 3, 3) cells whose vectors along open directions are unit vectors at right angles to the periodic ones.

    Raises:
        InputError: periodic lattice vectors are zero or linearly dependent.
    """
    open_directions = ~pbc
    rows = torch.where(pbc.unsqueeze(2), cell, 0.0)
    if bool(pbc.all()):
        box = cell
    elif not bool(pbc.any()):
        box = torch.eye(3, dtype=cell.dtype, device=cell.device).expand_as(cell)
    else:
        # the projector on what periodic vectors leave open has eigenvalues 0 and 1, ascending
        outside = torch.eye(3, dtype=cell.dtype, device=cell.device) - torch.linalg.pinv(rows) @ rows
        vectors = torch.linalg.eigh((outside + outside.mT) / 2).eigenvectors.mT
        place = (2 - (open_directions.long().cumsum(1) - 1)).clamp(0, 2)
        box = torch.where(pbc.unsqueeze(2), cell, vectors.gather(1, place.unsqueeze(2).expand_as(vectors)))
    lengths = torch.linalg.vector_norm(box, dim=2).prod(1)
    flat = ~(torch.linalg.det(box).abs() > 1e-9 * lengths) & pbc.any(1)
    if bool(flat.any()):
        raise InputError(
            f"system {int(flat.nonzero()[0])} is periodic, but its lattice vectors are zero or linearly dependent; "
            "give it a cell or make it open in those directions."
        )
    return box


def _grid(inside: Tensor, inverse: Tensor, pbc: Tensor, system: Tensor, cutoff: float) -> tuple[_Grid, Tensor, Tensor]:
    """Bins of at least the cutoff where a cell is large enough; the lowest coordinate and the width of a bin."""
    systems = len(pbc)
    index = system.unsqueeze(1).expand_as(inside)
    empty = inside.new_zeros(systems, 3)
    low = empty.scatter_reduce(0, index, inside, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, inside, "amax", include_self=False)
    # heights of the cell; coordinates along open directions are in Å already
    extent = torch.where(pbc, 1 / torch.linalg.vector_norm(inverse, dim=1), high - low)
    counts = torch.floor(extent / cutoff).clamp(1, _MOST_BINS)
    reach = torch.where(pbc, torch.ceil(cutoff * counts / extent), 1.0)
    if bool((reach > _LARGEST_REACH).any()):
        number = int((reach > _LARGEST_REACH).any(1).nonzero()[0])
        raise InputError(
            f"system {number} has a cell only {float(extent[number].min()):.3g} Å high, which makes no sense for a "
            f"cutoff of {cutoff:g} Å; correct it."
        )
    width = torch.where(pbc, 1 / counts, (extent / counts).clamp(min=cutoff))
    return _Grid(counts.long(), reach.long()), torch.where(pbc, 0.0, low), width


def _candidates(bins: Tensor, grid: _Grid, pbc: Tensor, system: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Receivers, senders and images of all pairs of atoms in bins that lie near each other."""
    spans = 2 * grid.reach + 1
    owner, local = _expand(spans.prod(1)[system])
    of = system[owner]
    reach, span, count = grid.reach[of], spans[of], grid.counts[of]
    step = torch.stack(
        (local // (span[:, 1] * span[:, 2]), local // span[:, 2] % span[:, 1], local % span[:, 2]), dim=1
    )
    target = bins[owner] + step - reach
    image = torch.div(target, count, rounding_mode="floor")
    valid = (pbc[of] | (image == 0)).all(1).nonzero().squeeze(1)
    owner, of, image, target = owner[valid], of[valid], image[valid], (target - image * count)[valid]
    keys, order = torch.sort(_key(system, bins), stable=True)
    wanted = _key(of, target)
    first = torch.searchsorted(keys, wanted)
    occupied = torch.searchsorted(keys, wanted, right=True) - first
    total = float(occupied.sum())
    if total > _MOST_CANDIDATES:
        raise InputError(
            f"{total:.1e} pairs of atoms are near each other, more than fit into memory; some atoms are all in one "
            "place, or a cell is too small for its atoms."
        )
    row, local = _expand(occupied)
    return owner[row], order[first[row] + local], image[row].double()


def _key(system: Tensor, bins: Tensor) -> Tensor:
    return ((system * _MOST_BINS + bins[:, 0]) * _MOST_BINS + bins[:, 1]) * _MOST_BINS + bins[:, 2]


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For every one of so many items of each row: the row, and the place in it."""
    row = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return row, torch.arange(len(row), device=counts.device) - starts[row]


def _check_finite(points: Tensor, rows: Tensor, system: Tensor) -> None:
    """
    Raises:
        InputError: a position or a cell is not finite.
    """
    wrong = ~torch.isfinite(points).all(1)
    broken = ~torch.isfinite(rows).all(2).all(1)
    if not bool(wrong.any() | broken.any()):
        return
    if bool(broken.any()):
        raise InputError(f"The cell of system {int(broken.nonzero()[0])} is not finite; set it again.")
    atom = int(wrong.nonzero()[0])
    of = int(system[atom])
    raise InputError(
        f"The position of atom {atom - int((system < of).sum())} of system {of} is not finite; in dynamics the steps "
        "before were too large, take smaller ones."
    )


def _check_apart(sender: Tensor, receiver: Tensor, squared: Tensor, system: Tensor) -> None:
    """
    Raises:
        InputError: two atoms are at one place, where no direction leads from one to the other.
    """
    together = squared < COINCIDING**2
    if not bool(together.any()):
        return
    edge = int(together.nonzero()[0])
    of = int(system[sender[edge]])
    first = int((system < of).sum())
    one, other = sorted((int(sender[edge]) - first, int(receiver[edge]) - first))
    raise InputError(
        f"atoms {one} and {other} of system {of} are at the same place; remove one of them."
        if one != other
        else f"atom {one} of system {of} is at the place of its own periodic image; correct the cell."
    )
