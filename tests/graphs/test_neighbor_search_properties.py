"""The search by tensor operations: the CPU's pairs for any cells, and how often the host waits for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from forcetune.errors import InputError
from forcetune.frames.frame import Frame, Origin
from forcetune.graphs import neighbor_search, verlet_list
from forcetune.graphs.edges import find_edges
from forcetune.graphs.graph import unlabelled_batch
from forcetune.graphs.neighbor_search import Edges, closed_box, inverse_cells, search_neighbors
from forcetune.graphs.verlet_list import VerletList
from systems import crystal

WAITING = {
    *("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("equal", "bincount", "is_nonzero", "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_pinv"),
}
"""Operations for whose results the host waits on a GPU; ``index`` by a mask and ``repeat_interleave`` beside them."""


class Waits(TorchDispatchMode):
    """Notes the operations that a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = str(func.overloadpacket).removeprefix("aten."), kwargs or {}
        self.operations += 1
        masked = name in ("index", "index_put") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        unsized = name == "repeat_interleave" and options.get("output_size") is None
        if name in WAITING or masked or unsized:
            self.names.append(name)
        return func(*args, **options)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many integers each reading brought to the host."""
    counts: list[int] = []
    original = neighbor_search.read_back

    def noted(values: torch.Tensor) -> list[int]:
        counts.append(len(values))
        return original(values)

    for module in (neighbor_search, verlet_list):
        monkeypatch.setattr(module, "read_back", noted)
    return counts


def tensors(structures: list[Atoms], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Numbers, positions, cells, periodic directions, systems."""
    return [
        torch.from_numpy(np.concatenate([atoms.numbers for atoms in structures])).long(),
        torch.from_numpy(np.concatenate([atoms.positions for atoms in structures])).to(dtype),
        torch.from_numpy(np.stack([atoms.cell.array for atoms in structures])).to(dtype),
        torch.from_numpy(np.stack([atoms.pbc for atoms in structures])),
        torch.from_numpy(np.repeat(np.arange(len(structures)), [len(atoms) for atoms in structures])),
    ]


def searched(structures: list[Atoms], cutoff: float) -> Edges:
    _, positions, cell, pbc, system = tensors(structures)
    return search_neighbors(positions, cell, pbc, system, cutoff)


def build_frame(atoms: Atoms) -> Frame:
    places = (atoms.numbers.astype(np.int64), atoms.positions, atoms.cell.array, atoms.pbc)
    return Frame(*places, energy=None, forces=None, stress=None, origin=Origin("test", 0))


def rows(edge_index: Any, shifts: Any, first: int = 0) -> list[tuple[int, ...]]:
    table = np.concatenate((np.asarray(edge_index).T + first, np.rint(np.asarray(shifts)).astype(int)), axis=1)
    return sorted(map(tuple, table.tolist()))


def random_structure(rng: np.random.Generator) -> Atoms:
    """Any cell of 1.5 to 9 Å, right- or left-handed, more or less skewed; atoms inside or some cells away."""
    lengths = np.exp(rng.uniform(np.log(1.5), np.log(9.0), 3))
    cell = (np.eye(3) + rng.uniform(-1, 1, (3, 3)) * rng.choice([0.0, 0.3, 0.9])) @ np.diag(lengths)
    count = int(rng.integers(1, 8))
    places = rng.uniform(0, 1, (count, 3)) + rng.integers(-2, 3, (count, 3)) * rng.choice([0, 1])
    return Atoms("H" * count, places @ cell, cell=cell, pbc=rng.random(3) < rng.choice([0.0, 0.5, 1.0]))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.8, 6.0), st.integers(1, 4))
def test_pairs_are_those_of_the_cpu_for_any_cells(seed: int, cutoff: float, count: int) -> None:
    rng = np.random.default_rng(seed)
    structures = [random_structure(rng) for _ in range(count)]
    assume(all(abs(np.linalg.det(atoms.cell.array)) > 0.5 for atoms in structures))
    expected: list[tuple[int, ...]] = []
    first = 0
    try:
        for atoms in structures:
            expected += rows(*find_edges(build_frame(atoms), cutoff), first)
            first += len(atoms)
    except InputError as error:  # atoms that lie on each other
        with pytest.raises(InputError, match=r"at the same place|its own periodic image|makes no sense"):
            searched(structures, cutoff)
        assert "same place" in str(error) or "periodic image" in str(error) or "no sense" in str(error)
        return
    edges = searched(structures, cutoff)
    assert rows(edges.edge_index, edges.unit_shifts) == sorted(expected)
    assert bool((edges.edge_index[1].diff() >= 0).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_open_directions_are_closed_at_right_angles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = torch.from_numpy(rng.normal(size=(8, 3, 3)) * 5)
    pbc = torch.tensor([[bool(code >> bit & 1) for bit in range(3)] for code in range(8)])
    box = closed_box(cells, pbc)
    assert torch.equal(box[pbc], cells[pbc])
    for own, periodic in zip(box, pbc, strict=True):
        opened = own[~periodic]
        torch.testing.assert_close(opened @ opened.T, torch.eye(len(opened), dtype=own.dtype), rtol=0, atol=1e-12)
        assert float((opened @ own[periodic].T).abs().sum()) < 1e-11
    torch.testing.assert_close(
        inverse_cells(box) @ box, torch.eye(3, dtype=box.dtype).expand_as(box), atol=1e-8, rtol=0
    )


def test_a_search_waits_for_sizes_only(reads: list[int]) -> None:
    structures = [molecule("CH3CH2OH"), crystal(), bulk("Cu", "fcc", a=3.6).repeat(3)]
    structures[1].pbc = (True, False, True)
    numbers, positions, cell, pbc, system = tensors(structures)
    with Waits() as seen:
        edges = search_neighbors(positions, cell, pbc, system, 5.0)
        batch = unlabelled_batch(numbers, positions, cell, system, *edges)
    assert seen.operations > 100 and seen.names == []
    # bins near each atom and what is wrong with the structures; candidates; edges and coinciding atoms
    assert reads == [5, 1, 2]
    assert batch.ptr.tolist() == np.cumsum([0, *map(len, structures)]).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_list_that_serves_waits_once(reads: list[int], dtype: torch.dtype) -> None:
    structures = [molecule("CH3CH2OH"), crystal()]
    neighbors = VerletList(4.0, 0.6)
    neighbors.update(*tensors(structures, dtype))
    reads.clear()
    for atoms in structures:
        atoms.positions[0] += 0.1
    moved = tensors(structures, dtype)
    with Waits() as seen:
        neighbors.update(*moved)
    assert neighbors.searches == 1
    assert reads == [1] and seen.names == []


def test_a_search_and_a_list_stay_on_the_device(reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On PyTorch's device without values, with the sizes that the CPU read; a stray tensor of the CPU fails there."""
    structures = [molecule("CH3CH2OH"), crystal(), bulk("Cu", "fcc", a=3.6)]
    structures[1].pbc = (True, False, True)
    everything = tensors(structures)
    sizes: list[list[int]] = []

    def noted(values: torch.Tensor) -> list[int]:
        sizes.append(values.tolist())
        return sizes[-1]

    def repeated(values: torch.Tensor) -> list[int]:
        assert values.device.type == "meta"
        return sizes.pop(0)

    for read in (noted, repeated):
        for module in (neighbor_search, verlet_list):
            monkeypatch.setattr(module, "read_back", read)
        neighbors = VerletList(4.0, 0.6)
        lists = [neighbors.update(*everything), neighbors.update(*everything)]
        assert lists[0] is lists[1] and neighbors.searches == 1
        assert lists[0].edge_index.shape == (2, len(lists[0].unit_shifts)) and len(lists[0].unit_shifts) > 100
        everything = [one.to("meta") for one in everything]
    assert lists[0].edge_index.device.type == lists[0].unit_shifts.device.type == "meta" and not sizes
