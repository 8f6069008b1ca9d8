"""Neighbors of many systems at once, against matscipy's of each."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from forcetune.errors import InputError
from forcetune.frames.neighbor_list import neighbours
from forcetune.graphs.neighbor_search import search_neighbors
from forcetune.graphs.verlet_list import VerletList
from systems import cluster, crystal

CUTOFF = 4.3


def _search(structures: list[Atoms], cutoff: float = CUTOFF) -> tuple[np.ndarray, np.ndarray]:
    edges = search_neighbors(
        torch.from_numpy(np.concatenate([atoms.positions for atoms in structures])),
        torch.from_numpy(np.stack([atoms.cell.array for atoms in structures])),
        torch.from_numpy(np.stack([atoms.pbc for atoms in structures])),
        torch.from_numpy(np.repeat(np.arange(len(structures)), [len(atoms) for atoms in structures])),
        cutoff,
    )
    return edges.edge_index.numpy(), edges.unit_shifts.numpy()


def _rows(edge_index: np.ndarray, shifts: np.ndarray, first: int = 0) -> list[tuple[int, ...]]:
    rows = np.concatenate((edge_index.T + first, np.rint(shifts).astype(int)), axis=1)
    return sorted(map(tuple, rows.tolist()))


def _structures() -> list[Atoms]:
    rng = np.random.default_rng(0)
    small = bulk("Cu", "fcc", a=3.6)
    far = Atoms("CO", [[0, 0, 0], [300.0, 2.0, -1.0]])
    outside = crystal()
    outside.positions += rng.integers(-3, 4, (len(outside), 3)) @ outside.cell.array
    slab = crystal((1, 6))
    slab.cell[2] = 0
    partly = []
    for pbc in product((False, True), repeat=3):
        atoms = crystal(seed=sum(pbc))
        atoms.pbc = pbc
        partly.append(atoms)
    large = bulk("Cu", "fcc", a=3.6, cubic=True).repeat((4, 3, 5))
    large.rattle(0.1, seed=1)
    left_handed = crystal()
    left_handed.set_cell(left_handed.cell.array[[1, 0, 2]])
    slab.pbc = (True, True, False)
    return [molecule("CH3CH2OH"), small, cluster(), far, outside, slab, *partly, large, left_handed, Atoms("H")]


def test_equals_matscipy_for_a_batch_of_everything() -> None:
    structures = _structures()
    edge_index, shifts = _search(structures)
    assert (np.diff(edge_index[1]) >= 0).all()
    expected, first = [], 0
    for atoms in structures:
        expected += _rows(*neighbours(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF), first)
        first += len(atoms)
    assert _rows(edge_index, shifts) == sorted(expected)
    assert len(expected) > 6_000


@pytest.mark.parametrize("cutoff", [2.0, 6.1, 12.0])
def test_equals_matscipy_for_other_cutoffs(cutoff: float) -> None:
    for atoms in (molecule("C6H6"), bulk("Fe", "bcc", a=2.87), crystal()):
        one = _rows(*_search([atoms], cutoff))
        assert one == _rows(*neighbours(atoms.positions, atoms.cell.array, atoms.pbc, cutoff))


def test_refusals() -> None:
    lonely = Atoms("HH", [[0, 0, 0], [0, 0, 0.9]])
    broken = lonely.copy()
    broken.positions[1, 2] = np.nan
    together = lonely.copy()
    together.positions[1] = 0
    flat = Atoms("H", pbc=True)
    tiny = Atoms("H", cell=[1e-3, 5, 5], pbc=True)
    skewed = Atoms("H", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 1]], pbc=(True, True, False))
    endless = Atoms("H", cell=[np.inf, 5, 5], pbc=True)
    for atoms, message in (
        (broken, "position of atom 1 of system 1 is not finite"),
        (together, "atoms 0 and 1 of system 1 are at the same place"),
        (flat, "system 1 is periodic, but its lattice vectors"),
        (skewed, "system 1 is periodic, but its lattice vectors"),
        (tiny, "system 1 has a cell only 0.001 Å high"),
        (endless, "cell of system 1 is not finite"),
    ):
        with pytest.raises(InputError, match=message):
            _search([lonely, atoms])


# ---- neighbors of atoms that move ------------------------------------------------------------------------------------


def _tensors(structures: list[Atoms]) -> list[torch.Tensor]:
    return [
        torch.from_numpy(np.concatenate([atoms.numbers for atoms in structures])).long(),
        torch.from_numpy(np.concatenate([atoms.positions for atoms in structures])),
        torch.from_numpy(np.stack([atoms.cell.array for atoms in structures])),
        torch.from_numpy(np.stack([atoms.pbc for atoms in structures])),
        torch.from_numpy(np.repeat(np.arange(len(structures)), [len(atoms) for atoms in structures])),
    ]


def test_no_neighbor_is_missed_in_moving_and_deformed_cells() -> None:
    rng = np.random.default_rng(0)
    structures = [molecule("CH3CH2OH"), crystal(), bulk("Cu", "fcc", a=3.6)]
    structures.append(crystal())
    structures[-1].pbc = (True, True, False)
    neighbors = VerletList(CUTOFF, 0.6)
    steps = 60
    for _ in range(steps):
        for atoms in structures:
            atoms.positions += 0.02 * rng.standard_normal(atoms.positions.shape)
        structures[1].set_cell(structures[1].cell.array @ (np.eye(3) + 0.003 * rng.standard_normal((3, 3))), True)
        edges = neighbors.update(*_tensors(structures))
        present = set(_rows(edges.edge_index.numpy(), edges.unit_shifts.numpy()))
        first = 0
        for atoms in structures:
            assert set(_rows(*neighbours(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF), first)) <= present
            first += len(atoms)
    assert 2 < neighbors.searches < steps / 2


def test_what_makes_a_new_search() -> None:
    def fresh() -> tuple[VerletList, list[Atoms]]:
        structures = [molecule("CH3CH2OH"), crystal()]
        neighbors = VerletList(CUTOFF, 0.5)
        edges = neighbors.update(*_tensors(structures))
        structures[0].positions[0, 0] += 0.24
        assert neighbors.update(*_tensors(structures)) is edges
        return neighbors, structures

    for index, change in enumerate(("moved", "element", "cell", "pbc", "fewer")):
        neighbors, structures = fresh()
        if change == "moved":
            structures[0].positions[0, 0] += 0.02
        elif change == "element":
            structures[0].numbers[1] = 8
        elif change == "cell":
            structures[1].set_cell(structures[1].cell.array * 1.2)
        elif change == "pbc":
            structures[1].pbc = (True, False, True)
        else:
            structures.pop(index % 2)
        neighbors.update(*_tensors(structures))
        assert neighbors.searches == 2, change
    neighbors, structures = fresh()
    structures[0].positions[1] = np.nan
    with pytest.raises(InputError, match="position of atom 1 of system 0 is not finite"):
        neighbors.update(*_tensors(structures))
