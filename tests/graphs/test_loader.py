"""Batches of an epoch: every frame once, an order that depends on seed and epoch alone, budgets that hold."""

from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forcetune.errors import InputError
from forcetune.graphs.graph import Batch, build_graph
from forcetune.graphs.loader import BatchLoader, balanced, pack, pack_tightly
from systems import cluster, frames_of


def graphs(count: int) -> list[Batch]:
    return [build_graph(frame, 3.0) for frame in frames_of(*(cluster(atoms=2 + i, seed=i) for i in range(count)))]


def sizes(loader: BatchLoader) -> list[list[int]]:
    return [batch.atoms_per_graph.tolist() for batch in loader]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def epochs(seed: int, *numbers: int) -> list[list[list[int]]]:
        loader = BatchLoader(graphs(7), 3, shuffle=True, seed=seed)
        batches = []
        for number in numbers:
            loader.epoch = number
            batches.append(sizes(loader))
        return batches

    first = epochs(1, 0, 1, 2)
    assert epochs(1, 2) == first[2:]
    assert first[0] != first[1]
    assert epochs(2, 0) != first[:1]
    assert all(sorted(chain.from_iterable(epoch)) == [2, 3, 4, 5, 6, 7, 8] for epoch in first)
    assert [len(batch) for batch in first[0]] == [3, 3, 1]


def test_without_shuffling_the_order_is_that_of_the_frames() -> None:
    loader = BatchLoader(graphs(4), 3)
    assert sizes(loader) == [[2, 3, 4], [5]] == sizes(loader)
    assert loader.n_batches == 2


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 200)), min_size=1, max_size=30),
    st.integers(30, 100),
    st.integers(200, 500),
)
@settings(max_examples=60, deadline=None)
def test_budgets_hold_and_nothing_is_lost(members: list[tuple[int, int]], atoms: int, edges: int) -> None:
    batches = pack(members, range(len(members)), 1, atoms, edges)
    assert list(chain.from_iterable(batches)) == list(range(len(members)))
    for batch in batches:
        assert sum(members[i][0] for i in batch) <= atoms
        assert sum(members[i][1] for i in batch) <= edges
    for one, following in pairwise(batches):
        joined = [*one, following[0]]
        assert sum(members[i][0] for i in joined) > atoms or sum(members[i][1] for i in joined) > edges


def test_frame_beyond_the_budget_is_told() -> None:
    with pytest.raises(InputError, match=r"frame 3 of the set has 5 atoms.*raise it to at least 5"):
        BatchLoader(graphs(5), 1, batch_atoms=4)
    with pytest.raises(InputError, match=r"edges, more than the budget of 1 \(training\.batch_edges\)"):
        BatchLoader(graphs(5), 1, batch_edges=1)


def test_graphs_are_moved_once() -> None:
    loader = BatchLoader(graphs(2), 2, device="cpu")
    assert next(iter(loader)).positions.device == torch.device("cpu")


MEMBERS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 200)), min_size=1, max_size=60)


@given(MEMBERS, st.none() | st.integers(30, 100), st.none() | st.integers(200, 500), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_tight_batches_hold_the_budget_and_every_frame_once(
    members: list[tuple[int, int]], atoms: int | None, edges: int | None, window: int
) -> None:
    order = [(7 * place) % len(members) if len(members) % 7 else place for place in range(len(members))]
    batches = pack_tightly(members, order, atoms, edges, window)
    assert sorted(chain.from_iterable(batches)) == list(range(len(members)))
    arrived = {index: place for place, index in enumerate(order)}
    done = 0
    for batch in batches:
        assert atoms is None or sum(members[i][0] for i in batch) <= atoms
        assert edges is None or sum(members[i][1] for i in batch) <= edges
        done += len(batch)
        # nothing is taken before it came into the window
        assert max(arrived[i] for i in batch) < done + window
    assert batches == pack_tightly(members, order, atoms, edges, window)


def test_tight_batches_are_fuller() -> None:
    """Frames of very different size: what is left over at the ends of batches shrinks from a fifth to a hundredth."""
    rng = np.random.default_rng(1)
    members = [(int(n), int(n * n)) for n in rng.integers(3, 60, 4000)]
    budget = 4000
    whole = sum(edges for _, edges in members)
    shares = {
        name: whole / (budget * len(batches))
        for name, batches in (
            ("in order", pack(members, range(4000), 1, None, budget)),
            ("tightly", pack_tightly(members, range(4000), None, budget)),
        )
    }
    assert shares["in order"] < 0.85
    assert shares["tightly"] > 0.98


def test_budgeted_epochs_are_shuffled_and_deterministic() -> None:
    def epoch(number: int) -> list[list[int]]:
        loader = BatchLoader(graphs(8), 1, batch_atoms=14, shuffle=True)
        loader.epoch = number
        assert loader.n_batches == len(sizes(loader))
        return sizes(loader)

    assert epoch(0) == epoch(0) != epoch(1)
    assert all(sum(batch) <= 14 for batch in epoch(0))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_parts_of_a_batch_are_balanced(edges: list[int], parts: int) -> None:
    chosen = balanced(edges, parts)
    assert sorted(chain.from_iterable(chosen)) == list(range(len(edges)))
    assert sum(bool(part) for part in chosen) == min(parts, len(edges))
    loads = [sum(edges[place] for place in part) for part in chosen]
    # no part is heavier than another by more than its own lightest member
    assert all(
        load - min(loads) <= min(edges[i] for i in part) or len(part) == 1
        for load, part in zip(loads, chosen, strict=True)
        if part
    )
