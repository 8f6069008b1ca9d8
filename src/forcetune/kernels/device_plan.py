"""Plans of batches whose edges are on a device, made there: only what shapes depend on is read back, at once.

Sizes of tensors depend on how many neighbors atoms have, how many atoms a species has and how many pairs there are, so
that a plan cannot be made without a look at these: one copy of two numbers for each atom, where edges are many.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from forcetune.kernels.edge_plan import Chunk, Plan, chunk_bounds, species_tensor


def make_device_plan(
    edge_index: Tensor, unit_shifts: Tensor, species: Tensor, *, paired: bool = True, limit: int | None = None
) -> Plan:
    """Lay out a batch where its edges are; the plan of :func:`forcetune.kernels.edge_plan.make_plan`.

    Args:
        edge_index: (2, edges) sender and receiver, in any order.
        unit_shifts: (edges, 3) periodic image of each edge, in lattice vectors.
        species: (atoms,) index of the species.
        paired: whether an edge and its reverse share a pair.
        limit: slots of a chunk; None for any number.
    """
    n_atoms, n_edges = len(species), edge_index.shape[1]
    device = edge_index.device
    degree = _count(edge_index[1], n_atoms)
    order = torch.argsort(degree, stable=True)
    order = order.index_select(0, torch.argsort(species.index_select(0, order), stable=True))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(n_atoms, device=device))
    sender, receiver = place[edge_index[0]], place[edge_index[1]]
    degree, kinds = degree[order], species[order].to(torch.int64)
    starts = torch.cat((degree.new_zeros(1), degree.cumsum(0)))
    rows = torch.argsort(receiver, stable=True)
    pair, forward = torch.arange(n_edges, device=device), torch.ones(n_edges, dtype=torch.bool, device=device)
    sizes = degree.new_tensor([n_edges, 0])
    joint = (pair, forward)
    if paired and n_edges:
        *joint, sizes = _pairs(sender, receiver, unit_shifts, n_atoms)
    known = torch.cat((degree, kinds, sizes)).cpu().numpy()  # the one wait for the device
    degrees, species_here, (n_pairs, are_pairs) = np.split(known, [n_atoms, 2 * n_atoms])
    if are_pairs:
        pair, forward = joint
    n_pairs = int(n_pairs) if are_pairs else n_edges
    edge_of_pair = _edges_of_pairs(pair, forward, n_pairs)
    oriented = pair + torch.where(forward, 0, n_pairs)
    table = torch.stack((pair, sender, torch.where(forward, 1, -1)), dim=1).index_select(0, rows)
    present, counts = np.unique(species_here, return_counts=True)
    slots = torch.stack((pair, oriented, sender), dim=1).index_select(0, rows)
    # padding of a chunk is read from a row behind the edges'
    slots = torch.cat((slots, slots.new_tensor([[0, 2 * n_pairs, 0]])))
    bounds = chunk_bounds(degrees, max(n_edges, 1) if limit is None else limit)
    return Plan(
        n_atoms=n_atoms,
        n_edges=n_edges,
        n_pairs=n_pairs,
        order=order,
        place=place,
        species=kinds,
        present=species_tensor(tuple(int(kind) for kind in present), device),
        counts=tuple(int(count) for count in counts),
        edge_of_pair=edge_of_pair,
        sender=sender[edge_of_pair],
        receiver=receiver[edge_of_pair],
        edge_pair=pair,
        edge_sender=sender,
        edge_receiver=receiver,
        starts=starts,
        edges=table,
        directions=_count(pair, n_pairs),
        chunks=tuple(_chunk(start, stop, width, degree, starts, slots) for start, stop, width in bounds),
    )


def _edges_of_pairs(pair: Tensor, forward: Tensor, n_pairs: int) -> Tensor:
    """(pairs,) the edge that has the direction of each pair."""
    n_edges = len(pair)
    # edges against their pair write behind the end
    edges = torch.full((n_pairs + 1,), n_edges - 1, dtype=torch.int64, device=pair.device)
    edges.scatter_(0, torch.where(forward, pair, n_pairs), torch.arange(n_edges, device=pair.device))
    return edges[:n_pairs]


def _count(places: Tensor, size: int) -> Tensor:
    """How often each number below ``size`` occurs."""
    return places.new_zeros(size).index_add_(0, places, torch.ones_like(places))


def _pairs(sender: Tensor, receiver: Tensor, shifts: Tensor, atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pair of each edge, whether the edge has the pair's direction, and (pairs, whether edges form pairs)."""
    images = shifts.round().to(torch.int64)
    span = 2 * images.abs().amax() + 1
    fits = float(atoms) ** 2 * span.double() ** 3 <= 2.0**62
    code = (images[:, 0] * span + images[:, 1]) * span + images[:, 2]
    most = (span**3 - 1) // 2
    forth = (sender * atoms + receiver) * span**3 + code + most
    back = (receiver * atoms + sender) * span**3 - code + most
    keys, order = torch.sort(torch.minimum(forth, back), stable=True)
    begins = torch.cat((keys.new_zeros(1), (keys[1:] != keys[:-1]).to(torch.int64)))
    numbers = begins.cumsum(0)
    pair = torch.empty_like(order).scatter_(0, order, numbers)
    count = _count(pair, len(pair))
    # an edge without its reverse gives its pair the direction
    forward = (forth < back) | (count[pair] == 1)
    along = torch.zeros_like(count).index_add_(0, pair, forward.to(torch.int64))
    regular = fits & (forth != back).all() & (count <= 2).all() & ((along == 1) | (count == 0)).all()
    return pair, forward, torch.stack((numbers[-1] + 1, regular.to(torch.int64)))


def _chunk(start: int, stop: int, width: int, degree: Tensor, starts: Tensor, slots: Tensor) -> Chunk:
    columns = torch.arange(width, device=degree.device)
    rows = starts[start:stop, None] + columns
    rows = torch.where(columns < degree[start:stop, None], rows, len(slots) - 1).view(-1)
    pairs, oriented, senders = slots.index_select(0, rows).unbind(1)
    return Chunk(start, stop, width, pairs.contiguous(), oriented.contiguous(), senders.contiguous())
