"""Neighbors with a skin: those of a plain search, and few searches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from forcetune.errors import InputError
from forcetune.frames.frame import Frame
from forcetune.graphs.edges import find_edges
from forcetune.graphs.skin_list import SKIN, SkinList
from systems import cluster, crystal, frames_of

CUTOFF = 4.0


def walk(atoms: Atoms, steps: int, size: float) -> list[Frame]:
    rng = np.random.default_rng(0)
    positions_on_the_way = []
    for _ in range(steps):
        atoms.positions += rng.normal(scale=size, size=atoms.positions.shape)
        (frame,) = frames_of(atoms.copy())
        positions_on_the_way.append(frame)
    return positions_on_the_way


def assert_same(skin: SkinList, frame: Frame) -> None:
    for one, other in zip(skin.edges(frame), find_edges(frame, skin.cutoff), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("periodic", [(True, True, True), (True, True, False), (False, False, False)])
def test_neighbors_are_those_of_a_search(periodic: tuple[bool, bool, bool]) -> None:
    atoms = crystal() if any(periodic) else cluster()
    atoms.pbc = periodic
    skin = SkinList(CUTOFF)
    for frame in walk(atoms, 40, 0.01):
        assert_same(skin, frame)
    assert 2 <= skin.searches <= 12


def test_large_steps_other_cells_and_other_atoms_are_searched_again() -> None:
    skin = SkinList(CUTOFF)
    first, second = walk(crystal(), 2, 0.001)
    assert_same(skin, first)
    assert_same(skin, second)
    assert_same(skin, first)
    assert skin.searches == 2
    far = first.positions.copy()
    far[0] += 0.6 * SKIN
    assert_same(skin, replace(first, positions=far))
    assert skin.searches == 3
    assert_same(skin, replace(first, cell=1.01 * first.cell))
    assert skin.searches == 4
    (other,) = frames_of(cluster())
    assert_same(skin, other)
    assert skin.searches == 5


def test_atoms_that_come_to_one_place_are_refused() -> None:
    skin = SkinList(CUTOFF)
    near = Atoms("H2", [[0, 0, 0], [0, 0, 0.2]])
    for z in (0.2, 0.1):
        near.positions[1, 2] = z
        skin.edges(frames_of(near.copy())[0])
    near.positions[1, 2] = 0.0
    with pytest.raises(InputError, match="at the same place"):
        skin.edges(frames_of(near.copy())[0])
