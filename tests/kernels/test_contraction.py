"""The symmetric contraction against the library's, and its derivatives against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forcetune.backbones.mace.library import import_mace
from forcetune.irreps import parse_irreps
from forcetune.kernels.contraction import arranged, fold, polynomial
from forcetune.kernels.harmonics import reflection_labels
from forcetune.kernels.polynomial import BilinearForm, bilinear_form

EXACT = 1e-10

CASES: dict[str, tuple[str, str, int]] = {
    "order 1": ("0e+1o", "0e+1o", 1),
    "order 2 up to 2e": ("0e+1o+2e", "0e+1o+2e", 2),
    "order 3 up to 3o": ("0e+1o+2e+3o", "0e+1o", 3),
    "scalars of both parities": ("0e+0o+1e+1o", "0e+0o+1o+1e", 3),
    "order 4": ("0e+1o", "0e+1o", 4),
}


def contraction(irreps_in: str, irreps_out: str, order: int, elements: int, channels: int = 3, **options: Any) -> Any:
    import_mace()
    from e3nn import o3
    from mace.modules.symmetric_contraction import SymmetricContraction

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return SymmetricContraction(
                o3.Irreps([(channels, ir) for _, ir in o3.Irreps(irreps_in)]),
                o3.Irreps([(channels, ir) for _, ir in o3.Irreps(irreps_out)]),
                order,
                num_elements=elements,
                **options,
            )
    finally:
        torch.set_default_dtype(before)


def form_of(module: Any, *, labelled: bool = True) -> BilinearForm:
    labels = reflection_labels(parse_irreps(str(module.irreps_in)))
    couplings = [[c.U_tensors(nu + 1) for nu in range(c.correlation)] for c in module.contractions]
    return bilinear_form(couplings, labels if labelled else [0] * len(labels))


def ours(module: Any, form: BilinearForm, x: Tensor, counts: list[int], chosen: list[int]) -> Tensor:
    """As the library lays it out: (atoms, Σ channels · dim)."""
    weights = [torch.cat([*reversed(list(c.weights)), c.weights_max], 1)[chosen] for c in module.contractions]
    ordered = x.permute(2, 1, 0)[list(form.order)].contiguous()
    out = polynomial(form, ordered, fold(form, weights), counts)
    return torch.cat([part.permute(2, 1, 0).reshape(len(x), -1) for part in out.split(form.dims)], dim=1)


def derivatives(out: Tensor, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The output, its gradient by x, and gradients of a function of both."""
    weight = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)
    (of_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    again = torch.autograd.grad(
        (of_x * weight).sum() + out.sum(), [x, *parameters], allow_unused=True, materialize_grads=True
    )
    return [out, of_x, *again]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("labelled", [True, False], ids=["by reflections", "as a whole"])
def test_equals_the_library_with_first_and_second_derivatives(case: tuple[str, str, int], labelled: bool) -> None:
    irreps_in, irreps_out, order = case
    module = contraction(irreps_in, irreps_out, order, elements=4)
    species = torch.tensor([0, 0, 2, 3, 3, 3])  # the second is absent
    generator = torch.Generator().manual_seed(1)
    size = sum(ir.dim for _, ir in module.irreps_in)
    x = torch.randn(6, 3, size, generator=generator, dtype=torch.float64, requires_grad=True)
    one_hot = nn.functional.one_hot(species, 4).to(x.dtype)
    form = form_of(module, labelled=labelled)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    expected = derivatives(module(x, one_hot), x, parameters)
    actual = derivatives(ours(module, form, x, [2, 1, 3], [0, 2, 3]), x, parameters)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= EXACT * max(1.0, float(other.detach().abs().max()))


def test_any_basis_of_the_couplings() -> None:
    """Models made with cuequivariance have fewer couplings, linear combinations of the others."""
    module = contraction("0e+1o+2e", "0e+1o", 3, elements=1)
    generator = torch.Generator().manual_seed(4)
    for part in module.contractions:
        full = part.U_matrix_3
        part.U_matrix_3 = full @ torch.randn(full.shape[-1], 2, generator=generator, dtype=full.dtype)
        part.weights_max = nn.Parameter(torch.randn(1, 2, 3, generator=generator, dtype=full.dtype))
    x = torch.randn(3, 3, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    one_hot = torch.ones(3, 1, dtype=torch.float64)
    parameters = list(module.parameters())
    expected = derivatives(module(x, one_hot), x, parameters)
    actual = derivatives(ours(module, form_of(module), x, [3], [0]), x, parameters)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= EXACT * max(1.0, float(other.detach().abs().max()))


@pytest.mark.parametrize("case", [CASES["order 2 up to 2e"], CASES["order 4"]], ids=["order 2", "order 4"])
def test_derivatives_are_those_of_finite_differences(case: tuple[str, str, int]) -> None:
    module = contraction(*case, elements=2, channels=1)
    form = form_of(module)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(form.order), 1, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    coefficients = [
        torch.randn(
            2, 1, len(segment.rows), segment.stop - segment.start, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for segment in form.segments
    ]

    def function(x: Tensor, *coefficients: Tensor) -> Tensor:
        return polynomial(form, x, coefficients, [1, 1])

    assert torch.autograd.gradcheck(function, (x, *coefficients))
    frozen = tuple(coefficient.detach() for coefficient in coefficients)
    assert torch.autograd.gradgradcheck(lambda x: function(x, *frozen), (x,))

    # gradients by x differentiated by the coefficients: what training on forces needs
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def along(x: Tensor, *coefficients: Tensor) -> Tensor:
        out = function(x, *coefficients)
        (of_x,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return (of_x * direction).sum()

    assert torch.autograd.gradcheck(along, (x, *coefficients))


def test_higher_orders_are_refused() -> None:
    couplings = [[torch.ones(*(2,) * order, 1, dtype=torch.float64) for order in range(1, 6)]]
    with pytest.raises(ValueError, match="order higher than 4"):
        bilinear_form(couplings, [0, 0])


def test_components_are_put_in_order_and_differentiated_twice() -> None:
    blocks = [torch.randn(3, dim, 2, dtype=torch.float64, requires_grad=True) for dim in (1, 3)]
    order = (2, 0, 3, 1)
    result = arranged(blocks, order)
    rows = torch.cat(blocks, dim=1)
    assert torch.equal(result, rows.permute(1, 2, 0)[list(order)])
    assert torch.autograd.gradcheck(lambda *values: arranged(values, order), blocks)
    assert torch.autograd.gradgradcheck(lambda *values: arranged(values, order).sin(), blocks)
