"""Batches of graphs that fit in memory: by frames, or packed by a budget of atoms and edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from forcetune import parallel
from forcetune.errors import InputError
from forcetune.graphs.graph import Batch, collate


def pack(
    sizes: Sequence[tuple[int, int]],
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


class BatchLoader:
    """Iterates over batches; shuffled anew every epoch from (seed, epoch) alone, so a resumed run sees the same order.

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
            graphs: one each, in the order of an epoch that is not shuffled.
            batch_size, batch_atoms, batch_edges: as :func:`pack`.
            shuffle: take the graphs in a new order every epoch.
            seed: of the orders.
            device: where the graphs are kept.
            replay: further graphs, of which every epoch has others.
            replay_ratio: so many of them for each of ``graphs``, evenly between them.

        Raises:
            InputError: a single graph exceeds a budget.
        """
        self.graphs = [graph.to(device=device) for graph in (*graphs, *replay)]
        self.sizes = [(graph.n_atoms, graph.n_edges) for graph in self.graphs]
        self._own = len(graphs)
        self._replayed = max(1, round(replay_ratio * len(graphs))) if replay else 0
        self.batch_size = batch_size
        self.batch_atoms = batch_atoms
        self.batch_edges = batch_edges
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._fixed: list[Batch] | None = None
        for index, (atoms, edges) in enumerate(self.sizes):
            for what, size, budget in (("atoms", atoms, batch_atoms), ("edges", edges, batch_edges)):
                if budget is not None and size > budget:
                    raise InputError(
                        f"frame {index} of the set has {size} {what}, more than the budget of {budget} "
                        f"(training.batch_{what}); raise it to at least {size}."
                    )

    def _replay_of_epoch(self) -> np.ndarray:
        """Indices of this epoch's replay graphs: epoch after epoch goes on in one endless series of permutations."""
        start, own, count = self.epoch * self._replayed, self._own, len(self.graphs) - self._own
        rounds = range(start // count, (start + self._replayed - 1) // count + 1)
        series = np.concatenate([np.random.default_rng((self.seed, index, 1)).permutation(count) for index in rounds])
        return own + series[start % count :][: self._replayed]

    def _batches(self) -> list[list[int]]:
        order = np.arange(self._own)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        if self._replayed:
            mixed = np.concatenate((order, self._replay_of_epoch()))
            places = [(np.arange(count) + 0.5) / count for count in (self._own, self._replayed)]
            order = mixed[np.argsort(np.concatenate(places), kind="stable")]
        return pack(self.sizes, [int(i) for i in order], self.batch_size, self.batch_atoms, self.batch_edges)

    @property
    def n_batches(self) -> int:
        """Batches of the epoch in :attr:`epoch`; under a budget it varies with the order.

        It is no ``__len__``, which Lightning would read once and cut later epochs to.
        """
        return len(self._batches())

    def __iter__(self) -> Iterator[Batch]:
        if self.shuffle:
            for indices in self._batches():
                mine = [self.graphs[i] for i in parallel.part_of(indices)]
                # with fewer graphs than processes, some compute one that counts for nothing
                yield collate(mine or [self.graphs[indices[0]].weighted(0.0)])
            return
        if self._fixed is None:
            self._fixed = [collate([self.graphs[i] for i in indices]) for indices in self._batches()]
        yield from self._fixed
