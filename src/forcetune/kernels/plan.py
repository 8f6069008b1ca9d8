"""How the atoms and edges of a batch are laid out for the kernels; depends on integers only.

Atoms are sorted by species, then by number of neighbours: species are contiguous, and so are receivers with about
the same number of neighbours, whose edges fit a rectangular table with little padding. An edge and its reverse
share one *pair*: their distance and radial features are the same, and spherical harmonics differ by a sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# edges handled at once on a CPU: intermediates of one path then fit into the second-level cache
CPU_CHUNK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Consecutive receivers with their edges as a table of (receivers, width) slots.

    Attributes:
        start, stop: receivers, in sorted order.
        width: slots for each receiver; those past its last neighbour are padding.
        first: number of the first slot in the whole batch.
        pairs: (slots,) pair of each slot, 0 for padding.
        oriented: (slots,) pair of each slot, plus the number of pairs where the edge runs against its pair, and twice
            the number of pairs for padding.
        senders: (slots,) atom in sorted order, 0 for padding.
    """

    start: int
    stop: int
    width: int
    first: int
    pairs: Tensor
    oriented: Tensor
    senders: Tensor

    @property
    def receivers(self) -> int:
        return self.stop - self.start

    @property
    def slots(self) -> slice:
        return slice(self.first, self.first + self.receivers * self.width)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The layout of a batch.

    Attributes:
        n_atoms, n_edges, n_pairs, n_slots: sizes.
        order: (atoms,) the atom at each place of the sorted order.
        place: (atoms,) the place of each atom.
        species: (atoms,) species in sorted order.
        present: (species present,) ascending.
        counts: atoms of each species present.
        edge_of_pair: (pairs,) the edge that gives a pair its direction.
        reverse: (pairs,) the edge against it; the pair's own edge where there is none.
        sender, receiver: (pairs,) atoms of the pair's edge, in sorted order.
        slot: (pairs,) slot of the pair's edge.
        reverse_slot: (pairs,) slot of its reverse, ``n_slots`` where there is none.
        outgoing: slots of the edges that leave each atom, as an (atoms of the chunk, width) table for every chunk;
            ``n_slots`` for padding.
        oriented: (edges,) pair of each edge, plus the number of pairs where it runs against its pair.
        chunks: of receivers.
    """

    n_atoms: int
    n_edges: int
    n_pairs: int
    n_slots: int
    order: Tensor
    place: Tensor
    species: Tensor
    present: Tensor
    counts: tuple[int, ...]
    edge_of_pair: Tensor
    sender: Tensor
    receiver: Tensor
    slot: Tensor
    reverse_slot: Tensor
    outgoing: tuple[Tensor, ...]
    oriented: Tensor
    chunks: tuple[Chunk, ...]

    @property
    def complete(self) -> bool:
        """Whether every edge has its reverse."""
        return 2 * self.n_pairs == self.n_edges


def make_plan(edge_index: Tensor, unit_shifts: Tensor, species: Tensor) -> Plan:
    """Lay out a batch.

    Args:
        edge_index: (2, edges) sender and receiver, in any order.
        unit_shifts: (edges, 3) periodic image of each edge, in lattice vectors.
        species: (atoms,) index of the species.
    """
    device = edge_index.device
    sender, receiver = edge_index.detach().cpu().numpy()
    kinds = species.detach().cpu().numpy()
    degree = np.bincount(receiver, minlength=len(kinds))
    order = np.lexsort((degree, kinds))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    sender, receiver = place[sender], place[receiver]
    pair, forward = _pairs(sender, receiver, unit_shifts.detach().cpu().numpy(), len(kinds))
    n_pairs = int(pair.max(initial=-1)) + 1
    edges = np.argsort(receiver, kind="stable")
    starts = np.concatenate(([0], np.cumsum(degree[order])))
    limit = CPU_CHUNK if device.type == "cpu" else max(len(edges), 1)
    chunks, slot_of_edge, n_slots = _chunks(degree[order], starts, edges, limit)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device=device, dtype=torch.int64)

    oriented = pair + np.where(forward, 0, n_pairs)
    edge_of_pair = np.zeros(n_pairs, dtype=np.int64)
    edge_of_pair[pair[forward]] = np.flatnonzero(forward)
    reverse_slot = np.full(n_pairs, n_slots)
    reverse_slot[pair[~forward]] = slot_of_edge[~forward]
    present, counts = np.unique(kinds, return_counts=True)
    return Plan(
        n_atoms=len(kinds),
        n_edges=len(edges),
        n_pairs=n_pairs,
        n_slots=n_slots,
        order=tensor(order),
        place=tensor(place),
        species=tensor(kinds[order]),
        present=tensor(present),
        counts=tuple(int(count) for count in counts),
        edge_of_pair=tensor(edge_of_pair),
        sender=tensor(sender[edge_of_pair]),
        receiver=tensor(receiver[edge_of_pair]),
        slot=tensor(slot_of_edge[edge_of_pair]),
        reverse_slot=tensor(reverse_slot),
        outgoing=tuple(tensor(table) for table in _outgoing(sender, slot_of_edge, chunks, n_slots)),
        oriented=tensor(oriented),
        chunks=tuple(
            Chunk(start, stop, width, first, *(tensor(v) for v in _table(edges_of, pair, oriented, sender, 2 * n_pairs)))
            for start, stop, width, first, edges_of in chunks
        ),
    )


_RawChunk = tuple[int, int, int, int, np.ndarray]


def _pairs(sender: np.ndarray, receiver: np.ndarray, shifts: np.ndarray, atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Pair of each edge, and whether the edge has the pair's direction."""
    edges = len(sender)
    alone = np.arange(edges), np.ones(edges, dtype=bool)
    if edges == 0:
        return alone
    images = np.rint(shifts).astype(np.int64)
    span = 2 * int(np.abs(images).max()) + 1
    if float(atoms) ** 2 * float(span) ** 3 > 2**62:
        return alone
    code = (images * np.array([span * span, span, 1])).sum(1)
    most = (span**3 - 1) // 2

    def key(first: np.ndarray, second: np.ndarray, image: np.ndarray) -> np.ndarray:
        return (first * atoms + second) * span**3 + image + most

    own, other = key(sender, receiver, code), key(receiver, sender, -code)
    forward = own < other
    _, pair, count = np.unique(np.minimum(own, other), return_inverse=True, return_counts=True)
    if np.any(count[pair[forward]] > 2) or np.any(own == other):
        return alone
    # a pair needs exactly one edge in its direction, and at most one against it
    along = np.bincount(pair[forward], minlength=len(count))
    if np.any(count > 2) or np.any(along != 1):
        return alone
    return pair.reshape(-1), forward


def _chunks(
    degree: np.ndarray, starts: np.ndarray, edges: np.ndarray, limit: int
) -> tuple[list[_RawChunk], np.ndarray, int]:
    chunks: list[_RawChunk] = []
    slot_of_edge = np.zeros(len(edges), dtype=np.int64)
    first = start = 0
    while start < len(degree):
        stop, width = start + 1, int(degree[start])
        while stop < len(degree):
            wider = max(width, int(degree[stop]))
            if wider * (stop + 1 - start) > limit:
                break
            stop, width = stop + 1, wider
        table = np.full((stop - start, width), -1, dtype=np.int64)
        rows = np.repeat(np.arange(stop - start), degree[start:stop])
        own = edges[starts[start] : starts[stop]]
        columns = np.arange(len(own)) - (starts[start:stop] - starts[start])[rows]
        table[rows, columns] = own
        slot_of_edge[own] = first + rows * width + columns
        chunks.append((start, stop, width, first, table.reshape(-1)))
        first += table.size
        start = stop
    return chunks, slot_of_edge, first


def _table(
    edges: np.ndarray, pair: np.ndarray, oriented: np.ndarray, sender: np.ndarray, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    real = edges >= 0
    return (
        np.where(real, pair[edges] if len(pair) else 0, 0),
        np.where(real, oriented[edges] if len(pair) else 0, padding),
        np.where(real, sender[edges] if len(pair) else 0, 0),
    )


def _outgoing(
    sender: np.ndarray, slot_of_edge: np.ndarray, chunks: list[_RawChunk], padding: int
) -> list[np.ndarray]:
    edges = np.argsort(sender, kind="stable")
    atoms = chunks[-1][1] if chunks else 0
    counts = np.bincount(sender, minlength=atoms)
    starts = np.concatenate(([0], np.cumsum(counts)))
    tables = []
    for start, stop, _, _, _ in chunks:
        own = edges[starts[start] : starts[stop]]
        rows = np.repeat(np.arange(stop - start), counts[start:stop])
        columns = np.arange(len(own)) - (starts[start:stop] - starts[start])[rows]
        table = np.full((stop - start, int(counts[start:stop].max(initial=0))), padding, dtype=np.int64)
        table[rows, columns] = slot_of_edge[own]
        tables.append(table)
    return tables
