"""Batches of different frames in one shape, so that what was recorded for one of them computes them all.

A batch is filled up with atoms that have no neighbours, and with edges so long that nothing comes of them; both are in
graphs of their own, without labels. How many there are, and how many neighbours the receivers of each chunk can have,
is an upper bound over all batches that can be drawn from a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from forcetune.graphs.graph import Batch, collate
from forcetune.kernels.edge_plan import CPU_CHUNK, Bounds, Plan, make_plan

CHUNK_COST = 12
"""What a chunk costs by itself on a CPU, in slots."""

CUDA_CHUNK_COST = 2000
"""The same on a GPU, where operations are long before they are slow; estimated, not measured."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A shape of batches.

    Attributes:
        frames: most frames of a batch.
        elements: atomic numbers, ascending as the model's.
        counts: atoms of each element.
        n_edges: edges.
        paired: whether an edge and its reverse share a pair.
        chunks: first and last receiver (exclusive), and slots, of each chunk.
        cutoff: of the model, Å.
        fill: slots and atoms of a batch on average, over what they are here; 1 wastes nothing.
    """

    frames: int
    elements: tuple[int, ...]
    counts: tuple[int, ...]
    n_edges: int
    paired: bool
    chunks: tuple[tuple[int, int, int], ...]
    cutoff: float
    fill: float

    @property
    def n_graphs(self) -> int:
        """One more than frames: at least one filler is in every batch."""
        return self.frames + 1

    @property
    def n_atoms(self) -> int:
        return sum(self.counts)


def build_layout(
    graphs: Sequence[Batch],
    frames: int,
    elements: Sequence[int],
    cutoff: float,
    paired: bool,
    *,
    limit: int | None = CPU_CHUNK,
    cost: int = CHUNK_COST,
    slack: int = 0,
) -> Layout:
    """The smallest shape for all batches of so many frames.

    Args:
        graphs: of one frame each.
        frames: most frames of a batch.
        elements: the model's, ascending.
        cutoff: Å.
        paired: as :func:`forcetune.kernels.edge_plan.make_plan`.
        limit: slots of a chunk, or None for any number.
        cost: of a chunk, in slots.
        slack: neighbours that every atom may have more than in any of the graphs.
    """
    degrees = [_degrees(graph, elements) for graph in graphs]
    present = [z for index, z in enumerate(elements) if any(len(own[index]) for own in degrees)]
    counts, bounds = [], []
    for z in present:
        index = list(elements).index(z)
        own = [degree[index] for degree in degrees]
        count = sum(sorted((len(degree) for degree in own), reverse=True)[:frames])
        # the r-th largest number of neighbours in any batch is at most the r-th largest of copies of the worst frame
        worst = np.zeros(max(map(len, own)), dtype=np.int64)
        for degree in own:
            worst[: len(degree)] = np.maximum(worst[: len(degree)], degree)
        worst += slack
        filler = int(z == present[0])
        bounds.append(np.concatenate((np.zeros(filler, dtype=np.int64), np.sort(np.repeat(worst, frames))[-count:])))
        counts.append(count + filler)
    edges = [graph.n_edges for graph in graphs]
    n_edges = sum(sorted(edges, reverse=True)[:frames]) + slack * sum(counts)
    n_edges += n_edges % 2
    degree = np.concatenate(bounds)
    chunks = best_chunks(degree, len(degree) * max(1, int(degree.max())) if limit is None else limit, cost)
    slots = sum((stop - start) * width for start, stop, width in chunks)
    share = min(frames, len(graphs)) / len(graphs)
    atoms = share * sum(graph.n_atoms for graph in graphs)
    fill = (share * sum(edges) + atoms) / max(1, slots + sum(counts))
    return Layout(frames, tuple(present), tuple(counts), n_edges + 2, paired, chunks, cutoff, fill)


def best_chunks(degree: np.ndarray, limit: int, cost: int = CHUNK_COST) -> tuple[tuple[int, int, int], ...]:
    """Consecutive receivers in chunks of at most ``limit`` slots, such that slots and chunks cost least together.

    :func:`forcetune.kernels.edge_plan.chunk_bounds` is quicker, and wastes more.
    """
    n = len(degree)
    least = np.full(n + 1, np.inf)
    least[0] = 0
    begins = np.zeros(n + 1, dtype=np.int64)
    for start in range(n):
        widths = np.maximum.accumulate(degree[start : start + limit])
        slots = widths * np.arange(1, len(widths) + 1)
        allowed = max(1, int(np.searchsorted(slots, limit, side="right")))
        costs = least[start] + slots[:allowed] + cost
        stops = slice(start + 1, start + 1 + allowed)
        better = costs < least[stops]
        least[stops] = np.where(better, costs, least[stops])
        begins[stops] = np.where(better, start, begins[stops])
    chunks: list[tuple[int, int, int]] = []
    stop = n
    while stop > 0:
        start = int(begins[stop])
        chunks.append((start, stop, int(degree[start:stop].max())))
        stop = start
    return tuple(reversed(chunks))


def _degrees(graph: Batch, elements: Sequence[int]) -> list[np.ndarray]:
    """For each element the numbers of neighbours of its atoms, the largest first."""
    degree = np.bincount(graph.edge_index[1].cpu().numpy(), minlength=graph.n_atoms)
    numbers = graph.numbers.cpu().numpy()
    return [-np.sort(-degree[numbers == z]) for z in elements]


def fitted(batch: Batch, layout: Layout, elements: Sequence[int]) -> tuple[Batch, Plan] | None:
    """A batch in a layout, with its plan, or None where it does not fit.

    The frames' own graphs, atoms and edges come first.

    Args:
        batch: on a CPU.
        layout: of a set that its frames are from.
        elements: the model's.
    """
    counts = {int(z): int(n) for z, n in zip(*np.unique(batch.numbers.numpy(), return_counts=True), strict=True)}
    wanted = dict(zip(layout.elements, layout.counts, strict=True))
    if any(n > wanted.get(z, 0) for z, n in counts.items()):
        return None
    missing = np.repeat(list(wanted), [n - counts.get(z, 0) for z, n in wanted.items()])
    n_graphs, n_edges = layout.n_graphs - batch.n_graphs, layout.n_edges - batch.n_edges
    if n_graphs < 1 or n_edges < 2 or len(missing) < n_graphs:
        return None
    full = collate([batch, _filler(batch, missing, n_graphs, n_edges, layout.cutoff)])
    table = {z: index for index, z in enumerate(elements)}
    species = torch.tensor([table[z] for z in full.numbers.tolist()], dtype=torch.int64)
    bounds = Bounds(layout.chunks, batch.n_edges, layout.n_edges // 2 if layout.paired else layout.n_edges)
    try:
        return full, make_plan(full.edge_index, full.unit_shifts, species, paired=layout.paired, bounds=bounds)
    except ValueError:
        return None


def _filler(batch: Batch, numbers: np.ndarray, n_graphs: int, n_edges: int, cutoff: float) -> Batch:
    """Graphs without labels that weigh nothing: all atoms but one each in the last, with edges to its own images."""
    n_atoms = len(numbers)
    dtype = batch.positions.dtype

    def unknown(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype)

    unit_shifts = torch.zeros(n_edges, 3, dtype=dtype)
    unit_shifts[:, 0] = 1
    return Batch(
        numbers=torch.from_numpy(numbers).to(batch.numbers.dtype),
        positions=torch.zeros(n_atoms, 3, dtype=dtype),
        cell=(2 * cutoff * torch.eye(3, dtype=dtype)).repeat(n_graphs, 1, 1),
        edge_index=torch.full((2, n_edges), n_atoms - 1, dtype=batch.edge_index.dtype),
        unit_shifts=unit_shifts,
        graph_index=torch.arange(n_atoms).clamp(max=n_graphs - 1),
        ptr=torch.cat((torch.arange(n_graphs), torch.tensor([n_atoms]))),
        energy=unknown(n_graphs, dtype=batch.energy.dtype),
        forces=unknown(n_atoms, 3),
        stress=unknown(n_graphs, 3, 3),
        moments=unknown(n_atoms, 3),
        spins=unknown(n_atoms, 3),
        magforces=unknown(n_atoms, 3),
        weight=torch.zeros(n_graphs, dtype=batch.weight.dtype),
        file_weights=torch.ones(n_graphs, 4, dtype=batch.file_weights.dtype),
        replayed=torch.zeros(n_graphs, dtype=torch.bool),
    )


def list_tensors(value: Batch | Plan) -> list[Tensor]:
    """What differs between batches in one layout: tensors in the order of the fields, those of chunks last."""
    tensors = [getattr(value, name) for name in _varying(value)]
    chunks = value.chunks if isinstance(value, Plan) else ()
    return tensors + [item for chunk in chunks for item in (chunk.pairs, chunk.oriented, chunk.senders)]


def plan_with(plan: Plan, tensors: Sequence[Tensor]) -> Plan:
    """The same plan with other tensors, given as :func:`list_tensors` gives them."""
    left = iter(tensors)
    changed = {name: next(left) for name in _varying(plan)}
    chunks = [replace(c, pairs=next(left), oriented=next(left), senders=next(left)) for c in plan.chunks]
    return replace(plan, **changed, chunks=tuple(chunks))


def _varying(value: Batch | Plan) -> list[str]:
    # the species present, and those of the atoms in the plan's order, are the layout's
    return [
        field.name
        for field in fields(value)
        if field.name not in ("present", "species") and isinstance(getattr(value, field.name), Tensor)
    ]
