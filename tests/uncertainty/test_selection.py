"""Choices from arrays: outliers, no copies, quotas, and the determinant against explicit linear algebra."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from forcetune.errors import InputError
from forcetune.uncertainty.selection import (
    RIDGE,
    Pool,
    Strategy,
    choose,
    find_labelled,
    nearest_distances,
    share_out,
    standardize,
)

NOTHING = np.zeros((0, 3))


def cloud(n: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3))


def test_farthest_takes_planted_outliers_first() -> None:
    points = cloud()
    points[[7, 31]] = [[30.0, 0, 0], [0, -25.0, 0]]
    chosen = choose(Pool(points, ["X"] * 60), cloud(10, seed=1), 5)
    assert [one.index for one in chosen[:2]] == [7, 31]
    assert chosen[0].nearest_labelled == pytest.approx(nearest_distances(points[7:8], cloud(10, seed=1))[0])
    assert chosen[1].nearest_chosen == pytest.approx(np.hypot(30, 25))
    distances = [min(d for d in (one.nearest_labelled, one.nearest_chosen) if d is not None) for one in chosen]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("strategy", ["farthest", "determinant"])
def test_copies_are_taken_once(strategy: Strategy) -> None:
    points = np.repeat(cloud(8), 5, axis=0)
    points += 1e-9 * np.random.default_rng(2).normal(size=points.shape)
    chosen = choose(Pool(points, ["X"] * 40), NOTHING, 40, strategy=strategy, seed=3)
    assert len(chosen) == 8
    assert sorted(one.index // 5 for one in chosen) == list(range(8))
    others = [f"X{k % 5}" for k in range(40)]
    assert len(choose(Pool(points, others), NOTHING, 40, strategy=strategy)) == 40, "other compositions are no copies"


def test_uncertainty_counts() -> None:
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    points = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    uncertainty = np.ones(12)
    uncertainty[5] = 4.0
    center = np.zeros((1, 3))
    first = choose(Pool(points, ["X"] * 12, uncertainty), center, 1)[0]
    assert first.index == 5
    assert first.score == pytest.approx(4.0)


def test_determinant_is_the_growth_of_a_determinant() -> None:
    points, labelled = cloud(30), cloud(4, seed=5)
    chosen = choose(Pool(points, ["X"] * 30), labelled, 6, strategy="determinant")
    matrix = labelled.T @ labelled + RIDGE * float((points**2).mean()) * np.eye(3)
    taken: list[int] = []
    for one in chosen:
        growth = [np.linalg.det(matrix + np.outer(x, x)) / np.linalg.det(matrix) - 1 for x in points]
        best = max((k for k in range(30) if k not in taken), key=lambda k: growth[k])
        assert one.index == best
        assert one.score == pytest.approx(growth[best], rel=1e-6)
        matrix = matrix + np.outer(points[best], points[best])
        taken.append(best)


@pytest.mark.parametrize("strategy", ["farthest", "determinant"])
def test_elements_that_nothing_labelled_has_come_first(strategy: Strategy) -> None:
    random = np.random.default_rng(5)
    descriptors = random.normal(size=(60, 4))
    new = np.zeros((60, 2), dtype=bool)
    new[7, 0], new[9, 0], new[9, 1], new[30, 1] = True, True, True, True
    descriptors[[7, 9, 30]] *= 0.01  # nothing else speaks for them
    pool = Pool(descriptors, ["X"] * 60, new_elements=new)
    labelled = random.normal(size=(5, 4))
    choices = choose(pool, labelled, 6, strategy=strategy)
    assert set(choices[0].brings) | set(choices[1].brings) == {0, 1}
    assert all(not choice.brings for choice in choices[2:])
    assert {choice.index for choice in choices[2:]}.isdisjoint({7, 9, 30})
    plain = choose(Pool(descriptors, ["X"] * 60), labelled, 6, strategy=strategy)
    assert {choice.index for choice in plain}.isdisjoint({7, 9, 30})


def test_the_seed_decides_and_nothing_else() -> None:
    pool = Pool(cloud(40), ["X"] * 40)
    for strategy in ("farthest", "random"):
        first, again, other = (
            [one.index for one in choose(pool, NOTHING, 10, strategy=strategy, seed=seed)] for seed in (1, 1, 2)
        )
        assert first == again
        assert first != other
        assert len(set(first)) == 10


def test_quotas() -> None:
    formulas = ["A"] * 60 + ["B"] * 30 + ["C"] * 10
    sizes = Counter(formulas)
    assert share_out(10, sizes, "proportional") == {"A": 6, "B": 3, "C": 1}
    assert share_out(40, sizes, "equal") == {"A": 15, "B": 15, "C": 10}, "C has no more than 10"
    assert share_out(11, {"A": 58, "B": 42}, "proportional") == {"A": 6, "B": 5}, "6.38 and 4.62"
    assert share_out(8, {"A": 1, "B": 2, "C": 9, "D": 9}, "equal") == {"A": 1, "B": 2, "C": 3, "D": 2}
    assert share_out(200, sizes, "proportional") == dict(sizes)
    assert share_out(3, sizes, "equal") == {"A": 1, "B": 1, "C": 1}
    assert share_out(10, sizes, "A=3, C=7") == {"A": 3, "C": 7}
    assert share_out(10, sizes, None) is None
    for wrong, message in (
        ("A=3", "add up to 3"),
        ("D=10", "no structure of composition D"),
        ("half", "write prop"),
        ("A=1²", "write prop"),
    ):
        with pytest.raises(InputError, match=message):
            share_out(10, sizes, wrong)
    with pytest.raises(InputError, match="10 structures of composition C"):
        share_out(20, sizes, "A=9,C=11")
    chosen = choose(Pool(cloud(100), formulas), NOTHING, 10, quota=share_out(10, sizes, "A=3,C=7"))
    assert Counter(formulas[one.index] for one in chosen) == {"A": 3, "C": 7}


def test_labelled_structures_are_known_by_descriptor_and_composition() -> None:
    points, labelled = standardize(cloud(20), np.concatenate([cloud(20)[[4, 9]], cloud(3, seed=8)]))
    pool = Pool(points, ["X"] * 20)
    assert np.flatnonzero(find_labelled(pool, labelled, ["X"] * 5)).tolist() == [4, 9]
    assert np.flatnonzero(find_labelled(pool, labelled, ["X", "Y", "X", "X", "X"])).tolist() == [4]
    assert not find_labelled(pool, np.zeros((0, 3)), []).any()


def test_columns_are_standardised_and_constant_ones_do_not_count() -> None:
    values = np.concatenate([1e3 * cloud(500), np.full((500, 1), 7.0)], axis=1)
    points, _ = standardize(values, np.zeros((0, 4)))
    assert np.allclose(points[:, 3], 0)
    np.testing.assert_allclose((points**2).sum(axis=1).mean(), 1.0)
