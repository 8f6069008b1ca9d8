"""Equivariant polynomials written as bilinear forms of few monomials.

The symmetric contraction of MACE evaluates, per atom n and channel c, polynomials of the M components of x(n, c):

    out[k] = Σ_ν Σ_η w_ν[η] Σ_{i1…iν} U_ν[k, i1…iν, η] x[i1] … x[iν]                    (MACE, eq. 10 and 11)

With m(x) = (1, x[i], x[i] x[j]) this is out[k] = Σ_{r, q} A[k, r, q] m_r m_q for every order up to 4. A monomial can
be split into a row r and a column q in several ways; here columns are those of even parity, and the row is what is
left, so that only few rows and columns are needed. The coefficients A are linear in the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
class Output:
    """One equivariant output of the polynomial.

    Attributes:
        dim: components, 2 l + 1.
        rows: index into the monomials of each row.
        basis: (couplings, dim · rows · columns), A for each coupling; couplings of all orders in a row, the first
            order first.
    """

    dim: int
    rows: tuple[int, ...]
    basis: Tensor


@dataclass(frozen=True, slots=True)
class BilinearForm:
    """The structure of equivariant polynomials that share their input.

    Monomials are laid out as components without use as a column, then the columns: 1, further components, products.

    Attributes:
        order: permutation of the components; components of even parity are put first.
        linear: place of each (permuted) component among the monomials, −1 where it does not occur.
        one: place of the constant.
        runs: products of two components.
        size: number of monomials.
        columns: first monomial that is a column.
        outputs: one for each irrep.
    """

    order: tuple[int, ...]
    linear: tuple[int, ...]
    one: int
    runs: tuple[Run, ...]
    size: int
    columns: int
    outputs: tuple[Output, ...]

    @property
    def n_columns(self) -> int:
        return self.size - self.columns


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


def bilinear_form(couplings: Sequence[Sequence[Tensor]], parities: Sequence[int]) -> BilinearForm:
    """Arrange polynomials for evaluation.

    Args:
        couplings: for each output the tensors U_1, U_2, …, of shape (dim, M, …, M, couplings), where the first
            dimension may be missing for dim = 1.
        parities: (M,) ±1 for each component; outputs must have a definite parity under them, or all must be 1.

    Raises:
        ValueError: an order higher than :data:`HIGHEST_ORDER`.
    """
    if max(len(orders) for orders in couplings) > HIGHEST_ORDER:
        raise ValueError(f"contractions of order higher than {HIGHEST_ORDER} are not arranged")
    components = len(parities)
    order = sorted(range(components), key=lambda i: (-parities[i], i))
    position = np.argsort(order)
    parity = [parities[i] for i in order]
    terms = [[_symmetrised(u, nu + 1, position) for nu, u in enumerate(orders)] for orders in couplings]
    splits = {key: _split(key, parity) for orders in terms for table in orders for key in table}
    columns = {column for _, column in splits.values()} | {()}
    rows = {row for row, _ in splits.values()}
    singles = sorted(key for key in (rows | columns) if len(key) == 1)
    pairs = sorted(key for key in (rows | columns) if len(key) == 2)
    # pairs used as rows only would be columns of zeros: rare (order 4), and not worth a second list
    head = [key for key in singles if key not in columns]
    layout: list[Monomial] = [*head, (), *(key for key in singles if key in columns), *pairs]
    place = {key: index for index, key in enumerate(layout)}
    outputs = tuple(
        _output(tables, orders, splits, place, len(head)) for tables, orders in zip(terms, couplings, strict=True)
    )
    return BilinearForm(
        order=tuple(order),
        linear=tuple(place.get((i,), -1) for i in range(components)),
        one=place[()],
        runs=_runs(pairs, place),
        size=len(layout),
        columns=len(head),
        outputs=outputs,
    )


def _output(
    tables: Sequence[dict[Monomial, np.ndarray]],
    orders: Sequence[Tensor],
    splits: dict[Monomial, tuple[Monomial, Monomial]],
    place: dict[Monomial, int],
    head: int,
) -> Output:
    rows = sorted({place[splits[key][0]] for table in tables for key in table})
    row_of = {monomial: index for index, monomial in enumerate(rows)}
    n_columns = len(place) - head
    components = orders[0].shape[-2]
    dim = orders[0].numel() // (components * orders[0].shape[-1])
    basis = np.zeros((sum(u.shape[-1] for u in orders), dim, len(rows), n_columns))
    start = 0
    for table, coupling in zip(tables, orders, strict=True):
        stop = start + coupling.shape[-1]
        for key, value in table.items():
            row, column = splits[key]
            basis[start:stop, :, row_of[place[row]], place[column] - head] += value.T
        start = stop
    return Output(dim, tuple(rows), torch.from_numpy(basis.reshape(len(basis), -1)))


def _runs(pairs: Sequence[Monomial], place: dict[Monomial, int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for first, second in pairs:
        last = runs[-1] if runs else None
        if last is not None and last.first == first and last.stop == second:
            runs[-1] = Run(first, last.start, second + 1, last.offset)
        else:
            runs.append(Run(first, second, second + 1, place[(first, second)]))
    return tuple(runs)
