"""Neighbors of a structure that moves, searched with a skin so that most steps only choose among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame, IntArray
from forcetune.graphs.edges import check_apart, find_edges

SKIN = 0.5
"""Å; a new search is needed once an atom has moved by half of it."""


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Neighbors within the cutoff and the skin, where a search found them."""

    frame: Frame
    edge_index: IntArray
    shifts: FloatArray


class SkinList:
    """Neighbors of the structures of a calculator, one after another.

    The first structure is searched for the cutoff alone; where one follows with the same cell and as many atoms, as in
    dynamics, neighbors within the cutoff and a skin are kept, until an atom has moved by half of the skin.
    """

    def __init__(self, cutoff: float, skin: float = SKIN) -> None:
        """
        Args:
            cutoff: Å.
            skin: Å.
        """
        self.cutoff, self.skin = cutoff, skin
        self.searches = 0
        self._last: Frame | None = None
        self._candidates: _Candidates | None = None

    def edges(self, frame: Frame) -> tuple[IntArray, FloatArray]:
        """The neighbors of a frame, equal to those of :func:`~forcetune.graphs.edges.find_edges` and in their order.

        Raises:
            InputError: as there.
        """
        if self._candidates is not None and self._covers(self._candidates, frame):
            return self._chosen(self._candidates, frame)
        follows = self._last is not None and _is_alike(self._last, frame)
        self._last, self._candidates = frame, None
        self.searches += 1
        if not follows:
            return find_edges(frame, self.cutoff)
        try:
            edges = find_edges(frame, self.cutoff + self.skin)
        except InputError:  # perhaps only as there would be too many of them
            return find_edges(frame, self.cutoff)
        self._candidates = _Candidates(frame, *edges)
        return self._chosen(self._candidates, frame)

    def _covers(self, candidates: _Candidates, frame: Frame) -> bool:
        """Whether no neighbor can be missing."""
        if not _is_alike(candidates.frame, frame):
            return False
        moved = frame.positions - candidates.frame.positions
        return float(np.einsum("ij,ij->i", moved, moved).max(initial=0.0)) < (self.skin / 2) ** 2

    def _chosen(self, candidates: _Candidates, frame: Frame) -> tuple[IntArray, FloatArray]:
        """The candidates within the cutoff."""
        sender, receiver = candidates.edge_index
        vectors = frame.positions[receiver] - frame.positions[sender] + candidates.shifts @ frame.cell
        near = np.einsum("ij,ij->i", vectors, vectors) < self.cutoff**2
        edge_index, shifts = candidates.edge_index[:, near], candidates.shifts[near]
        check_apart(frame, edge_index, shifts)
        return edge_index, shifts


def _is_alike(one: Frame, other: Frame) -> bool:
    """Whether frames have as many atoms, and the same cell."""
    return (
        len(one) == len(other)
        and bool(np.array_equal(one.pbc, other.pbc))
        and bool(np.array_equal(one.cell, other.cell))
    )
