"""Equivariant polynomials written as bilinear forms of few monomials.

The symmetric contraction of MACE evaluates, per atom n and channel c, polynomials of the M components of x(n, c):

    out[k] = Σ_ν Σ_η w_ν[η] Σ_{i1…iν} U_ν[k, i1…iν, η] x[i1] … x[iν]                    (MACE, eq. 10 and 11)

With m(x) = (1, x[i], x[i] x[j]) this is out[k] = Σ_{r, q} A[k, r, q] m_r m_q for every order up to 4. A monomial can
be split into a row r and a column q in several ways; here columns are those of even parity, and the row is what is
left, so that only few rows and columns are needed. The coefficients A are linear in the weights.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forcetune.kernels.constants import Constant

HIGHEST_ORDER = 4
_ZERO = 1e-12

Monomial = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """Products x[first] x[j] for j in start … stop, stored from ``offset`` on."""

    first: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Columns that behave alike under reflections of the axes, and the rows that they can meet.

    Attributes:
        start, stop: columns among the monomials.
        rows: for each row its monomial.
        targets: for each row the component of the output it adds to, outputs counted one after another.
        basis: for each output (couplings, rows of this output · columns): A for each coupling; couplings of all
            orders in a row, the first order first; rows of the first output come first.
    """

    start: int
    stop: int
    rows: tuple[int, ...]
    targets: tuple[int, ...]
    basis: tuple[Constant, ...]


@dataclass(frozen=True, slots=True)
class BilinearForm:
    """The structure of equivariant polynomials that share their input.

    Monomials are laid out as components without use as a column, then the columns by segment.

    Attributes:
        order: permutation of the components; components of even parity are put first, and those that change alike
            under reflections side by side.
        linear: place of each (permuted) component among the monomials, −1 where it does not occur.
        one: place of the constant.
        runs: products of two components.
        size: number of monomials.
        dims: components of each output.
        segments: all columns.
    """

    order: tuple[int, ...]
    linear: tuple[int, ...]
    one: int
    runs: tuple[Run, ...]
    size: int
    dims: tuple[int, ...]
    segments: tuple[Segment, ...]


def _symmetrised(coupling: Tensor, order: int, position: np.ndarray) -> dict[Monomial, np.ndarray]:
    """Coefficients (dim, couplings) of every monomial, permutations of its factors summed."""
    components = coupling.shape[-2]
    array = coupling.detach().double().cpu().numpy().reshape(-1, components**order, coupling.shape[-1])
    indices = np.stack(np.unravel_index(np.arange(components**order), (components,) * order), axis=1)
    indices = np.sort(position[indices], axis=1)
    unique, inverse = np.unique(indices, axis=0, return_inverse=True)
    summed = np.zeros((len(unique), array.shape[0], array.shape[2]))
    np.add.at(summed, inverse.reshape(-1), array.transpose(1, 0, 2))
    scale = max(np.abs(summed).max(initial=0.0), _ZERO)
    return {
        tuple(int(i) for i in key): value
        for key, value in zip(unique, summed, strict=True)
        if np.abs(value).max() > _ZERO * scale
    }


def _split(monomial: Monomial, parity: Sequence[int]) -> tuple[Monomial, Monomial]:
    """Row and column: the column is even, the row as short as it can be."""
    choices = []
    for size in range(min(2, len(monomial)), -1, -1):
        for places in itertools.combinations(range(len(monomial)), size):
            column = tuple(monomial[p] for p in places)
            row = tuple(monomial[p] for p in range(len(monomial)) if p not in places)
            even = np.prod([parity[i] for i in column], initial=1) > 0
            if even and len(row) <= 2:
                choices.append((row, column))
    return min(choices, key=lambda choice: (len(choice[0]), choice[0]))


def bilinear_form(couplings: Sequence[Sequence[Tensor]], labels: Sequence[int]) -> BilinearForm:
    """Arrange polynomials for evaluation.

    Args:
        couplings: for each output the tensors U_1, U_2, …, of shape (dim, M, …, M, couplings), where the first
            dimension may be missing for dim = 1.
        labels: (M,) for each component a bit for each reflection of an axis under which it changes sign. Components
            of even parity have an even number of bits. All 0 is right too, but slower.

    Raises:
        ValueError: an order higher than :data:`HIGHEST_ORDER`.
    """
    if max(len(orders) for orders in couplings) > HIGHEST_ORDER:
        raise ValueError(f"contractions of order higher than {HIGHEST_ORDER} are not arranged")
    order = sorted(range(len(labels)), key=lambda i: (labels[i].bit_count() % 2, labels[i], i))
    position = np.argsort(order)
    label = [labels[i] for i in order]
    parity = [1 - 2 * (value.bit_count() % 2) for value in label]
    terms = [[_symmetrised(u, nu + 1, position) for nu, u in enumerate(orders)] for orders in couplings]
    splits = {key: _split(key, parity) for orders in terms for table in orders for key in table}
    columns = {column for _, column in splits.values()} | {()}
    # products used as rows only become columns of zeros: rare (order 4), and not worth a list of their own
    rows = {row for row, _ in splits.values()}
    columns |= {key for key in rows if len(key) == 2}
    head = sorted(rows - columns)
    kinds = {key: functools.reduce(operator.xor, (label[i] for i in key), 0) for key in columns}
    ordered = sorted(columns, key=lambda key: (kinds[key], len(key), key))
    place = {key: index for index, key in enumerate([*head, *ordered])}
    bounds = [
        (len(head) + start, len(head) + stop) for start, stop in _equal_neighbours([kinds[key] for key in ordered])
    ]
    dims = tuple(orders[0].numel() // (len(labels) * orders[0].shape[-1]) for orders in couplings)
    return BilinearForm(
        order=tuple(order),
        linear=tuple(place.get((i,), -1) for i in range(len(labels))),
        one=place[()],
        runs=_runs(sorted(key for key in columns if len(key) == 2), place),
        size=len(place),
        dims=dims,
        segments=tuple(_segment(start, stop, terms, couplings, dims, splits, place) for start, stop in bounds),
    )


def _equal_neighbours(values: Sequence[int]) -> list[tuple[int, int]]:
    changes = [i for i in range(1, len(values)) if values[i] != values[i - 1]]
    return list(itertools.pairwise([0, *changes, len(values)]))


def _segment(
    start: int,
    stop: int,
    terms: Sequence[Sequence[dict[Monomial, np.ndarray]]],
    couplings: Sequence[Sequence[Tensor]],
    dims: Sequence[int],
    splits: dict[Monomial, tuple[Monomial, Monomial]],
    place: dict[Monomial, int],
) -> Segment:
    rows: list[int] = []
    targets: list[int] = []
    basis: list[Constant] = []
    for index, (tables, orders) in enumerate(zip(terms, couplings, strict=True)):
        entries: dict[tuple[int, int], list[tuple[int, int, np.ndarray]]] = {}
        first = 0
        for table, coupling in zip(tables, orders, strict=True):
            for key, value in table.items():
                row, column = (place[part] for part in splits[key])
                if start <= column < stop:
                    for component in np.flatnonzero(np.abs(value).max(axis=1) > _ZERO):
                        row_terms = entries.setdefault((int(component), row), [])
                        row_terms.append((column - start, first, value[component]))
            first += coupling.shape[-1]
        matrix = np.zeros((first, len(entries), stop - start))
        for number, ((component, row), row_terms) in enumerate(sorted(entries.items())):
            rows.append(row)
            targets.append(sum(dims[:index]) + component)
            for column, offset, value in row_terms:
                matrix[offset : offset + len(value), number, column] += value
        basis.append(Constant(torch.from_numpy(matrix.reshape(first, len(entries) * (stop - start)))))
    return Segment(start, stop, tuple(rows), tuple(targets), tuple(basis))


def _runs(pairs: Sequence[Monomial], place: dict[Monomial, int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for first, second in pairs:
        last = runs[-1] if runs else None
        follows = last is not None and last.first == first and last.stop == second
        if follows and last is not None and place[(first, second)] == last.offset + last.stop - last.start:
            runs[-1] = Run(first, last.start, second + 1, last.offset)
        else:
            runs.append(Run(first, second, second + 1, place[(first, second)]))
    return tuple(runs)
