"""Which structures to label next, by vectors that describe them: far from what is known, and from each other.

Nothing here knows structures: only arrays, so that the pool itself need not be in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray

Strategy = Literal["farthest", "determinant", "random"]
STRATEGIES: tuple[Strategy, ...] = ("farthest", "determinant", "random")
SAME = 1e-5
"""Distance of standardised descriptors below which two structures of one composition are the same."""
RIDGE = 1e-3
"""Of the determinant, in units of the mean square of a standardised descriptor."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen structure.

    Attributes:
        index: in the pool.
        score: why it was taken and no other, as the strategy measures.
        nearest_labelled: distance to the nearest labelled structure; None where there is none.
        nearest_chosen: distance to the nearest chosen before it; None for the first.
        brings: elements that nothing labelled or chosen before had, as columns of :attr:`Pool.new_elements`.
    """

    index: int
    score: float
    nearest_labelled: float | None
    nearest_chosen: float | None
    brings: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Structures to choose from.

    Attributes:
        descriptors: (structures, n), any units.
        compositions: formula of each.
        uncertainty: (structures,) positive; None counts all alike.
        new_elements: (structures, elements) whether each has an element that no labelled structure has; None for no
            such elements.
    """

    descriptors: FloatArray
    compositions: Sequence[str]
    uncertainty: FloatArray | None = None
    new_elements: np.ndarray | None = None


def standardize(pool: FloatArray, labelled: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Both in units of the spread of every column over all; columns that do not vary are 0.

    Distances are divided by √(columns that vary), so that two random structures are about 1.4 apart.
    """
    together = np.concatenate([pool, labelled])
    mean, spread = together.mean(axis=0), together.std(axis=0)
    varies = spread > 1e-9 * np.abs(together).max(axis=0, initial=1e-30)
    factor = np.where(varies, 1 / np.where(varies, spread, 1.0), 0.0) / np.sqrt(max(1, int(varies.sum())))
    return (pool - mean) * factor, (labelled - mean) * factor


def nearest_distances(points: FloatArray, others: FloatArray, block: int = 256) -> FloatArray:
    """(points,) distance to the nearest of others; infinite where there is none."""
    squared = np.full(len(points), np.inf)
    for start in range(0, len(others), block):
        part = others[start : start + block]
        pairs = (points**2).sum(1)[:, None] + (part**2).sum(1)[None] - 2 * points @ part.T
        np.minimum(squared, pairs.min(axis=1), out=squared)
    # differences of large numbers, where it matters whether two are the same
    close = np.flatnonzero(squared < 1e-6)
    for index in close:
        squared[index] = ((others - points[index]) ** 2).sum(axis=1).min()
    return np.sqrt(squared.clip(min=0))


def find_labelled(pool: Pool, labelled: FloatArray, compositions: Sequence[str]) -> np.ndarray:
    """(structures,) whether each is one of the labelled ones, whatever its orientation and order of atoms.

    Args:
        pool: standardised.
        labelled: (frames, n) standardised.
        compositions: of the labelled ones.
    """
    same = np.zeros(len(pool.descriptors), dtype=bool)
    ours, theirs = np.array(pool.compositions), np.array(compositions)
    for formula in set(compositions) & set(pool.compositions):
        members = np.flatnonzero(ours == formula)
        same[members] = nearest_distances(pool.descriptors[members], labelled[theirs == formula]) < SAME
    return same


def share_out(n: int, sizes: Mapping[str, int], quota: str | None) -> dict[str, int] | None:
    """How many structures of each composition may be chosen; None for any number.

    Args:
        n: structures to choose.
        sizes: of the pool by composition.
        quota: ``proportional`` (largest remainders), ``equal``, counts such as ``C2H6O=20,H2O=10``, or None.

    Raises:
        InputError: as :func:`parse_quota`, a composition that the pool lacks, or more of one than it has.
    """
    counts = parse_quota(n, quota)
    if quota is None:
        return None
    if counts is None:
        return _apportion(n, sizes, sizes if quota == "proportional" else dict.fromkeys(sizes, 1))
    for formula, count in counts.items():
        if formula not in sizes:
            known = ", ".join(sorted(sizes)[:8])
            raise InputError(f"--quota {quota}: the pool has no structure of composition {formula} (it has {known}).")
        if count > sizes[formula]:
            raise InputError(
                f"--quota {quota}: the pool has {sizes[formula]} structures of composition {formula} that are not "
                "labelled already; ask for no more."
            )
    return counts


def parse_quota(n: int, quota: str | None) -> dict[str, int] | None:
    """The counts of a quota that names them; None for ``proportional``, ``equal`` and None.

    Raises:
        InputError: it is none of these, or the counts do not add up to n.
    """
    if quota in (None, "proportional", "equal"):
        return None
    counts: dict[str, int] = {}
    for part in quota.split(","):
        formula, _, number = (text.strip() for text in part.partition("="))
        if not formula or not (number.isascii() and number.isdecimal()) or formula in counts:
            raise InputError(f"--quota {quota}: write proportional, equal, or counts such as C2H6O=20,H2O=10.")
        counts[formula] = int(number)
    if sum(counts.values()) != n:
        raise InputError(f"--quota {quota}: the counts add up to {sum(counts.values())}, not to --n {n}.")
    return counts


def _apportion(n: int, sizes: Mapping[str, int], weights: Mapping[str, int]) -> dict[str, int]:
    """Largest remainders; groups whose share is above their size are taken whole, and the others share the rest."""
    left, open_groups, counts = min(n, sum(sizes.values())), set(sizes), {}
    total = sum(weights[formula] for formula in open_groups)
    while full := [formula for formula in open_groups if left * weights[formula] >= sizes[formula] * total]:
        counts |= {formula: sizes[formula] for formula in full}
        open_groups -= set(full)
        left = min(n, sum(sizes.values())) - sum(counts.values())
        total = sum(weights[formula] for formula in open_groups)
    remainders: dict[str, int] = {}
    for formula in open_groups:
        counts[formula], remainders[formula] = divmod(left * weights[formula], total)
    left -= sum(counts[formula] for formula in open_groups)
    for formula in sorted(open_groups, key=lambda name: (-remainders[name], name))[:left]:
        counts[formula] += 1
    return {formula: counts[formula] for formula in sizes}


def choose(
    pool: Pool,
    labelled: FloatArray,
    n: int,
    *,
    strategy: Strategy = "farthest",
    allowed: np.ndarray | None = None,
    quota: Mapping[str, int] | None = None,
    seed: int = 0,
    apart: float = 0.0,
) -> list[Choice]:
    """Greedy choice, one structure after the other.

    ``farthest``: the largest d · u, where d is the distance to the nearest labelled or chosen structure and u the
    uncertainty over its median (1 without one). The first of all, where nothing is labelled, is drawn by the seed among
    all (with the probability u). ``determinant``: the largest u² xᵀ (Σ u² x xᵀ + λ I)⁻¹ x over labelled and chosen x,
    which is the factor by which the determinant grows, less 1. Either takes structures first that have an element which
    nothing labelled or chosen has: without one such frame nothing is known of it. ``random``: any, by the seed.

    Args:
        pool: with standardised descriptors.
        labelled: (frames, n) standardised.
        n: structures to choose; fewer where no more are left that differ from the others.
        strategy: as above.
        allowed: (structures,) those that may be chosen; all if None.
        quota: how many of each composition.
        seed: as above.
        apart: least distance to all that is labelled or chosen.
    """
    open_ = np.ones(len(pool.descriptors), dtype=bool) if allowed is None else allowed.copy()
    left = None if quota is None else dict(quota)
    formulas = np.array(pool.compositions)
    if left is not None:
        open_ &= np.isin(formulas, [formula for formula, count in left.items() if count > 0])
    weights = _weights(pool, open_)
    random = np.random.default_rng(seed)
    to_labelled = nearest_distances(pool.descriptors, labelled)
    open_ &= to_labelled >= apart
    to_chosen = np.full(len(open_), np.inf)
    volume = _Volume(pool.descriptors * weights[:, None], labelled) if strategy == "determinant" else None
    missing = np.zeros((len(open_), 0), dtype=bool) if pool.new_elements is None else pool.new_elements.copy()
    chosen: list[Choice] = []
    while len(chosen) < n and open_.any():
        distance = np.minimum(to_labelled, to_chosen)
        first = open_ & missing.any(axis=1)
        candidates = first if strategy != "random" and first.any() else open_
        if strategy == "random" or (strategy == "farthest" and np.isinf(distance[candidates]).all()):
            shares = np.where(candidates, weights if strategy == "farthest" else 1.0, 0.0)
            index = int(random.choice(len(open_), p=shares / shares.sum()))
            score = float(weights[index])
        else:
            scores = distance * weights if volume is None else volume.gains
            index = int(np.argmax(np.where(candidates, scores, -np.inf)))
            score = float(scores[index])
        brings = tuple(np.flatnonzero(missing[index]).tolist())
        missing[:, brings] = False
        chosen.append(Choice(index, score, _finite(to_labelled[index]), _finite(to_chosen[index]), brings))
        to_this = nearest_distances(pool.descriptors, pool.descriptors[index : index + 1])
        np.minimum(to_chosen, to_this, out=to_chosen)
        open_[index] = False
        open_ &= to_this >= apart
        if strategy != "random":
            # copies of what was chosen, which say nothing new
            open_ &= ~((to_this < SAME) & (formulas == formulas[index]))
        if volume is not None:
            volume.add(index)
        if left is not None:
            left[str(formulas[index])] -= 1
            if not left[str(formulas[index])]:
                open_ &= formulas != formulas[index]
    return chosen


def _weights(pool: Pool, open_: np.ndarray) -> FloatArray:
    """Uncertainties over their median; 1 without one."""
    if pool.uncertainty is None or not open_.any():
        return np.ones(len(pool.descriptors))
    median = float(np.median(pool.uncertainty[open_]))
    return pool.uncertainty / median if median > 0 else np.ones(len(pool.descriptors))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


class _Volume:
    """xᵀ A⁻¹ x for all x of a pool, where A grows by what is chosen.

    Attributes:
        gains: (structures,).
    """

    def __init__(self, pool: FloatArray, labelled: FloatArray) -> None:
        self.pool = pool
        size = pool.shape[1]
        unit = float((pool**2).mean()) or 1.0
        self.inverse = np.linalg.inv(labelled.T @ labelled + RIDGE * unit * np.eye(size))
        self.gains = ((pool @ self.inverse) * pool).sum(axis=1)

    def add(self, index: int) -> None:
        """Rank-one update (Sherman and Morrison)."""
        row = self.inverse @ self.pool[index]
        factor = 1 + float(self.pool[index] @ row)
        self.inverse -= np.outer(row, row) / factor
        self.gains -= (self.pool @ row) ** 2 / factor
