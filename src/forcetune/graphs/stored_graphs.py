"""Graphs whose frames and neighbours stay on disk: sequences that read one at a time."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch

from forcetune.frames.store.new_store import new_store
from forcetune.frames.store.rows import RowReader, RowWriter
from forcetune.frames.store.stored_frames import StoredFrames
from forcetune.graphs.edges import EDGE_COLUMNS, EdgeSearch, search_store
from forcetune.graphs.graph import Batch, graph_with
from forcetune.utils import distributed
from forcetune.utils.processes import map_in_order

VERSION = 1
_CHUNK = 128


class StoredGraphs(Sequence[Batch]):
    """The graph of every frame of a set, read when asked for; as :func:`forcetune.graphs.graph.build_graph` gives it.

    Attributes:
        frames: on disk, too.
        dtype: of real numbers.
    """

    def __init__(self, frames: StoredFrames, rows: RowReader, dtype: torch.dtype) -> None:
        self.frames = frames
        self.dtype = dtype
        self._rows = rows

    def __len__(self) -> int:
        return len(self.frames)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> StoredGraphs: ...
    def __getitem__(self, index: int | slice) -> Batch | StoredGraphs:
        if isinstance(index, slice):
            return StoredGraphs(self.frames[index], self._rows, self.dtype)
        row = self._rows.row(int(self.frames.indices[index]))
        edges, shifts = row["edges"].T.astype(np.int64), row["shifts"].astype(np.float64)
        return graph_with(self.frames[index], edges, shifts, self.dtype)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: np.ndarray) -> StoredGraphs:
        """Those at these places of this sequence."""
        return StoredGraphs(self.frames.take(self.frames.indices[indices]), self._rows, self.dtype)

    @property
    def sizes(self) -> np.ndarray:
        """(graphs, 2) atoms and edges of each."""
        return np.stack((self.frames.atoms, self._rows.numbers("edges")[self.frames.indices]), axis=1)


def stored_graphs(
    frames: StoredFrames,
    cutoff: float,
    dtype: torch.dtype,
    *,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> StoredGraphs:
    """Graphs of stored frames; neighbours of the whole store are found once for a cutoff, and kept beside it.

    Args:
        frames: all of a store, or some.
        cutoff: Å.
        dtype: of real numbers.
        workers: processes that search.
        progress: called with the number of frames done.

    Raises:
        InputError: as :func:`forcetune.graphs.graph.build_graph`, or the folder cannot be written.
    """
    rows = frames.rows
    name = hashlib.sha256(f"{VERSION} {rows.folder.name} {cutoff!r}".encode()).hexdigest()[:32]
    place = rows.folder.with_name(f"graphs-{name}")
    distributed.made_once(place, lambda: _make(place, rows, cutoff, workers, progress or (lambda _: None)))
    return StoredGraphs(frames, RowReader(place), dtype)


def _make(place: Path, frames: RowReader, cutoff: float, workers: int, progress: Callable[[int], None]) -> None:
    count = len(frames)
    tasks = (EdgeSearch(frames, low, min(low + _CHUNK, count), cutoff) for low in range(0, count, _CHUNK))
    sizes = array("i")
    with new_store(place) as temporary:
        writer = RowWriter(temporary, EDGE_COLUMNS)
        try:
            for rows, edges in map_in_order(search_store, tasks, workers):
                writer.write(rows)
                sizes.extend(edges)
                progress(len(rows))
            writer.close({"cutoff": cutoff}, {"edges": np.array(sizes)})
        finally:
            writer.abandon()


def measure_graphs(graphs: Sequence[Batch]) -> np.ndarray:
    """(graphs, 2) atoms and edges of each."""
    if isinstance(graphs, StoredGraphs):
        return graphs.sizes
    return np.array([(graph.n_atoms, graph.n_edges) for graph in graphs], dtype=np.int64).reshape(-1, 2)


def any_label(graphs: Sequence[Batch], name: str) -> bool:
    """Whether some graph has a label of this name."""
    if isinstance(graphs, StoredGraphs):
        return graphs.frames.any_label(name)
    return any(not bool(torch.isnan(getattr(graph, name)).all()) for graph in graphs)
