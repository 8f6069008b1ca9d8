"""Triton kernels of the symmetric contraction: sparse polynomials of the components of an atom's features.

A term e is a coefficient times two monomials of two factors each, of which some may be the constant 1:

    out[k] = Σ_{rows of k} y[r₀] y[r₁] Σ_{e in row} a[e] y[q₀] y[q₁],    y = (x₀, …, x_{M−1}, 1),  M + 1 = ``size``.

Derivatives are sums over the terms that hold a component, with the three other factors, and derivatives along a
direction h of x those of products; 1 changes by 0. A program treats some atoms and
channels; no two programs add to one number. Imported where Triton is installed only.
"""

# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _factor(y, row, index, channels: tl.constexpr, inside):
    """y[index] of atoms whose factors begin at ``row``."""
    return tl.load(y + row + index * channels, mask=inside, other=0.0)


@triton.jit
def _product(y, h, row, first, second, channels: tl.constexpr, inside, moved: tl.constexpr):
    """A monomial y[first] y[second] and, with ``moved``, its derivative along h."""
    one, two = _factor(y, row, first, channels, inside), _factor(y, row, second, channels, inside)
    change = one
    if moved:
        change = _factor(h, row, first, channels, inside) * two + one * _factor(h, row, second, channels, inside)
    return one * two, change


@triton.jit
def _place(n_atoms, channels: tl.constexpr, atoms: tl.constexpr, block: tl.constexpr):
    """Atoms and channels of a program, and which of them there are."""
    atom = (tl.program_id(0).to(tl.int64) * atoms + tl.arange(0, atoms))[:, None]
    c = (tl.program_id(2) * block + tl.arange(0, block))[None, :]
    return atom, c, (atom < n_atoms) & (c < channels)


@triton.jit(do_not_specialize=["n_atoms"])
def value(
    n_atoms,
    kinds,
    first_row,
    rows,
    columns,
    coefficients,
    y,
    h,
    out,
    terms: tl.constexpr,
    size: tl.constexpr,
    channels: tl.constexpr,
    moved: tl.constexpr,
    ATOMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The polynomial of a component of the outputs, or its derivative along h."""
    atom, c, inside = _place(n_atoms, channels, ATOMS, BLOCK)
    k = tl.program_id(1)
    row = atom * (size * channels) + c
    kind = tl.load(kinds + atom, mask=atom < n_atoms, other=0)
    a = coefficients + kind * (terms * channels) + c
    total = tl.zeros((ATOMS, BLOCK), y.dtype.element_ty)
    for number in range(tl.load(first_row + k), tl.load(first_row + k + 1)):
        here = rows + 4 * number
        left, left_change = _product(y, h, row, tl.load(here), tl.load(here + 1), channels, inside, moved)
        inner = tl.zeros((ATOMS, BLOCK), y.dtype.element_ty)
        change = tl.zeros((ATOMS, BLOCK), y.dtype.element_ty)
        for term in range(tl.load(here + 2), tl.load(here + 3)):
            one, two = tl.load(columns + 2 * term), tl.load(columns + 2 * term + 1)
            right, right_change = _product(y, h, row, one, two, channels, inside, moved)
            weight = tl.load(a + term * channels, mask=inside, other=0.0)
            inner += weight * right
            if moved:
                change += weight * right_change
        if moved:
            total += left_change * inner + left * change
        else:
            total += left * inner
    tl.store(out + (atom * tl.num_programs(1) + k) * channels + c, total, mask=inside)


@triton.jit(do_not_specialize=["n_atoms"])
def to_features(
    n_atoms,
    kinds,
    first_use,
    uses,
    coefficients,
    y,
    h,
    g,
    result,
    terms: tl.constexpr,
    outputs: tl.constexpr,
    size: tl.constexpr,
    channels: tl.constexpr,
    moved: tl.constexpr,
    ATOMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of Σ g out by a component of x, or its derivative along h."""
    atom, c, inside = _place(n_atoms, channels, ATOMS, BLOCK)
    component = tl.program_id(1)
    row = atom * (size * channels) + c
    outer = g + atom * (outputs * channels) + c
    kind = tl.load(kinds + atom, mask=atom < n_atoms, other=0)
    a = coefficients + kind * (terms * channels) + c
    total = tl.zeros((ATOMS, BLOCK), y.dtype.element_ty)
    for number in range(tl.load(first_use + component), tl.load(first_use + component + 1)):
        use = uses + 6 * number
        term, k, times = tl.load(use), tl.load(use + 1), tl.load(use + 2)
        pair, change = _product(y, h, row, tl.load(use + 3), tl.load(use + 4), channels, inside, moved)
        third = _factor(y, row, tl.load(use + 5), channels, inside)
        slope = pair * third
        if moved:
            slope = change * third + pair * _factor(h, row, tl.load(use + 5), channels, inside)
        weight = tl.load(a + term * channels, mask=inside, other=0.0)
        total += times.to(y.dtype.element_ty) * weight * tl.load(outer + k * channels, mask=inside, other=0.0) * slope
    tl.store(result + (atom * (size - 1) + component) * channels + c, total, mask=inside)


@triton.jit
def to_coefficients(
    first_atom,
    entries,
    y,
    h,
    g,
    result,
    terms: tl.constexpr,
    outputs: tl.constexpr,
    size: tl.constexpr,
    channels: tl.constexpr,
    moved: tl.constexpr,
    ATOMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of Σ g out by the coefficient of a term for a species, or its derivative along h."""
    term, kind = tl.program_id(0), tl.program_id(1)
    c = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    here = entries + 5 * term
    k = tl.load(here)
    last = tl.load(first_atom + kind + 1)
    total = tl.zeros((ATOMS, BLOCK), y.dtype.element_ty)
    for start in range(tl.load(first_atom + kind), last, ATOMS):
        atom = (start + tl.arange(0, ATOMS))[:, None]
        inside = (atom < last) & (c < channels)
        row = atom * (size * channels) + c
        left, left_change = _product(y, h, row, tl.load(here + 1), tl.load(here + 2), channels, inside, moved)
        right, right_change = _product(y, h, row, tl.load(here + 3), tl.load(here + 4), channels, inside, moved)
        outer = tl.load(g + (atom * outputs + k) * channels + c, mask=inside, other=0.0)
        if moved:
            total += outer * (left_change * right + left * right_change)
        else:
            total += outer * left * right
    place = result + (kind.to(tl.int64) * terms + term) * channels + c
    tl.store(place, tl.sum(total, axis=0)[None, :], mask=c < channels)
