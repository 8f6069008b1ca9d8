"""The terms of polynomials that are not 0, as compiled loops and Triton's kernels take them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forcetune.kernels.constants import Constant
from forcetune.kernels.polynomial import BilinearForm


class SparseForm:
    """The terms of polynomials.

    Attributes:
        tensors: integers that describe them, as the operations take them.
        dims: components of each output irrep.
        basis: for each output irrep (its terms, couplings): A for each coupling.
        terms: their number.
    """

    def __init__(self, form: BilinearForm) -> None:
        n = len(form.order)
        factors = np.full((form.size, 2), n, dtype=np.int64)  # n is the constant 1
        for place, component in zip(form.linear, form.order, strict=True):
            if place >= 0:
                factors[place, 0] = component
        for run in form.runs:
            for offset, second in enumerate(range(run.start, run.stop), run.offset):
                factors[offset] = form.order[run.first], form.order[second]
        ends = np.cumsum([0, *form.dims])
        rows: list[tuple[int, int, int]] = []
        columns: list[int] = []
        self.basis: list[Constant] = []
        first_row = [0]
        for output, (start, stop) in enumerate(itertools.pairwise(ends)):
            matrices: list[np.ndarray] = []
            parts = [_list_rows(form, index, output) for index in range(len(form.segments))]
            for target_index in range(start, stop):
                for segment, members in zip(form.segments, parts, strict=True):
                    for member_target, row, matrix in members:
                        if member_target != target_index:
                            continue
                        nonzero = np.flatnonzero(np.abs(matrix).max(axis=0, initial=0.0) > 0)
                        rows.append((row, len(columns), len(columns) + len(nonzero)))
                        columns += (segment.start + nonzero).tolist()
                        matrices.append(matrix[:, nonzero].T)
                first_row.append(len(rows))
            couplings = form.segments[0].basis[output].value.shape[0]
            whole = np.concatenate(matrices) if matrices else np.zeros((0, couplings))
            self.basis.append(Constant(torch.from_numpy(np.ascontiguousarray(whole))))
        self.dims, self.terms = form.dims, len(columns)
        uses = sorted((columns[e], row, e) for row, (_, start, stop) in enumerate(rows) for e in range(start, stop))
        starts = np.searchsorted([use[0] for use in uses], np.arange(form.size + 1))
        lists = (factors, first_row, rows, columns, starts, [use[1:] for use in uses])
        self.tensors = [torch.from_numpy(np.array(values, dtype=np.int64).reshape(-1)) for values in lists]
        self.components = n

    def fold(self, weights: Sequence[Tensor], lanes: int) -> Tensor:
        """Coefficients of all terms, (species, channels / lanes, terms, lanes).

        Args:
            weights: for each output irrep (species, couplings of all orders from the first, channels).
            lanes: channels that lie side by side.
        """
        parts = [basis.like(weight) @ weight for basis, weight in zip(self.basis, weights, strict=True)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        species, terms, channels = whole.shape
        return whole.view(species, terms, channels // lanes, lanes).transpose(1, 2).contiguous()


def _list_rows(form: BilinearForm, index: int, output: int) -> list[tuple[int, int, np.ndarray]]:
    """Target, monomial and coefficients (couplings, columns) of an output's rows in a segment."""
    segment = form.segments[index]
    width = segment.stop - segment.start
    before = sum(basis.value.shape[1] // max(width, 1) for basis in segment.basis[:output])
    value = segment.basis[output].value.numpy()
    matrices = value.reshape(value.shape[0], -1, width)
    return [
        (segment.targets[before + number], segment.rows[before + number], matrices[:, number])
        for number in range(matrices.shape[1])
    ]
