"""Batches filled up to one shape: any batch of the set fits, and predicts what it did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms

from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import collate, split_batch
from forcetune.kernels.edge_plan import chunk_bounds, with_plan
from forcetune.kernels.padding import CUDA_CHUNK_COST, best_chunks, build_layout, fitted, list_tensors, plan_with
from systems import backbone, cluster, crystal, frames_of

STRUCTURES = {
    "molecules": [cluster(seed=seed, atoms=4 + seed % 5) for seed in range(12)],
    "crystals": [crystal(seed=seed) for seed in range(6)],
    "mixed, single atoms too": [
        cluster(atoms=1),
        cluster(atoms=9, elements=(8,)),
        *[cluster(seed=s) for s in range(6)],
    ],
}


@pytest.mark.parametrize(
    "later", ["RealAgnosticResidualInteractionBlock", "RealAgnosticDensityResidualInteractionBlock"]
)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_batch_of_the_set_fits_and_predicts_the_same(kind: str, later: str) -> None:
    model = backbone(max_ell=1, correlation=2, later=later)
    graphs = build_graphs(model, frames_of(*STRUCTURES[kind]))
    random = np.random.default_rng(0)
    for frames in (1, 3):
        layout = build_layout(graphs, frames, model.elements, model.cutoff, bool(model.paired))
        shapes = set()
        batches = [[len(graphs) - 1], *[random.choice(len(graphs), frames, replace=False) for _ in range(12)]]
        for chosen in batches:
            batch = collate([graphs[index] for index in chosen])
            padded = fitted(batch, layout, model.elements)
            assert padded is not None
            full, plan = padded
            shapes.add(tuple(tensor.shape for tensor in [*list_tensors(full), *list_tensors(plan)]))
            assert (full.n_graphs, full.n_atoms, full.n_edges) == (layout.n_graphs, layout.n_atoms, layout.n_edges)
            expected = model.predict(batch, stress=True)
            with with_plan(model, plan):
                predicted = model.predict(full, stress=True)
            assert expected.stress is not None and predicted.stress is not None
            for one, two in (
                (expected.energy, predicted.energy[: batch.n_graphs]),
                (expected.forces, predicted.forces[: batch.n_atoms]),
                (expected.stress, predicted.stress[: batch.n_graphs]),
            ):
                scale = max(1.0, float(one.detach().abs().max()))
                assert float((one - two).detach().abs().max()) < 1e-11 * scale
            assert all(bool(torch.isfinite(value).all()) for value in predicted[:3] if value is not None)
        assert len(shapes) == 1


def test_what_exceeds_a_layout_does_not_fit() -> None:
    model = backbone()
    graphs = build_graphs(model, frames_of(*STRUCTURES["molecules"]))
    layout = build_layout(graphs[:3], 2, model.elements, model.cutoff, True)
    assert fitted(collate(graphs[:2]), layout, model.elements) is not None
    assert fitted(collate(graphs[:3]), layout, model.elements) is None
    # as many atoms, but more neighbours
    dense = build_graphs(model, frames_of(crystal(elements=(1, 6, 7), seed=1)))
    assert fitted(dense[0], layout, model.elements) is None
    foreign = build_graphs(model, frames_of(cluster(atoms=9, elements=(8,))))
    assert fitted(foreign[0], layout, model.elements) is None


def test_plans_take_other_tensors_of_the_same_shape() -> None:
    model = backbone()
    graphs = build_graphs(model, frames_of(*STRUCTURES["molecules"]))
    layout = build_layout(graphs, 2, model.elements, model.cutoff, True)
    one, two = (fitted(collate(chosen), layout, model.elements) for chosen in (graphs[:2], graphs[2:4]))
    assert one is not None and two is not None
    moved = plan_with(one[1], list_tensors(two[1]))
    assert moved.counts == two[1].counts
    assert all(a is b for a, b in zip(list_tensors(moved), list_tensors(two[1]), strict=True))


def test_chunks_cost_no_more_than_those_of_the_quick_way() -> None:
    random = np.random.default_rng(1)
    for _ in range(30):
        degree = np.sort(random.integers(0, 40, random.integers(1, 60)))
        if random.integers(2):
            random.shuffle(degree)
        limit, cost = int(random.integers(20, 200)), int(random.integers(0, 30))

        def total(chunks: tuple[tuple[int, int, int], ...], cost: int = cost) -> int:
            return sum((stop - start) * width + cost for start, stop, width in chunks)

        best, quick = best_chunks(degree, limit, cost), chunk_bounds(degree, limit)
        assert total(best) <= total(quick)
        assert [start for start, _, _ in best] == [0, *[stop for _, stop, _ in best[:-1]]] and best[-1][1] == len(
            degree
        )
        for start, stop, width in best:
            assert width == degree[start:stop].max()
            assert (stop - start) * width <= limit or stop == start + 1


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_parts_of_a_batch_are_its_graphs(most: int) -> None:
    graphs = build_graphs(backbone(), frames_of(*STRUCTURES["mixed, single atoms too"][:7]))
    parts = split_batch(collate(graphs), most)
    assert max(part.n_graphs for part in parts) <= most and sum(part.n_graphs for part in parts) == len(graphs)
    assert max(part.n_graphs for part in parts) - min(part.n_graphs for part in parts) <= 1
    first = 0
    for part in parts:
        expected = collate(graphs[first : first + part.n_graphs])
        first += part.n_graphs
        for one, two in zip(list_tensors(part), list_tensors(expected), strict=True):
            assert torch.equal(one.nan_to_num(), two.nan_to_num())


def test_atoms_alone_have_a_layout_without_a_limit() -> None:
    model = backbone(max_ell=1)
    graphs = build_graphs(model, frames_of(Atoms("C"), Atoms("O")))
    layout = build_layout(graphs, 2, model.elements, model.cutoff, True, limit=None, cost=CUDA_CHUNK_COST)
    assert layout.n_atoms == 3 and sum(stop - start for start, stop, _ in layout.chunks) == 3


def test_slack_leaves_room_for_more_neighbours() -> None:
    model = backbone(max_ell=1)
    graphs = build_graphs(model, frames_of(cluster(atoms=9)))
    tight, wide = (build_layout(graphs, 1, model.elements, model.cutoff, True, slack=slack) for slack in (0, 2))
    assert wide.n_edges >= tight.n_edges + 2 * 9
    assert max(width for _, _, width in wide.chunks) == max(width for _, _, width in tight.chunks) + 2
