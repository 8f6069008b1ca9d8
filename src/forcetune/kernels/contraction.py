"""Evaluation of equivariant polynomials for atoms grouped by species, with first and second derivatives by hand.

For species s, channel c and atoms n of that species, out[k, c, n] = Σ_r m_r(x) T[k, r] with T = A[s, c] m_columns(x):
a batched matrix product over (s, c) for each segment of the columns, and a short sum. For m and A see
:mod:`forcetune.kernels.polynomial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forcetune.kernels.phase import Phase
from forcetune.kernels.polynomial import BilinearForm

PADDING = 16
"""Elements between one row of monomials and the next. Without them rows would be a multiple of 1024 bytes apart for
128 channels, and what a matrix product reads across the rows would compete for a few places of the cache."""


def arranged(blocks: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Features as :func:`polynomial` takes them.

    Args:
        blocks: (atoms, dim, channels) of each irrep.
        order: of the components, those of all blocks counted one after another.

    Returns:
        (components, channels, atoms). Differentiable twice.
    """
    dims = tuple(block.shape[1] for block in blocks)
    result: Tensor = _Arranged.apply(tuple(order), dims, *blocks)  # pyright: ignore[reportAssignmentType]
    return result


class _Arranged(torch.autograd.Function):
    """Components in order; PyTorch would differentiate every single one of them by itself."""

    @staticmethod
    def forward(ctx: Any, order: tuple[int, ...], dims: tuple[int, ...], *blocks: Tensor) -> Tensor:
        ctx.layout = (order, dims)
        rows = [row for block in blocks for row in block.permute(1, 2, 0).unbind(0)]
        return torch.stack([rows[component] for component in order])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, *_Separated.apply(*ctx.layout, grads[0]))  # pyright: ignore[reportGeneralTypeIssues]


class _Separated(torch.autograd.Function):
    """The way back: blocks from components."""

    @staticmethod
    def forward(ctx: Any, order: tuple[int, ...], dims: tuple[int, ...], x: Tensor) -> tuple[Tensor, ...]:
        ctx.layout = (order, dims)
        places = {component: place for place, component in enumerate(order)}
        rows = x.unbind(0)
        blocks, start = [], 0
        for dim in dims:
            own = [rows[places[component]] for component in range(start, start + dim)]
            blocks.append(torch.stack(own).permute(2, 0, 1))
            start += dim
        return tuple(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, _Arranged.apply(*ctx.layout, *grads)


def fold(form: BilinearForm, weights: Sequence[Tensor]) -> list[Tensor]:
    """Coefficients A: the coupling tensors contracted with the weights.

    Args:
        form: of the polynomials.
        weights: for each output (species, couplings of all orders from the first, channels).

    Returns:
        For each segment (species, channels, rows, columns).
    """
    species, _, channels = weights[0].shape
    flat = [weight.transpose(1, 2).reshape(species * channels, -1) for weight in weights]
    result = []
    for segment in form.segments:
        width = segment.stop - segment.start
        # outputs without a row here stay in: their weights get a gradient, if only of zeros
        parts = [
            (weight @ matrix).view(species, channels, matrix.shape[1] // width, width)
            for weight, matrix in (
                (weight, basis.like(weight)) for weight, basis in zip(flat, segment.basis, strict=True)
            )
        ]
        result.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
    return result


def polynomial(
    form: BilinearForm,
    x: Tensor,
    coefficients: Sequence[Tensor],
    counts: Sequence[int],
    *,
    phase: Phase | None = None,
    trains: bool = True,
) -> Tensor:
    """out[k, c, n] for every output of the form, one after another.

    Args:
        form: of the polynomials.
        x: (components, channels, atoms), components in the form's order, atoms grouped by species.
        coefficients: of each segment, as :func:`fold` returns them, for the species in the order of the groups.
        counts: atoms of each species; sums to the number of atoms.
        phase: which derivatives are wanted.
        trains: whether x depends on trainable weights.

    Returns:
        (Σ dims, channels, atoms). Differentiable twice.
    """
    result: Tensor = _Polynomial.apply(_Setting(form, tuple(counts), phase or Phase(), trains), x, *coefficients)  # pyright: ignore[reportAssignmentType]
    return result


@dataclass(frozen=True, slots=True)
class _Setting:
    form: BilinearForm
    counts: tuple[int, ...]
    phase: Phase
    trains: bool

    def wanted(self, needs: Sequence[bool]) -> tuple[bool, ...]:
        """Which gradients by x and the coefficients are asked for."""
        of_x = self.phase.wants(geometric=True, trains=self.trains)
        of_weights = self.phase.wants(geometric=False, trains=True)
        return (needs[0] and of_x, *(need and of_weights for need in needs[1:]))


class _Polynomial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: _Setting, x: Tensor, *coefficients: Tensor) -> Tensor:
        form, counts = setting.form, setting.counts
        monomials = _monomials(form, x)
        products = _products(form, coefficients, monomials, counts)
        ctx.setting = setting
        ctx.intermediates = (monomials, products)
        ctx.save_for_backward(x, *coefficients)
        return _combined(form, monomials, products)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *coefficients = ctx.saved_tensors
        needs = ctx.setting.wanted(ctx.needs_input_grad[1:])
        gradients = _PolynomialBackward.apply(
            ctx.setting, ctx.intermediates, needs, grads[0].contiguous(), x, *coefficients
        )
        return (None, *gradients)  # pyright: ignore[reportGeneralTypeIssues]


class _PolynomialBackward(torch.autograd.Function):
    """Gradients of Σ g out with respect to x and the coefficients."""

    @staticmethod
    def forward(
        ctx: Any,
        setting: _Setting,
        intermediates: tuple[Tensor, list[Tensor]],
        needs: tuple[bool, ...],
        g: Tensor,
        x: Tensor,
        *coefficients: Tensor,
    ) -> tuple[Tensor | None, ...]:
        form, counts = setting.form, setting.counts
        monomials, products = intermediates
        pulled, seeds = _transposed(form, g, monomials, products, coefficients, counts)
        ctx.setting = setting
        ctx.intermediates = (monomials, products, pulled, seeds)
        ctx.save_for_backward(g, x, *coefficients)
        ctx.set_materialize_grads(False)
        of_x = _pull(form, x, pulled) if needs[0] else None
        outer = [
            _outer(seed, monomials[segment.start : segment.stop], counts) if need else None
            for seed, segment, need in zip(seeds, form.segments, needs[1:], strict=True)
        ]
        return (of_x, *outer)

    @staticmethod
    def _twice(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, *coefficients = ctx.saved_tensors
        setting: _Setting = ctx.setting
        form, counts = setting.form, setting.counts
        needs = setting.wanted(ctx.needs_input_grad[4:])
        monomials, products, pulled, seeds = ctx.intermediates
        h, *of_coefficients = tangents
        if any(tangent is not None for tangent in of_coefficients):
            raise RuntimeError("gradients of gradients with respect to contraction weights are not provided")
        if h is None:
            return (None,) * (5 + len(coefficients))
        h = h.contiguous()
        moved = _tangent(form, x, h)
        moved_products = _products(form, coefficients, moved, counts)
        of_g = None
        if ctx.needs_input_grad[3]:
            of_g = _combined(form, moved, products) + _combined(form, monomials, moved_products)
        moved_pulled, moved_seeds = _transposed(form, g, moved, moved_products, coefficients, counts)
        of_x = None
        if needs[0]:
            of_x = _pull(form, x, moved_pulled)
            _pull_products(form, h, pulled, of_x)
        result: list[Tensor | None] = []
        for seed, moved_seed, segment, need in zip(seeds, moved_seeds, form.segments, needs[1:], strict=True):
            columns = slice(segment.start, segment.stop)
            pairs = ((moved_seed, monomials[columns]), (seed, moved[columns]))
            result.append(_outer(*pairs[0], counts) + _outer(*pairs[1], counts) if need else None)
        return (None, None, None, of_g, of_x, *result)

    backward: Any = staticmethod(once_differentiable(_twice))


def _rows(like: Tensor, count: int) -> Tensor:
    """Empty (count, channels, atoms)."""
    channels, atoms = like.shape[1:]
    size = channels * atoms
    return like.new_empty(count, size + PADDING)[:, :size].view(count, channels, atoms)


def _monomials(form: BilinearForm, x: Tensor) -> Tensor:
    """m(x), (monomials, channels, atoms)."""
    m = _rows(x, form.size)
    m[form.one] = 1
    _place_linear(form, x, m)
    rows = x.unbind(0)
    for run in form.runs:
        torch.mul(rows[run.first], x[run.start : run.stop], out=m[run.offset : run.offset + run.stop - run.start])
    return m


def _place_linear(form: BilinearForm, x: Tensor, m: Tensor) -> None:
    for start, stop, place in _linear_slices(form):
        m[place : place + stop - start] = x[start:stop]


def _linear_slices(form: BilinearForm) -> list[tuple[int, int, int]]:
    """Slices of components whose places among the monomials follow one another: start, stop, place."""
    slices: list[tuple[int, int, int]] = []
    for component, place in enumerate(form.linear):
        if place < 0:
            continue
        if slices and slices[-1][1] == component and slices[-1][2] + component - slices[-1][0] == place:
            slices[-1] = (slices[-1][0], component + 1, slices[-1][2])
        else:
            slices.append((component, component + 1, place))
    return slices


def _tangent(form: BilinearForm, x: Tensor, h: Tensor) -> Tensor:
    """The derivative of m(x) along h."""
    m = _rows(x, form.size)
    m[form.one] = 0
    _place_linear(form, h, m)
    rows, moved = x.unbind(0), h.unbind(0)
    for run in form.runs:
        target = m[run.offset : run.offset + run.stop - run.start]
        torch.mul(rows[run.first], h[run.start : run.stop], out=target)
        target.addcmul_(moved[run.first], x[run.start : run.stop])
    return m


def _pull(form: BilinearForm, x: Tensor, pulled: Tensor) -> Tensor:
    """Gradient with respect to x of Σ pulled m(x)."""
    result = torch.zeros_like(x)
    _pull_products(form, x, pulled, result)
    for start, stop, place in _linear_slices(form):
        result[start:stop] += pulled[place : place + stop - start]
    return result


def _pull_products(form: BilinearForm, x: Tensor, pulled: Tensor, result: Tensor) -> None:
    """Add the same without the monomials of the first order."""
    rows, parts, sums = x.unbind(0), pulled.unbind(0), result.unbind(0)
    for run in form.runs:
        # runs are short: row by row nothing has to be kept in between
        for place, second in enumerate(range(run.start, run.stop), run.offset):
            sums[run.first].addcmul_(parts[place], rows[second])
            sums[second].addcmul_(parts[place], rows[run.first])


def _products(
    form: BilinearForm, coefficients: Sequence[Tensor], monomials: Tensor, counts: tuple[int, ...]
) -> list[Tensor]:
    """T = A m for each segment: (channels, rows, atoms)."""
    result = []
    for segment, a in zip(form.segments, coefficients, strict=True):
        batched = monomials[segment.start : segment.stop].transpose(0, 1)
        parts = [
            torch.bmm(matrix, columns)
            for matrix, columns in zip(a.unbind(0), batched.split(counts, dim=2), strict=True)
        ]
        result.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))
    return result


def _combined(form: BilinearForm, monomials: Tensor, products: Sequence[Tensor]) -> Tensor:
    """Σ_r m_r T[k, r] of every output: (Σ dims, channels, atoms)."""
    result = monomials.new_zeros(sum(form.dims), *monomials.shape[1:])
    sums = result.unbind(0)
    for segment, product in zip(form.segments, products, strict=True):
        for part, row, target in zip(product.unbind(1), segment.rows, segment.targets, strict=True):
            sums[target].addcmul_(part, monomials[row])
    return result


def _transposed(
    form: BilinearForm,
    g: Tensor,
    monomials: Tensor,
    products: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    counts: tuple[int, ...],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of Σ g out with respect to the monomials and to the products T."""
    pulled = _rows(monomials, form.size)
    seeds = []
    outer = g.unbind(0)
    for segment, a in zip(form.segments, coefficients, strict=True):
        seed = _rows(monomials, len(segment.rows))
        for own, row, target in zip(seed.unbind(0), segment.rows, segment.targets, strict=True):
            torch.mul(outer[target], monomials[row], out=own)
        seed = seed.transpose(0, 1)
        seeds.append(seed)
        batched = pulled[segment.start : segment.stop].transpose(0, 1)
        for matrix, part, target in zip(
            a.unbind(0), seed.split(counts, dim=2), batched.split(counts, dim=2), strict=True
        ):
            target.copy_(torch.bmm(matrix.transpose(1, 2), part))
    pulled[: form.segments[0].start] = 0
    for segment, product in zip(form.segments, products, strict=True):
        for part, row, target in zip(product.unbind(1), segment.rows, segment.targets, strict=True):
            pulled[row].addcmul_(part, outer[target])
    return pulled, seeds


def _outer(seed: Tensor, columns: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Gradient of the coefficients of each species: (species, channels, rows, columns)."""
    batched = columns.permute(1, 2, 0)
    parts = [
        torch.bmm(left, right)
        for left, right in zip(seed.split(counts, dim=2), batched.split(counts, dim=1), strict=True)
    ]
    return torch.stack(parts)
