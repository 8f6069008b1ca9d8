"""Neighbors of atoms that move, searched again only when one could have been missed (Verlet, Phys. Rev. 159, 98
(1967)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from forcetune.graphs.neighbor_search import Edges, inverse_cells, read_back, search_neighbors


class _Reference(NamedTuple):
    """What the last search was made for."""

    numbers: Tensor
    positions: Tensor
    cell: Tensor
    pbc: Tensor
    system: Tensor


class VerletList:
    """Edges up to a distance a little above the cutoff, which serve for as long as no pair can have come near unseen.

    Edges longer than the cutoff are among them: models give them no weight. On a GPU the host waits once an update, for
    whether they still serve, and for the sizes of a search.

    Attributes:
        cutoff: of the model, Å.
        skin: how much farther is searched, Å; with 0 every update searches.
        searches: how often was searched.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        self.cutoff = cutoff
        self.skin = skin
        self.searches = 0
        self._reference: _Reference | None = None
        self._edges: Edges | None = None

    def update(self, numbers: Tensor, positions: Tensor, cell: Tensor, pbc: Tensor, system: Tensor) -> Edges:
        """The edges of a batch: the same object as the last time where that still holds all neighbors.

        Args:
            numbers: (atoms,) atomic numbers; other atoms are another batch.
            positions, cell, pbc, system: as :func:`forcetune.graphs.neighbor_search.search_neighbors`.

        Raises:
            InputError: as :func:`forcetune.graphs.neighbor_search.search_neighbors`.
        """
        current = _Reference(numbers, positions.detach(), cell.detach(), pbc, system)
        if self._edges is None or self.skin == 0 or not self._holds(current):
            self._edges = None
            edges = search_neighbors(positions, cell, pbc, system, self.cutoff + self.skin)
            self._reference = _Reference(*(tensor.clone() for tensor in current))
            self._edges = edges
            self.searches += 1
        return self._edges

    def _holds(self, now: _Reference) -> bool:
        """Whether no pair that is near now can have been farther than what was searched.

        Let F be the deformation of a cell since then and u the displacement of an atom against it. A pair at d from
        each other now was at most (d + 2 max |u|)/(1 − |F − 1|) apart.
        """
        then = self._reference
        assert then is not None
        if any(one.shape != other.shape for one, other in zip(then, now, strict=True)):
            return False
        same = (then.numbers == now.numbers).all() & (then.system == now.system).all() & (then.pbc == now.pbc).all()
        full = now.pbc.all(1)
        cells, positions = now.cell.double(), now.positions.double()
        one = torch.eye(3, dtype=cells.dtype, device=cells.device)
        before, after = (torch.where(full.view(-1, 1, 1), cell, one) for cell in (then.cell.double(), cells))
        deformation = inverse_cells(before) @ after
        # cells that are closed in some directions only may not change at all
        same = same & ((then.cell == now.cell).all(2).all(1) | full | ~now.pbc.any(1)).all()
        moved = positions - torch.einsum("ai,aij->aj", then.positions.double(), deformation[now.system])
        farthest = torch.linalg.vector_norm(moved, dim=1)
        largest = torch.zeros_like(cells[:, 0, 0]).scatter_reduce(0, now.system, farthest, "amax")
        strain = torch.linalg.matrix_norm(deformation - one)
        # comparisons with what is not a number are false
        near = (1 - strain) * (self.cutoff + self.skin) - 2 * largest >= self.cutoff
        (holds,) = read_back((same & near.all()).view(1))
        return bool(holds)
