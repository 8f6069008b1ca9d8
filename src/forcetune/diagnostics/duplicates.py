"""Frames that are there twice: within training data, and between training and other data.

Two frames are compared by their interatomic distances, so that rotation, translation, reflection and the order of
atoms make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.spatial import KDTree

from forcetune.diagnostics.finding import Finding, Severity, in_frames
from forcetune.diagnostics.shape import REACH, Shape, by_composition, sorted_distances
from forcetune.frames.frame import Frame

SAME = 2e-4
"""Å; distances that agree to this are those of one structure, written with a few decimals."""
NEAR = 0.02
"""Å; distances that all agree to this are those of neighbouring steps of a trajectory."""
NEIGHBOURS = 4
RADIUS = 0.2
"""How near descriptors of nearly equal structures are: a change of every distance by :data:`NEAR` moves them less."""
FEW = 0.02
"""The share of frames that may nearly repeat others by chance."""
DIFFERENT_ENERGY = 0.01
"""eV; two calculations of one structure that differ by more are a contradiction."""

SAME_SPINS = 0.02
"""Products of spins, in their own unit, that agree to this belong to one magnetic state."""

Pair = tuple[int, int, float]


def check_duplicates(frames: Sequence[Frame], shapes: Sequence[Shape | None], *, trained_on: bool) -> list[Finding]:
    """Frames of one set that are there twice, nearly twice, or twice with different energies.

    Args:
        frames, shapes: the set.
        trained_on: whether copies do harm; among test frames they are a note only.
    """
    pairs = list(_pairs(frames, shapes, frames, shapes))
    same = sorted({max(i, j) for i, j, apart in pairs if apart < SAME})
    near = sorted({max(i, j) for i, j, apart in pairs if apart >= SAME} - set(same))
    torn = sorted({max(i, j) for i, j, apart in pairs if apart < SAME and _differ(frames[i], frames[j])})
    severity: Severity = "warning" if trained_on else "note"
    findings = in_frames(
        "duplicate-frames",
        severity,
        "The same structure as an earlier frame; remove one, or it counts twice and may stand on both sides of a "
        "split.",
        [frames[k] for k in same],
    )
    findings += in_frames(
        "near-duplicate-frames",
        severity if len(near) > FEW * len(frames) else "note",
        f"All distances agree with those of an earlier frame to {NEAR:g} Å, as in neighbouring steps of a trajectory; "
        "take every n-th step, because a random split of such frames makes validation errors too small.",
        [frames[k] for k in near],
    )
    findings += in_frames(
        "duplicate-labels-differ",
        "warning",
        f"The same structure as an earlier frame, but its energy differs by more than {1e3 * DIFFERENT_ENERGY:g} meV; "
        "look for another electronic state or other settings, and keep one.",
        [frames[k] for k in torn],
    )
    return findings


def check_overlap(
    train: Sequence[Frame],
    train_shapes: Sequence[Shape | None],
    other: Sequence[Frame],
    other_shapes: Sequence[Shape | None],
    name: str,
) -> list[Finding]:
    """Frames of another set that stand in the training set, too.

    Args:
        train, train_shapes: the training set.
        other, other_shapes: validation or test frames.
        name: of the other set.
    """
    pairs = list(_pairs(train, train_shapes, other, other_shapes))
    same = {j for _, j, apart in pairs if apart < SAME}
    near = {j for _, j, apart in pairs} - same
    kind = "valid" if name.startswith("valid") else "test"
    findings = in_frames(
        f"{kind}-in-train",
        "warning",
        f"This {name} frame is also a training frame; its error says nothing about new structures, remove it from one "
        "side.",
        [other[k] for k in sorted(same)],
    )
    findings += in_frames(
        f"{kind}-near-train",
        "warning",
        f"This {name} frame agrees with a training frame in all distances to {NEAR:g} Å; its error is too small a "
        "measure for new structures.",
        [other[k] for k in sorted(near)],
    )
    return findings


def _pairs(
    first: Sequence[Frame],
    first_shapes: Sequence[Shape | None],
    second: Sequence[Frame],
    second_shapes: Sequence[Shape | None],
) -> Iterator[Pair]:
    """Pairs of frames (index in each set, largest difference of distances in Å) that are equal or nearly so."""
    within = first is second
    groups, others = by_composition(first), by_composition(second)
    for composition, ours in groups.items():
        kinds: dict[int, tuple[list[int], list[int]]] = {}
        for side, (members, shapes) in enumerate(((ours, first_shapes), (others.get(composition, []), second_shapes))):
            for index in members:
                shape = shapes[index]
                if shape is not None and len(shape.descriptor):  # atoms without neighbours have nothing to compare
                    kinds.setdefault(len(shape.descriptor), ([], []))[side].append(index)
        for left, right in kinds.values():
            if left and right:
                yield from _near(first, first_shapes, left, second, second_shapes, right, within)


def _near(
    first: Sequence[Frame],
    first_shapes: Sequence[Shape | None],
    left: list[int],
    second: Sequence[Frame],
    second_shapes: Sequence[Shape | None],
    right: list[int],
    within: bool,
) -> Iterator[Pair]:
    def table(shapes: Sequence[Shape | None], members: list[int]) -> np.ndarray:
        return np.stack([shape.descriptor for k in members if (shape := shapes[k]) is not None])

    count = min(NEIGHBOURS + within, len(left))
    tree = KDTree(table(first_shapes, left))
    distances, places = tree.query(table(second_shapes, right), k=count, distance_upper_bound=RADIUS)
    distances, places = distances.reshape(len(right), count), places.reshape(len(right), count)
    for row, k in enumerate(right):
        for distance, place in zip(distances[row], places[row], strict=True):
            if np.isinf(distance) or (within and left[place] >= k):
                continue
            apart = _difference(first[left[place]], second[k])
            if apart < NEAR and _same_spins(first[left[place]], second[k]):
                yield left[place], k, apart


def _difference(one: Frame, other: Frame) -> float:
    """Largest difference of sorted distances, Å."""
    ours, theirs = sorted_distances(one), sorted_distances(other)
    largest = 0.0
    for kind in ours.keys() | theirs.keys():
        a, b = ours.get(kind, np.array([])), theirs.get(kind, np.array([]))
        shared = min(len(a), len(b))
        # a pair at the edge of the reach may be in one list only
        if (np.concatenate((a[shared:], b[shared:])) < REACH - 2 * NEAR).any():
            return np.inf
        if shared:
            largest = max(largest, float(np.abs(a[:shared] - b[:shared]).max()))
    return largest


def _same_spins(one: Frame, other: Frame) -> bool:
    """Whether the magnetic states agree, as far as their products tell; states of one structure are no copies."""
    if one.spins is None or other.spins is None:
        return True
    products = [np.sort((frame.spins @ frame.spins.T).ravel()) for frame in (one, other) if frame.spins is not None]
    return float(np.abs(products[0] - products[1]).max()) < SAME_SPINS


def _differ(one: Frame, other: Frame) -> bool:
    if one.energy is None or other.energy is None:
        return False
    return abs(one.energy - other.energy) > DIFFERENT_ENERGY
