"""Spherical harmonics, couplings and normalisations against e3nn's, signs included."""

from __future__ import annotations

import itertools

import pytest
import torch

from forcetune.backbones.mace.blocks import ACTIVATIONS
from forcetune.backbones.mace.library import import_mace
from forcetune.irreps import parse_irreps
from forcetune.kernels.harmonics import (
    HIGHEST_ORDER,
    SphericalHarmonics,
    reflection_labels,
    second_moment_factor,
    wigner_3j,
)


@pytest.mark.parametrize("first", range(7))
def test_couplings_are_those_of_e3nn(first: int) -> None:
    import_mace()
    from e3nn import o3

    count = 0
    for second, third in itertools.product(range(7), repeat=2):
        if abs(first - second) <= third <= first + second:
            expected = o3.wigner_3j(first, second, third, dtype=torch.float64)
            assert torch.allclose(wigner_3j(first, second, third), expected, rtol=0, atol=1e-12), (second, third)
            count += 1
        else:
            with pytest.raises(ValueError, match="do not couple"):
                wigner_3j(first, second, third)
    assert count >= 7


def test_couplings_are_invariant_and_of_norm_one() -> None:
    """Beyond the orders that networks have."""
    import_mace()
    from e3nn import o3

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        rotation = o3.matrix_x(torch.tensor(0.7)) @ o3.matrix_y(torch.tensor(-1.2))
        for orders in ((7, 5, 9), (8, 8, 11), (11, 4, 10)):
            table = wigner_3j(*orders)
            turns = [o3.Irrep(order, 1).D_from_matrix(rotation) for order in orders]
            turned = torch.einsum("abc,ia,jb,kc->ijk", table, *turns)
            assert float(table.square().sum()) == pytest.approx(1, abs=1e-10)
            assert torch.allclose(turned, table, rtol=0, atol=1e-9)
    finally:
        torch.set_default_dtype(before)
    with pytest.raises(ValueError, match="above 11"):
        wigner_3j(HIGHEST_ORDER + 1, HIGHEST_ORDER + 1, 0)


@pytest.mark.parametrize("highest", range(9))
def test_harmonics_and_their_slopes_are_those_of_e3nn(highest: int) -> None:
    import_mace()
    from e3nn import o3

    generator = torch.Generator().manual_seed(highest)
    vectors = (3 * torch.randn(50, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    axes = torch.cat([torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)])
    vectors = torch.cat([vectors.detach(), axes]).requires_grad_()
    actual = SphericalHarmonics(highest)(vectors, torch.linalg.vector_norm(vectors, dim=1, keepdim=True))
    orders = list(range(highest + 1))
    expected = o3.spherical_harmonics(orders, vectors, normalize=True, normalization="component")
    assert actual.shape == expected.shape == (56, (highest + 1) ** 2)
    assert torch.allclose(actual, expected, rtol=0, atol=1e-11)
    if highest:
        weight = torch.linspace(-1, 2, actual.numel(), dtype=torch.float64).view(actual.shape)
        slopes = [torch.autograd.grad((value * weight).sum(), vectors)[0] for value in (actual, expected)]
        assert torch.allclose(*slopes, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("parity", ["e", "o"])
def test_labels_say_which_reflections_change_a_sign(order: int, parity: str) -> None:
    import_mace()
    from e3nn import o3

    labels = reflection_labels(parse_irreps(f"5x{order}{parity}"))
    assert len(labels) == 2 * order + 1
    for axis in range(3):
        mirror = torch.eye(3)
        mirror[axis, axis] = -1
        acts = o3.Irrep(f"{order}{parity}").D_from_matrix(mirror)
        expected = [-1.0 if label >> axis & 1 else 1.0 for label in labels]
        assert torch.allclose(acts, torch.diag(torch.tensor(expected)), atol=1e-5)
    both = reflection_labels(parse_irreps("2x0e+3x1o"))
    assert both == [0, 1, 2, 4]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_normalised_as_by_e3nn(name: str) -> None:
    import_mace()
    from e3nn.math import normalize2mom

    theirs = normalize2mom(ACTIVATIONS[name])
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    actual = ACTIVATIONS[name](x) * second_moment_factor(ACTIVATIONS[name])
    assert torch.allclose(actual, theirs(x), rtol=1e-13, atol=0)


def test_a_factor_near_one_is_one() -> None:
    """As e3nn leaves it out."""
    assert second_moment_factor(_nearly_the_identity) == 1.0
    assert second_moment_factor(torch.tanh) != 1.0


def _nearly_the_identity(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean().sqrt() * 1.00005
