"""The symmetric contraction as a segmented polynomial of cuequivariance.

Its couplings are those of the model's file: cuequivariance's own contraction has another basis, which would not fit its
weights. They are contracted with the weights first, to one coefficient of each monomial x[i₁] … x[iν] of each output,
so that a kernel has one path for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forcetune.kernels.constants import Constant
from forcetune.kernels.cueq.library import SegmentedPolynomial
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.polynomial import BilinearForm, Monomial


class ContractionPolynomial(SegmentedPolynomial):
    """Σ over monomials, each times its coefficient.

    Args:
        form: of the polynomials.
        channels: of the features.
    """

    def __init__(self, form: BilinearForm, channels: int) -> None:
        super().__init__()
        self.form, self.channels = form, channels
        self.terms: list[tuple[int, Monomial]] = []
        self.bases: list[Constant] = []
        monomials = _monomials(form)
        for output in range(len(form.dims)):
            columns: list[Tensor] = []
            for segment in form.segments:
                first = sum(form.dims[:output])
                rows = [
                    row for row, target in enumerate(segment.targets) if first <= target < first + form.dims[output]
                ]
                basis = segment.basis[output].value
                width = segment.stop - segment.start
                nonzero = (
                    basis.abs().amax(0).nonzero().squeeze(1) if basis.numel() else torch.zeros(0, dtype=torch.long)
                )
                for product in nonzero.tolist():
                    row, column = rows[product // width], segment.start + product % width
                    factors = monomials[segment.rows[row]] + monomials[column]
                    self.terms.append((segment.targets[row], factors))
                columns.append(basis.index_select(1, nonzero))
            self.bases.append(Constant(torch.cat(columns, dim=1)))

    def build(self, cue: Any) -> Any:
        operands = [
            cue.SegmentedOperand(ndim=1, segments=[(self.channels,)] * count)
            for count in (len(self.terms), len(self.form.order), sum(self.form.dims))
        ]
        operations = []
        for degree in sorted({len(factors) for _, factors in self.terms}):
            product = cue.SegmentedTensorProduct.from_subscripts(",".join("u" * (degree + 2)))
            for place, operand in enumerate((operands[0], *[operands[1]] * degree, operands[2])):
                product.set_operand(place, operand)
            for number, (target, factors) in enumerate(self.terms):
                if len(factors) == degree:
                    product.add_path(number, *factors, target, c=1.0)
            operations.append(((0, *[1] * degree, 2), product))
        return cue.SegmentedPolynomial(operands[:2], operands[2:], operations)

    def fold(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        """(species, monomials · channels) coefficients.

        Args:
            weights: for each output those of all orders from the first, (species, couplings, channels).
        """
        parts = []
        for orders, basis in zip(weights, self.bases, strict=True):
            weight = torch.cat(list(orders), dim=1) if len(orders) > 1 else orders[0]
            parts.append(basis.like(weight).mT @ weight)
        return torch.cat(parts, dim=1).flatten(1)

    def contract(self, plan: Plan, weights: Sequence[Sequence[Tensor]], features: Sequence[Tensor]) -> list[Tensor]:
        """The contraction of the atoms of a plan; nothing is read back.

        Args:
            plan: of the batch.
            weights: as :meth:`fold`, of all species or of one that all share.
            features: (atoms, dim, channels) of each irrep.

        Returns:
            (atoms, dim, channels) of each output.
        """
        shared = len(weights[0][0]) == 1
        if not shared:
            weights = [[weight.index_select(0, plan.present) for weight in orders] for orders in weights]
        coefficients = self.fold(weights)
        x = torch.cat([block.flatten(1) for block in features], dim=1)
        indices = {} if shared else {0: torch.searchsorted(plan.present, plan.species)}
        outputs = self.evaluate([coefficients, x], indices)
        parts = outputs.split([dim * self.channels for dim in self.form.dims], dim=1)
        return [part.unflatten(1, (dim, self.channels)) for part, dim in zip(parts, self.form.dims, strict=True)]


def _monomials(form: BilinearForm) -> dict[int, Monomial]:
    """Components, numbered as the features have them, of the monomial at each place of a form."""
    order = form.order
    monomials: dict[int, Monomial] = {form.one: ()}
    monomials |= {place: (order[component],) for component, place in enumerate(form.linear) if place >= 0}
    for run in form.runs:
        for other in range(run.start, run.stop):
            monomials[run.offset + other - run.start] = (order[run.first], order[other])
    return monomials
