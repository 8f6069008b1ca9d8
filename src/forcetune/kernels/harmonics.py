"""Real spherical harmonics and their coupling coefficients, for layers that carry none of their own.

The basis is the one that equivariant networks have in common: components of order l run from m = −l to l with y as the
polar axis, so that order 1 is (x, y, z); signs of the couplings are those of e3nn 0.4, which mace is built on.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from forcetune.irreps import Block
from forcetune.kernels.constants import Constant

Monomial = tuple[int, int, int]

HIGHEST_ORDER = 11
"""Of harmonics and couplings; larger ones lose digits in the sums of factorials and are in no network."""


# ---- harmonics ----------------------------------------------------------------------------------------------------


@functools.cache
def harmonic_polynomials(order: int) -> tuple[dict[Monomial, float], ...]:
    """Real spherical harmonics of one order as polynomials of a unit vector, with Σ_m Y² = 2 l + 1.

    Returns:
        For m = −l … l the coefficient of each monomial (powers of x, y, z).
    """
    polynomials = []
    for m in range(-order, order + 1):
        size = abs(m)
        norm = math.sqrt((2 * order + 1) * math.factorial(order - size) / math.factorial(order + size))
        norm *= math.sqrt(2) if m else 1
        polynomial: dict[Monomial, float] = defaultdict(float)
        for power, polar in _associated_legendre(order, size).items():
            for (first, second), azimuthal in _azimuthal(m).items():
                # polar axis y, azimuth from z towards x
                polynomial[(second, power, first)] += norm * polar * azimuthal
        polynomials.append({key: value for key, value in polynomial.items() if value})
    return tuple(polynomials)


def _associated_legendre(order: int, m: int) -> dict[int, float]:
    """d^m P_l / dz^m by powers of z (without the power of sin θ, which is part of the azimuthal polynomial)."""
    coefficients: dict[int, float] = {}
    for k in range((order - m) // 2 + 1):
        power = order - 2 * k
        value = (-1) ** k * math.comb(order, k) * math.comb(2 * order - 2 * k, order) / 2**order
        coefficients[power - m] = value * math.factorial(power) / math.factorial(power - m)
    return coefficients


def _azimuthal(m: int) -> dict[tuple[int, int], float]:
    """Re (x + i y)^m, or Im (x + i y)^|m| for negative m, by powers of x and y."""
    size, odd = abs(m), int(m < 0)
    return {(size - k, k): math.comb(size, k) * (-1.0) ** (k // 2) for k in range(odd, size + 1, 2)}


class SphericalHarmonics(nn.Module):
    """Y of all orders up to the highest, of the direction of each vector.

    Args:
        highest: order.
        solid: solid harmonics instead, which are multiplied by the length to the power of the order.
    """

    def __init__(self, highest: int, *, solid: bool = False) -> None:
        super().__init__()
        self.highest = highest
        self.solid = solid
        orders = [order for order in range(highest + 1) for _ in range(2 * order + 1)]
        self._powers = Constant(torch.tensor(orders, dtype=torch.float64))
        # monomials of degree d are those of degree d − 1 times a coordinate
        degrees: list[list[Monomial]] = [[(0, 0, 0)], [(1, 0, 0), (0, 1, 0), (0, 0, 1)]]
        self._steps: list[tuple[Constant, Constant]] = []
        for degree in range(2, highest + 1):
            monomials: list[Monomial] = []
            lower, axes = [], []
            for index, powers in enumerate(degrees[degree - 1]):
                # each monomial once: the coordinate that is multiplied is the last one that occurs
                last = max(axis for axis in range(3) if powers[axis])
                for axis in range(last, 3):
                    raised = list(powers)
                    raised[axis] += 1
                    monomials.append((raised[0], raised[1], raised[2]))
                    lower.append(index)
                    axes.append(axis)
            degrees.append(monomials)
            self._steps.append((Constant(torch.tensor(lower)), Constant(torch.tensor(axes))))
        place = {key: index for index, key in enumerate(itertools.chain(*degrees[: highest + 1]))}
        matrix = torch.zeros(len(place), (highest + 1) ** 2, dtype=torch.float64)
        for order in range(highest + 1):
            for column, polynomial in enumerate(harmonic_polynomials(order), order**2):
                for key, value in polynomial.items():
                    matrix[place[key], column] = value
        self._matrix = Constant(matrix)

    def forward(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """
        Args:
            vectors: (edges, 3).
            lengths: (edges, 1), theirs.

        Returns:
            (edges, (highest + 1)²).
        """
        if self.highest == 0:
            return torch.ones_like(lengths)
        unit = vectors / lengths
        powers = [torch.ones_like(lengths), unit]
        for lower, axes in self._steps:
            index, axis = lower.on(unit.device), axes.on(unit.device)
            powers.append(powers[-1].index_select(1, index) * unit.index_select(1, axis))
        harmonics = torch.cat(powers, dim=1) @ self._matrix.like(unit)
        return harmonics * lengths.pow(self._powers.like(unit)) if self.solid else harmonics


def reflection_labels(irreps: tuple[Block, ...]) -> list[int]:
    """For each component of each irrep (one copy of each) a bit for each axis whose reflection changes its sign."""
    labels: list[int] = []
    for block in irreps:
        natural = block.parity == ("e" if block.order % 2 == 0 else "o")
        for polynomial in harmonic_polynomials(block.order):
            powers = next(iter(polynomial))
            bits = sum((powers[axis] % 2) << axis for axis in range(3))
            # a pseudo-tensor changes its sign under every reflection once more
            labels.append(bits if natural else bits ^ 7)
    return labels


# ---- couplings ----------------------------------------------------------------------------------------------------


@functools.cache
def wigner_3j(first: int, second: int, third: int) -> Tensor:
    """The invariant coupling of three orders, (2 l₁ + 1, 2 l₂ + 1, 2 l₃ + 1) in float64, of norm 1.

    Raises:
        ValueError: the orders do not couple, or are too high.
    """
    if not abs(first - second) <= third <= first + second:
        raise ValueError(f"orders {first}, {second} and {third} do not couple")
    if max(first, second, third) > HIGHEST_ORDER:
        raise ValueError(f"couplings of orders above {HIGHEST_ORDER} are not computed")
    orders = (first, second, third)
    ascending = sorted(range(3), key=lambda i: orders[i])
    table = _ascending_3j(*(orders[i] for i in ascending))
    places = [ascending.index(i) for i in range(3)]
    # orders that are equal were sorted in a stable way; an odd permutation changes the sign of odd sums
    swaps = sum(places[i] > places[j] for i in range(3) for j in range(i + 1, 3))
    sign = -1 if swaps % 2 and sum(orders) % 2 else 1
    return (sign * table.permute(places)).contiguous()


@functools.cache
def clebsch_gordan_3j(first: int, second: int, third: int) -> Tensor:
    """As :func:`wigner_3j`, with the sign that Clebsch–Gordan coefficients of the orders as they stand give it.

    e3nn has this sign since version 0.5; it differs from the other for some odd sums of orders.

    Raises:
        ValueError: the orders do not couple, or are too high.
    """
    coupling = wigner_3j(first, second, third)
    bases = [1j**order * _real_from_complex(order) for order in (first, second, third)]
    table = _complex_table(first, second, third)
    real = torch.einsum("abc,ia,jb,kc->ijk", table, bases[0], bases[1], bases[2].conj()).real
    return coupling * torch.sign((coupling * real).sum())


def _complex_table(first: int, second: int, third: int) -> Tensor:
    """⟨l₁ m₁ l₂ m₂ | l₃ m₃⟩ of all components."""
    table = torch.zeros(2 * first + 1, 2 * second + 1, 2 * third + 1, dtype=torch.complex128)
    for m1 in range(-first, first + 1):
        for m2 in range(-second, second + 1):
            if abs(m1 + m2) <= third:
                value = _clebsch_gordan(first, m1, second, m2, third, m1 + m2)
                # the third index is an output: the invariant has its conjugate
                table[m1 + first, m2 + second, m1 + m2 + third] = value
    return table


@functools.cache
def _ascending_3j(first: int, second: int, third: int) -> Tensor:
    """Of ascending orders; the central element is positive, or where it is 0 the first that is not."""
    bases = [_real_from_complex(order) for order in (first, second, third)]
    table = _complex_table(first, second, third)
    real = torch.einsum("abc,ia,jb,kc->ijk", table, bases[0], bases[1], bases[2].conj())
    part = real.real if real.real.norm() > real.imag.norm() else real.imag
    part = torch.where(part.abs() < 1e-13, 0.0, part)
    part = part / part.norm()
    central = part[first, second, third]
    reference = central if central != 0 else part.flatten()[part.flatten().nonzero()[0, 0]]
    return part * torch.sign(reference)


def _real_from_complex(order: int) -> Tensor:
    """The unitary matrix from complex spherical harmonics (Condon–Shortley) to real ones."""
    matrix = [[0j] * (2 * order + 1) for _ in range(2 * order + 1)]
    matrix[order][order] = 1
    for m in range(1, order + 1):
        sign = (-1) ** m
        matrix[order + m][order + m] = sign / math.sqrt(2)
        matrix[order + m][order - m] = 1 / math.sqrt(2)
        matrix[order - m][order + m] = -1j * sign / math.sqrt(2)
        matrix[order - m][order - m] = 1j / math.sqrt(2)
    return torch.tensor(matrix, dtype=torch.complex128)


def _clebsch_gordan(j1: int, m1: int, j2: int, m2: int, j: int, m: int) -> float:
    """⟨j₁ m₁ j₂ m₂ | j m⟩ by Racah's formula."""
    f = math.factorial
    if m1 + m2 != m:
        return 0.0
    total = 0.0
    for k in range(max(0, j2 - j - m1, j1 - j + m2), min(j1 + j2 - j, j1 - m1, j2 + m2) + 1):
        below = f(k) * f(j1 + j2 - j - k) * f(j1 - m1 - k) * f(j2 + m2 - k) * f(j - j2 + m1 + k) * f(j - j1 - m2 + k)
        total += (-1) ** k / below
    triangle = (2 * j + 1) * f(j1 + j2 - j) * f(j1 - j2 + j) * f(-j1 + j2 + j) / f(j1 + j2 + j + 1)
    moments = f(j1 + m1) * f(j1 - m1) * f(j2 + m2) * f(j2 - m2) * f(j + m) * f(j - m)
    return math.sqrt(triangle * moments) * total


# ---- activations --------------------------------------------------------------------------------------------------


@functools.cache
def second_moment_factor(function: Callable[[Tensor], Tensor]) -> float:
    """1 / √⟨f(z)²⟩ for normal z, by the million draws that e3nn's activations are normalised with.

    Networks store the factor rarely and were trained with it, so that its sampling error is part of them.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    draws = torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    factor = float(function(draws).square().mean().pow(-0.5))
    return 1.0 if abs(factor - 1) < 1e-4 else factor
