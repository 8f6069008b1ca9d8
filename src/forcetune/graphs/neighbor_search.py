"""Neighbors of many structures at once, computed where their positions are.

A linked-cell search by tensor operations only. It gives the same edges as
:func:`forcetune.frames.neighbor_list.neighbours`, in another order. On a GPU the host waits three times, for the sizes
of tensors: the bins near each atom, the candidates in them, and the edges; what is wrong with the structures is read
along with these.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

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
    box = closed_box(rows, pbc)
    inverse = inverse_cells(box)
    fractional = torch.einsum("ai,aij->aj", points, inverse[system])
    floor = torch.where(pbc[system], torch.floor(fractional), 0.0)
    inside = fractional - floor
    grid, low, width, extent = _grid(inside, inverse, pbc, system, cutoff)
    spans = (2 * grid.reach + 1).prod(1)[system]
    wrong = torch.stack(
        (
            ~torch.isfinite(points).all(),
            ~torch.isfinite(rows).all(),
            _dependent(box, pbc).any(),
            (grid.reach > _LARGEST_REACH).any(),
        )
    )
    *faults, near_bins = read_back(torch.cat((wrong.long(), spans.sum().view(1))))
    if any(faults):
        _refuse(points, rows, box, pbc, system, grid, extent, cutoff)
    counts = grid.counts[system]
    bins = torch.floor((inside - low[system]) / width[system]).long()
    bins = bins.clamp(min=torch.zeros_like(counts), max=counts - 1)
    receiver, sender, image = _candidates(bins, grid, pbc, system, spans, near_bins)
    shifts = floor[sender] - floor[receiver] - image
    vectors = points[receiver] - points[sender] + torch.einsum("ei,eij->ej", shifts, box[system[receiver]])
    squared = (vectors * vectors).sum(1)
    near = (squared < cutoff**2) & ((receiver != sender) | (shifts != 0).any(1))
    n_edges, together = read_back(torch.stack((near.sum(), (near & (squared < COINCIDING**2)).sum())))
    if together:
        _refuse_coinciding(sender[near], receiver[near], squared[near], system)
    chosen = _true_indices(near, n_edges)
    return Edges(torch.stack((sender[chosen], receiver[chosen])), shifts[chosen].to(positions.dtype))


def read_back(values: Tensor) -> list[int]:
    """Integers that the host has to know; on a GPU it waits for them."""
    return values.cpu().tolist()


def closed_box(cell: Tensor, pbc: Tensor) -> Tensor:
    """Cells whose vectors along open directions are unit vectors at right angles to the periodic ones.

    Args:
        cell: (systems, 3, 3).
        pbc: (systems, 3).

    Returns:
        (systems, 3, 3); where periodic vectors are zero or dependent, no cell with a volume.
    """
    rows = torch.where(pbc.unsqueeze(2), cell, 0.0)
    periodic = pbc.sum(1).view(-1, 1, 1)
    # of two periodic vectors only one of the three products is not zero
    across = _unit(torch.linalg.cross(rows.roll(-1, 1), rows.roll(-2, 1), dim=2).sum(1))
    # a single one is the sum of the rows, and least along one of the axes
    single = rows.sum(1)
    axes = torch.eye(3, dtype=cell.dtype, device=cell.device)
    axis = axes.index_select(0, single.abs().argmin(1))
    first = _unit(torch.linalg.cross(single, axis, dim=1))
    second = _unit(torch.linalg.cross(single, first, dim=1))
    later = ((~pbc).cumsum(1) > 1).unsqueeze(2)
    beside_one = torch.where(later, second.unsqueeze(1), first.unsqueeze(1))
    filler = torch.where(periodic == 2, across.unsqueeze(1), torch.where(periodic == 1, beside_one, axes))
    return torch.where(pbc.unsqueeze(2), rows, filler)


def inverse_cells(cell: Tensor) -> Tensor:
    """(cells, 3, 3) inverse matrices, not finite where there is none; PyTorch's own waits to see whether there is."""
    columns = torch.linalg.cross(cell.roll(-1, 1), cell.roll(-2, 1), dim=2)
    return columns.mT / (cell[:, :1] * columns[:, :1]).sum(2, keepdim=True)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)


def _dependent(box: Tensor, pbc: Tensor) -> Tensor:
    """(systems,) whether the cell of a periodic system has no volume."""
    volume = (box[:, 0] * torch.linalg.cross(box[:, 1], box[:, 2], dim=1)).sum(1).abs()
    return ~(volume > 1e-9 * torch.linalg.vector_norm(box, dim=2).prod(1)) & pbc.any(1)


def _grid(
    inside: Tensor, inverse: Tensor, pbc: Tensor, system: Tensor, cutoff: float
) -> tuple[_Grid, Tensor, Tensor, Tensor]:
    """Bins of at least the cutoff where a cell is large enough; (systems, 3) lowest coordinates, widths and extents."""
    systems = len(pbc)
    index = system.unsqueeze(1).expand_as(inside)
    empty = inside.new_zeros(systems, 3)
    low = empty.scatter_reduce(0, index, inside, "amin", include_self=False)
    high = empty.scatter_reduce(0, index, inside, "amax", include_self=False)
    # heights of the cell; coordinates along open directions are in Å already
    extent = torch.where(pbc, 1 / torch.linalg.vector_norm(inverse, dim=1), high - low)
    counts = torch.floor(extent / cutoff).clamp(1, _MOST_BINS)
    reach = torch.where(pbc, torch.ceil(cutoff * counts / extent), 1.0)
    width = torch.where(pbc, 1 / counts, (extent / counts).clamp(min=cutoff))
    # integers of what is not a number would be anything; such structures are refused
    sizes = (counts.nan_to_num(1.0), reach.nan_to_num(1.0).clamp(max=_LARGEST_REACH + 1.0))
    return _Grid(sizes[0].long(), sizes[1].long()), torch.where(pbc, 0.0, low), width, extent


def _candidates(
    bins: Tensor, grid: _Grid, pbc: Tensor, system: Tensor, spans: Tensor, near_bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Receivers, senders and images of all pairs of atoms in bins that lie near each other.

    Args:
        bins: (atoms, 3) of each atom.
        grid, pbc, system: of the systems.
        spans: (atoms,) bins near each.
        near_bins: their sum.
    """
    owner, local = _expand(spans, near_bins)
    of = system[owner]
    reach, count = grid.reach[of], grid.counts[of]
    span = 2 * reach + 1
    step = torch.stack(
        (local // (span[:, 1] * span[:, 2]), local // span[:, 2] % span[:, 1], local % span[:, 2]), dim=1
    )
    target = bins[owner] + step - reach
    image = torch.div(target, count, rounding_mode="floor")
    keys, order = torch.sort(_key(system, bins), stable=True)
    wanted = _key(of, target - image * count)
    first = torch.searchsorted(keys, wanted)
    occupied = torch.searchsorted(keys, wanted, right=True) - first
    # beyond the ends of open directions nothing follows
    occupied = torch.where((pbc[of] | (image == 0)).all(1), occupied, 0)
    (total,) = read_back(occupied.sum().view(1))
    if total > _MOST_CANDIDATES:
        raise InputError(
            f"{total:.1e} pairs of atoms are near each other, more than fit into memory; some atoms are all in one "
            "place, or a cell is too small for its atoms."
        )
    row, local = _expand(occupied, total)
    return owner[row], order[first[row] + local], image[row].double()


def _key(system: Tensor, bins: Tensor) -> Tensor:
    return ((system * _MOST_BINS + bins[:, 0]) * _MOST_BINS + bins[:, 1]) * _MOST_BINS + bins[:, 2]


def _expand(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For every one of so many items of each row, ``total`` together: the row, and the place in it."""
    row = torch.repeat_interleave(counts, output_size=total)
    starts = counts.cumsum(0) - counts
    return row, torch.arange(total, device=counts.device) - starts[row]


def _true_indices(chosen: Tensor, total: int) -> Tensor:
    """Where ``chosen`` is true, ``total`` times, ascending."""
    rank = torch.where(chosen, chosen.cumsum(0) - 1, total)
    indices = rank.new_zeros(total + 1)
    # what is not chosen goes to a place behind them
    return indices.scatter_(0, rank, torch.arange(len(chosen), device=chosen.device))[:total]


def _refuse(
    points: Tensor,
    rows: Tensor,
    box: Tensor,
    pbc: Tensor,
    system: Tensor,
    grid: _Grid,
    extent: Tensor,
    cutoff: float,
) -> NoReturn:
    """
    Raises:
        InputError: says what is wrong with positions or cells of which something is.
    """
    broken = ~torch.isfinite(rows).all(2).all(1)
    if bool(broken.any()):
        raise InputError(f"The cell of system {int(broken.nonzero()[0])} is not finite; set it again.")
    wrong = ~torch.isfinite(points).all(1)
    if bool(wrong.any()):
        atom = int(wrong.nonzero()[0])
        of = int(system[atom])
        raise InputError(
            f"The position of atom {atom - int((system < of).sum())} of system {of} is not finite; in dynamics the "
            "steps before were too large, take smaller ones."
        )
    flat = _dependent(box, pbc)
    if bool(flat.any()):
        raise InputError(
            f"system {int(flat.nonzero()[0])} is periodic, but its lattice vectors are zero or linearly dependent; "
            "give it a cell or make it open in those directions."
        )
    number = int((grid.reach > _LARGEST_REACH).any(1).nonzero()[0])
    raise InputError(
        f"system {number} has a cell only {float(extent[number].min()):.3g} Å high, which makes no sense for a "
        f"cutoff of {cutoff:g} Å; correct it."
    )


def _refuse_coinciding(sender: Tensor, receiver: Tensor, squared: Tensor, system: Tensor) -> NoReturn:
    """
    Raises:
        InputError: says which two atoms are at one place, where no direction leads from one to the other.
    """
    edge = int((squared < COINCIDING**2).nonzero()[0])
    of = int(system[sender[edge]])
    first = int((system < of).sum())
    one, other = sorted((int(sender[edge]) - first, int(receiver[edge]) - first))
    raise InputError(
        f"atoms {one} and {other} of system {of} are at the same place; remove one of them."
        if one != other
        else f"atom {one} of system {of} is at the place of its own periodic image; correct the cell."
    )
