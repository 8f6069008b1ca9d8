"""Batches of graphs that fit in memory: by frames, or packed by a budget of atoms and edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from forcetune.errors import InputError
from forcetune.graphs.graph import Batch, collate
from forcetune.graphs.stored_graphs import StoredGraphs, measure_graphs
from forcetune.utils import distributed

WINDOW = 256
"""Frames among which :func:`pack_tightly` looks for one that fits."""

Sizes = Sequence[tuple[int, int]] | np.ndarray


def pack(
    sizes: Sizes,
    order: Sequence[int],
    batch_size: int,
    batch_atoms: int | None = None,
    batch_edges: int | None = None,
) -> list[list[int]]:
    """Cut ``order`` into batches.

    Without a budget every batch has ``batch_size`` frames (the last may have fewer). With one, frames are added in
    order until the next would exceed it; ``batch_size`` does not apply then.

    Args:
        sizes: (atoms, edges) of each graph.
        order: indices of the graphs in the order in which they are taken.
        batch_size: frames a batch.
        batch_atoms, batch_edges: budgets.
    """
    if batch_atoms is None and batch_edges is None:
        return [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    batches: list[list[int]] = []
    atoms = edges = 0
    for index in order:
        more_atoms, more_edges = sizes[index]
        full = (batch_atoms is not None and atoms + more_atoms > batch_atoms) or (
            batch_edges is not None and edges + more_edges > batch_edges
        )
        if not batches or full:
            batches.append([])
            atoms = edges = 0
        batches[-1].append(index)
        atoms += more_atoms
        edges += more_edges
    return batches


def pack_tightly(
    sizes: Sizes,
    order: Sequence[int] | np.ndarray,
    batch_atoms: int | None = None,
    batch_edges: int | None = None,
    window: int = WINDOW,
) -> list[list[int]]:
    """Fill batches to a budget of atoms and edges from a window that moves along ``order``.

    A batch begins with the frame that has waited longest. Then it takes, as long as something fits, the frame of the
    window that needs most of the budget. So each frame comes once, at most some windows later than its place.

    Args:
        sizes: (atoms, edges) of each graph.
        order: indices of the graphs in the order in which they come into the window.
        batch_atoms, batch_edges: budgets; no frame exceeds them.
        window: frames to choose from.
    """
    budgets = np.array([np.inf if budget is None else budget for budget in (batch_atoms, batch_edges)])
    indices = np.asarray(order, dtype=np.int64)
    needs = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)[indices]
    shares = np.where(np.isfinite(budgets), needs / budgets, 0.0).max(axis=1)
    waiting = np.arange(min(window, len(indices)))
    coming = len(waiting)
    batches: list[list[int]] = []
    while len(waiting):
        batch: list[int] = []
        left = budgets
        choice = 0
        while choice >= 0:
            taken = waiting[choice]
            batch.append(int(indices[taken]))
            left = left - needs[taken]
            waiting = np.delete(waiting, choice)
            if coming < len(indices):
                waiting = np.append(waiting, coming)
                coming += 1
            fits = (needs[waiting] <= left).all(axis=1)
            choice = int(np.argmax(np.where(fits, shares[waiting], -1.0))) if fits.any() else -1
        batches.append(batch)
    return batches


def balanced(edges: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
    """Cut the items of a batch into parts with nearly the same number of edges.

    The item with most edges goes first, each to the part with fewest so far; as long as there are items, no part is
    empty.

    Returns:
        for each part the places of its items, ascending.
    """
    loads = [(0, 0, part) for part in range(parts)]
    groups: list[list[int]] = [[] for _ in range(parts)]
    for place in sorted(range(len(edges)), key=lambda place: (-int(edges[place]), place)):
        items, load, part = min(loads, key=lambda one: (one[0] > 0, one[1], one[0], one[2]))
        groups[part].append(place)
        loads[part] = (items + 1, load + int(edges[place]), part)
    return [sorted(part) for part in groups]


class BatchLoader:
    """Iterates over batches; shuffled again every epoch from (seed, epoch) alone, so a resumed run sees the same order.

    Attributes:
        epoch: the epoch whose order the next iteration gives.
    """

    def __init__(
        self,
        graphs: Sequence[Batch],
        batch_size: int,
        *,
        batch_atoms: int | None = None,
        batch_edges: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        replay: Sequence[Batch] = (),
        replay_ratio: float = 0.0,
    ) -> None:
        """
        Args:
            graphs: one each, in the order of an epoch that is not shuffled; stored ones are read when their turn comes.
            batch_size, batch_atoms, batch_edges: as :func:`pack`; shuffled batches with a budget are filled by
                :func:`pack_tightly`.
            shuffle: take the graphs in a new order every epoch.
            seed: of the orders.
            device: where the batches are, and graphs that are not stored.
            replay: further graphs, of which every epoch has others.
            replay_ratio: so many of them for each of ``graphs``, evenly between them.

        Raises:
            InputError: a single graph exceeds a budget.
        """
        self.device = device
        self._stored = isinstance(graphs, StoredGraphs)
        placed_on = "cpu" if self._stored else device
        self._graphs: Sequence[Batch] = graphs if self._stored else [graph.to(device=placed_on) for graph in graphs]
        self._replay = [graph.to(device=placed_on) for graph in replay]
        self.sizes = np.concatenate((measure_graphs(graphs), measure_graphs(self._replay)))
        self._own = len(graphs)
        self._replayed = max(1, round(replay_ratio * len(graphs))) if replay else 0
        self.batch_size = batch_size
        self.batch_atoms = batch_atoms
        self.batch_edges = batch_edges
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._fixed: list[Batch] | None = None
        self._planned: tuple[int, list[list[int]]] | None = None
        for column, (what, budget) in enumerate((("atoms", batch_atoms), ("edges", batch_edges))):
            if budget is not None and (over := self.sizes[:, column] > budget).any():
                index = int(np.argmax(over))
                size = self.sizes[index, column]
                raise InputError(
                    f"frame {index} of the set has {size} {what}, more than the budget of {budget} "
                    f"(training.batch_{what}); raise it to at least {size}."
                )

    @property
    def graphs(self) -> Sequence[Batch]:
        """All of them, those for replay behind the others."""
        return self._graphs if self._stored else [*self._graphs, *self._replay]

    @property
    def n_own(self) -> int:
        """Graphs that are not for replay."""
        return self._own

    def numbers(self, batch: int) -> list[int]:
        """The numbers of the graphs in a batch of the epoch in :attr:`epoch`, by that of the batch."""
        return list(self._batches()[batch])

    def graph(self, index: int) -> Batch:
        """The graph of this number, those for replay behind the others."""
        return self._graphs[index] if index < self._own else self._replay[index - self._own]

    def _replay_of_epoch(self) -> np.ndarray:
        """Indices of this epoch's replay graphs: epoch after epoch goes on in one endless series of permutations."""
        start, n_own, count = self.epoch * self._replayed, self._own, len(self._replay)
        rounds = range(start // count, (start + self._replayed - 1) // count + 1)
        series = np.concatenate([np.random.default_rng((self.seed, index, 1)).permutation(count) for index in rounds])
        return n_own + series[start % count :][: self._replayed]

    def _batches(self) -> list[list[int]]:
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, self._plan())
        return self._planned[1]

    def _plan(self) -> list[list[int]]:
        order = np.arange(self._own)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        if self._replayed:
            mixed = np.concatenate((order, self._replay_of_epoch()))
            places = [(np.arange(count) + 0.5) / count for count in (self._own, self._replayed)]
            order = mixed[np.argsort(np.concatenate(places), kind="stable")]
        budget = self.batch_atoms is not None or self.batch_edges is not None
        if self.shuffle and budget:
            return pack_tightly(self.sizes, order, self.batch_atoms, self.batch_edges)
        return pack(self.sizes, order.tolist(), self.batch_size, self.batch_atoms, self.batch_edges)

    @property
    def n_batches(self) -> int:
        """Batches of the epoch in :attr:`epoch`; under a budget it varies with the order.

        It is no ``__len__``, which Lightning would read once and cut later epochs to.
        """
        return len(self._batches())

    def _collated(self, indices: Sequence[int]) -> Batch:
        batch = collate([self.graph(i) for i in indices])
        return batch.to(device=self.device) if self._stored else batch

    def __iter__(self) -> Iterator[Batch]:
        if self.shuffle:
            here = distributed.place()
            for indices in self._batches():
                if not distributed.joined():
                    yield self._collated(indices)
                    continue
                mine = balanced(self.sizes[indices, 1], here.count)[here.rank]
                # with fewer graphs than processes, some compute one that counts for nothing
                yield self._collated([indices[i] for i in mine]) if mine else self._collated(indices[:1]).weighted(0.0)
            return
        if self._stored:
            yield from map(self._collated, self._batches())
            return
        if self._fixed is None:
            self._fixed = [self._collated(indices) for indices in self._batches()]
        yield from self._fixed
