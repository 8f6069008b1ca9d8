"""How the atoms and edges of a batch are laid out for the kernels; depends on integers only.

Atoms are sorted by species, then by number of neighbours: species are contiguous, and so are receivers with about
the same number of neighbours, whose edges fit a rectangular table with little padding. An edge and its reverse
share one *pair*: their distance and radial features are the same, and spherical harmonics differ by a sign.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

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
        pairs: (slots,) pair of each slot, 0 for padding.
        oriented: (slots,) pair of each slot, plus the number of pairs where the edge runs against its pair, and twice
            the number of pairs for padding.
        senders: (slots,) atom in sorted order, 0 for padding.
    """

    start: int
    stop: int
    width: int
    pairs: Tensor
    oriented: Tensor
    senders: Tensor

    @property
    def receivers(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The layout of a batch.

    Attributes:
        n_atoms, n_edges, n_pairs: sizes.
        order: (atoms,) the atom at each place of the sorted order.
        place: (atoms,) the place of each atom.
        species: (atoms,) species in sorted order.
        present: (species present,) ascending; plans of the same species share one tensor, so that comparing them
            reads nothing from the device.
        counts: atoms of each species present.
        edge_of_pair: (pairs,) the edge that gives a pair its direction.
        sender, receiver: (pairs,) atoms of the pair's edge, in sorted order.
        edge_pair, edge_sender, edge_receiver: (edges,) of each edge in the order given, atoms in sorted order.
        starts: (atoms + 1,) first row of each receiver in ``edges``.
        edges: (edges of chunks or more, 3) pair, sender and direction of each edge, sorted by receiver; the direction
            is 1 along its pair and −1 against it. Rows behind those of the last receiver mean nothing.
        directions: (pairs,) edges of each pair, one or two; 0 of fillers.
        chunks: of receivers.
    """

    n_atoms: int
    n_edges: int
    n_pairs: int
    order: Tensor
    place: Tensor
    species: Tensor
    present: Tensor
    counts: tuple[int, ...]
    edge_of_pair: Tensor
    sender: Tensor
    receiver: Tensor
    edge_pair: Tensor
    edge_sender: Tensor
    edge_receiver: Tensor
    starts: Tensor
    edges: Tensor
    directions: Tensor
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sizes that a plan is filled up to, so that plans of different batches have one shape.

    Attributes:
        chunks: first and last receiver (exclusive), and slots for each, of each chunk.
        edges: so many edges belong to chunks; those behind them all belong to a pair that no chunk has.
        n_pairs: pairs, fillers included.
    """

    chunks: tuple[tuple[int, int, int], ...]
    edges: int
    n_pairs: int


def make_plan(
    edge_index: Tensor,
    unit_shifts: Tensor,
    species: Tensor,
    *,
    paired: bool = True,
    bounds: Bounds | None = None,
    ghosts: int = 0,
    device: torch.device | None = None,
) -> Plan:
    """Lay out a batch.

    Args:
        edge_index: (2, edges) sender and receiver, in any order.
        unit_shifts: (edges, 3) periodic image of each edge, in lattice vectors.
        species: (atoms,) index of the species.
        paired: whether an edge and its reverse share a pair; otherwise every edge is a pair of its own.
        bounds: sizes to fill up to.
        ghosts: number of senders behind the atoms that receive nothing (:class:`forcetune.kernels.step.Ghosts`);
            they are not sorted.
        device: where the plan is needed, if not where the edges are.

    Raises:
        ValueError: the batch exceeds the bounds.
    """
    if edge_index.device.type == "cuda" and device is None and bounds is None and not ghosts:
        from forcetune.kernels.device_plan import make_device_plan  # which makes plans of this module

        return make_device_plan(edge_index, unit_shifts, species, paired=paired)
    device = edge_index.device if device is None else device
    own = edge_index.shape[1] if bounds is None else bounds.edges
    all_senders, all_receivers = edge_index.detach().cpu().numpy()
    kinds = species.detach().cpu().numpy()
    degree = np.bincount(all_receivers[:own], minlength=len(kinds))
    order = np.lexsort((degree, kinds))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    n_senders = len(kinds) + ghosts
    place_of_sender = np.concatenate((place, np.arange(len(kinds), n_senders))) if ghosts else place
    all_senders, all_receivers = place_of_sender[all_senders], place[all_receivers]
    sender, receiver = all_senders[:own], all_receivers[:own]
    if paired:
        pair, forward = _pairs(sender, receiver, unit_shifts.detach().cpu().numpy()[:own], n_senders)
    else:
        pair, forward = np.arange(own), np.ones(own, dtype=bool)
    n_pairs = int(pair.max(initial=-1)) + 1
    if bounds is not None:
        if n_pairs >= bounds.n_pairs or bounds.edges >= edge_index.shape[1]:
            raise ValueError(f"{n_pairs} pairs do not leave room for fillers among {bounds.n_pairs}")
        n_pairs = bounds.n_pairs
    edges = np.argsort(receiver, kind="stable")
    starts = np.concatenate(([0], np.cumsum(degree[order])))
    limit = CPU_CHUNK if device.type == "cpu" else max(len(edges), 1)
    chunked = chunk_bounds(degree[order], limit) if bounds is None else bounds.chunks
    chunks = _chunks(chunked, degree[order], starts, edges)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device=device, dtype=torch.int64)

    table = np.zeros((len(all_senders), 3), dtype=np.int64)
    table[:own] = np.stack((pair, sender, np.where(forward, 1, -1)), axis=1)[edges]
    oriented = pair + np.where(forward, 0, n_pairs)
    # fillers among the pairs have the direction of a filler among the edges
    edge_of_pair = np.full(n_pairs, len(all_senders) - 1, dtype=np.int64)
    edge_of_pair[pair[forward]] = np.flatnonzero(forward)
    edge_pair = np.full(len(all_senders), n_pairs - 1, dtype=np.int64)
    edge_pair[:own] = pair
    present, counts = np.unique(kinds, return_counts=True)
    return Plan(
        n_atoms=len(kinds),
        n_edges=len(all_senders),
        n_pairs=n_pairs,
        order=tensor(order),
        place=tensor(place),
        species=tensor(kinds[order]),
        present=species_tensor(tuple(int(kind) for kind in present), device),
        counts=tuple(int(count) for count in counts),
        edge_of_pair=tensor(edge_of_pair),
        sender=tensor(all_senders[edge_of_pair]),
        receiver=tensor(all_receivers[edge_of_pair]),
        edge_pair=tensor(edge_pair),
        edge_sender=tensor(all_senders),
        edge_receiver=tensor(all_receivers),
        starts=tensor(starts),
        edges=tensor(table),
        directions=tensor(np.bincount(pair, minlength=n_pairs)),
        chunks=tuple(
            Chunk(start, stop, width, *(tensor(v) for v in _table(edges_of, pair, oriented, sender, 2 * n_pairs)))
            for start, stop, width, edges_of in chunks
        ),
    )


@lru_cache(maxsize=256)
def species_tensor(present: tuple[int, ...], device: torch.device) -> Tensor:
    """One tensor for all plans of the same species."""
    with torch.inference_mode(False):
        return torch.tensor(present, dtype=torch.int64, device=device)


_RawChunk = tuple[int, int, int, np.ndarray]


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
    _, pair, count = np.unique(np.minimum(own, other), return_inverse=True, return_counts=True)
    # an edge without its reverse, such as one from a ghost, gives its pair the direction
    forward = (own < other) | (count[pair] == 1)
    if np.any(count[pair[forward]] > 2) or np.any(own == other):
        return alone
    # a pair needs exactly one edge in its direction, and at most one against it
    along = np.bincount(pair[forward], minlength=len(count))
    if np.any(count > 2) or np.any(along != 1):
        return alone
    return pair.reshape(-1), forward


def chunk_bounds(degree: np.ndarray, limit: int) -> tuple[tuple[int, int, int], ...]:
    """Consecutive receivers whose table of (receivers, width) slots is within the limit: start, stop, width."""
    pieces: list[tuple[int, int, int]] = []
    start = 0
    while start < len(degree):
        stop, width = start + 1, int(degree[start])
        while stop < len(degree):
            wider = max(width, int(degree[stop]))
            if wider * (stop + 1 - start) > limit:
                break
            stop, width = stop + 1, wider
        pieces.append((start, stop, width))
        start = stop
    return tuple(pieces)


def _chunks(
    bounds: Sequence[tuple[int, int, int]], degree: np.ndarray, starts: np.ndarray, edges: np.ndarray
) -> list[_RawChunk]:
    """Chunks with the edge in each slot, −1 for padding."""
    chunks: list[_RawChunk] = []
    for start, stop, width in bounds:
        if degree[start:stop].max() > width:
            raise ValueError(f"a receiver has {degree[start:stop].max()} neighbours, its chunk room for {width}")
        table = np.full((stop - start, width), -1, dtype=np.int64)
        rows = np.repeat(np.arange(stop - start), degree[start:stop])
        own = edges[starts[start] : starts[stop]]
        columns = np.arange(len(own)) - (starts[start:stop] - starts[start])[rows]
        table[rows, columns] = own
        chunks.append((start, stop, width, table.reshape(-1)))
    return chunks


def _table(
    edges: np.ndarray, pair: np.ndarray, oriented: np.ndarray, sender: np.ndarray, padding: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    real = edges >= 0
    return (
        np.where(real, pair[edges] if len(pair) else 0, 0),
        np.where(real, oriented[edges] if len(pair) else 0, padding),
        np.where(real, sender[edges] if len(pair) else 0, 0),
    )


class PlanCache:
    """Plans of the batches seen last; a batch is recognised by its edge index.

    Args:
        paired: as :func:`make_plan`.
        most: plans that are kept.
    """

    def __init__(self, paired: bool, most: int = 64) -> None:
        self.paired = paired
        self.most = most
        self._kept: dict[int, tuple[Any, int, Plan]] = {}
        self._placed: dict[int, tuple[Any, int, Any, int, Plan]] = {}

    def plan(self, edge_index: Tensor, unit_shifts: Tensor, species: Tensor) -> Plan:
        """The plan of a batch, kept or made; arguments as :func:`make_plan`."""
        stored = self._kept.get(id(edge_index))
        if stored is not None and stored[0]() is edge_index and stored[1] == edge_index._version:
            plan = stored[2]
            if torch.equal(plan.species, species[plan.order]):
                return plan
        plan = make_plan(edge_index, unit_shifts, species, paired=self.paired)
        while len(self._kept) >= self.most:
            del self._kept[next(iter(self._kept))]
        self._kept[id(edge_index)] = (weakref.ref(edge_index), edge_index._version, plan)
        return plan

    def placed(self, edge_index: Tensor, numbers: Tensor) -> Plan | None:
        """The plan that :meth:`place` stored for these very tensors, if nobody wrote into them since.

        Nothing is read from the device.
        """
        entry = self._placed.get(id(edge_index))
        if entry is None:
            return None
        edges, edges_version, atoms, atoms_version, plan = entry
        same = edges() is edge_index and atoms() is numbers
        unchanged = edges_version == edge_index._version and atoms_version == numbers._version
        return plan if same and unchanged else None

    def place(self, edge_index: Tensor, numbers: Tensor, plan: Plan) -> None:
        """Store the plan of a batch whose elements were checked."""
        while len(self._placed) >= self.most:
            del self._placed[next(iter(self._placed))]
        entry = (weakref.ref(edge_index), edge_index._version, weakref.ref(numbers), numbers._version, plan)
        self._placed[id(edge_index)] = entry

    def __deepcopy__(self, memo: object) -> PlanCache:
        return PlanCache(self.paired, self.most)

    def __reduce__(self) -> tuple[Any, ...]:
        return PlanCache, (self.paired, self.most)


_GIVEN: ContextVar[tuple[Any, Plan | None]] = ContextVar("given plan", default=(None, None))


@contextmanager
def with_plan(owner: Any, plan: Plan) -> Iterator[None]:
    """Within this context ``owner`` lays out batches by this plan, and does not look at their integers.

    Other threads that use the same owner go on as before.
    """
    token = _GIVEN.set((owner, plan))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def given_plan(owner: Any) -> Plan | None:
    """The plan that :func:`with_plan` gives to ``owner``, if any."""
    planned_for, plan = _GIVEN.get()
    return plan if planned_for is owner else None
