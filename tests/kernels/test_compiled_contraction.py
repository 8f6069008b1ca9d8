"""Compiled contractions against PyTorch's operations, and their derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forcetune.irreps import parse_irreps
from forcetune.kernels import contraction as reference
from forcetune.kernels.compiled import choice, contraction, threads
from forcetune.kernels.compiled.sparse_form import SparseForm
from forcetune.kernels.harmonics import reflection_labels
from forcetune.kernels.polynomial import BilinearForm, bilinear_form
from forcetune.kernels.symmetric_contraction import product_couplings

pytestmark = pytest.mark.skipif(choice.missing_reason() is not None, reason="there are no compiled kernels")

CASES = {
    "order 1": ("1x0e+1x1o", ("1x0e", "1x1o"), 1),
    "order 2 up to 2e": ("1x0e+1x1o+1x2e", ("1x0e", "1x1o", "1x2e"), 2),
    "order 3 up to 3o": ("1x0e+1x1o+1x2e+1x3o", ("1x0e", "1x1o"), 3),
    "both parities": ("1x0e+1x0o+1x1o+1x1e", ("1x0e", "1x0o", "1x1o", "1x1e"), 3),
    "order 4": ("1x0e+1x1o", ("1x0e", "1x1o"), 4),
}


def form_of(case: str) -> BilinearForm:
    irreps_in, outputs, order = CASES[case]
    tables = [[product_couplings(irreps_in, out, nu) for nu in range(1, order + 1)] for out in outputs]
    return bilinear_form(tables, reflection_labels(parse_irreps(irreps_in)))


class Inputs:
    """Features and weights, and both ways to contract them."""

    def __init__(self, case: str, channels: int, counts: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        self.form, self.counts, self.channels = form_of(case), counts, channels
        self.sparse = SparseForm(self.form)
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

        self.x = [random(sum(counts), block.dim, channels) for block in parse_irreps(CASES[case][0])]
        self.weights = [random(len(counts), basis.value.shape[1], channels) for basis in self.sparse.basis]
        self.lanes = contraction.count_lanes(channels, dtype)

    def compiled(self, *x: Tensor) -> list[Tensor]:
        coefficients = self.sparse.fold(self.weights, self.lanes)
        return [*contraction.polynomial(self.sparse, x, coefficients, self.counts)]

    def plain(self, *x: Tensor) -> list[Tensor]:
        ordered = reference.arranged(x, self.form.order)
        coefficients = reference.fold(self.form, self.weights)
        out = reference.polynomial(self.form, ordered, coefficients, self.counts)
        return [part.permute(2, 0, 1) for part in out.split(self.form.dims)]

    def derivatives(self, out: list[Tensor]) -> list[Tensor]:
        """Outputs, their gradients by x, and gradients of those and of the outputs by x and the weights."""
        slopes = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape).cos() for o in out]
        values = [(o * s).sum() + (o**2).sum() / 7 for o, s in zip(out, slopes, strict=True)]
        first = torch.autograd.grad(sum(values), self.x, create_graph=True)
        mixed = sum((g * torch.linspace(1, -2, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in first)
        second = torch.autograd.grad(mixed + out[0].sum(), [*self.x, *self.weights], allow_unused=True)
        return [*out, *first, *(torch.zeros(1) if value is None else value for value in second)]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("channels, counts", [(3, (2, 5)), (8, (1, 0, 4)), (16, (9,)), (32, (5, 3))])
def test_equals_the_operations(case: str, channels: int, counts: tuple[int, ...]) -> None:
    inputs = Inputs(case, channels, counts)
    actual = inputs.derivatives(inputs.compiled(*inputs.x))
    for one, other in zip(actual, inputs.derivatives(inputs.plain(*inputs.x)), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12 * max(1.0, float(other.detach().abs().max())))


def test_single_precision_and_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 within 1e-5 of the largest value: sums come in another order."""
    inputs = Inputs("order 3 up to 3o", 48, (6, 3), torch.float32)
    expected = inputs.derivatives(inputs.plain(*inputs.x))
    alone = inputs.derivatives(inputs.compiled(*inputs.x))
    monkeypatch.setattr(threads, "thread_count", lambda _: 3)
    together = inputs.derivatives(inputs.compiled(*inputs.x))
    for one, two, other in zip(alone, together, expected, strict=True):
        assert torch.equal(one, two)
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.detach().abs().max())))


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unrolled_loops_give_the_same(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(case, 32, (5, 0, 2), dtype)
    unrolled = inputs.derivatives(inputs.compiled(*inputs.x))
    monkeypatch.setattr(contraction, "MOST_UNROLLED", 0)
    for one, other in zip(unrolled, inputs.derivatives(inputs.compiled(*inputs.x)), strict=True):
        bound = 50 * torch.finfo(dtype).eps * max(1.0, float(other.detach().abs().max()))
        assert torch.allclose(one, other, rtol=0, atol=bound)


@pytest.mark.parametrize("case", ["order 2 up to 2e", "both parities"])
def test_derivatives_are_those_of_finite_differences(case: str) -> None:
    inputs = Inputs(case, 2, (2, 1))
    for weight in inputs.weights:
        weight.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda *x: tuple(inputs.compiled(*x)), inputs.x)
    assert torch.autograd.gradgradcheck(lambda *x: tuple(inputs.compiled(*x)), inputs.x)


def test_no_atoms() -> None:
    inputs = Inputs("order 3 up to 3o", 8, (0,))
    assert [part.shape for part in inputs.compiled(*inputs.x)] == [(0, 1, 8), (0, 3, 8)]


def test_second_derivatives_by_the_weights_are_refused() -> None:
    inputs = Inputs("order 1", 4, (3,))
    (slope,) = torch.autograd.grad(inputs.compiled(*inputs.x)[0].sum(), inputs.weights[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="contraction weights"):
        slope.sum().backward()
