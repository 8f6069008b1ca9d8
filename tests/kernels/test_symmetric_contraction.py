"""Couplings of products, and the layer that they make, against mace's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forcetune.backbones.mace.library import import_mace
from forcetune.kernels.edge_plan import make_plan
from forcetune.kernels.features import Features, make_features
from forcetune.kernels.phase import Phase
from forcetune.kernels.step import Step
from forcetune.kernels.symmetric_contraction import SymmetricContraction, product_couplings
from forcetune.kernels.tensors import TensorSource, UnfitError
from models import default_dtype

COUPLINGS = [
    ("0e+1o", 4),
    ("0e+1o+2e", 3),
    ("0e+1o+2e+3o", 3),
    ("0e+0o+1o+1e", 3),
    ("0e+1e+2e", 3),
    ("0o+0e+1o+1e+2o+2e", 2),
    ("1o", 2),
]


@pytest.mark.parametrize(("irreps", "highest"), COUPLINGS)
@pytest.mark.parametrize("target", ["0e", "0o", "1o", "1e", "2e", "2o", "3o"])
def test_couplings_are_those_of_mace(irreps: str, highest: int, target: str) -> None:
    modules = import_mace()
    from e3nn import o3

    library: Any = modules.symmetric_contraction
    for order in range(1, highest + 1):
        arguments = {"irreps_in": o3.Irreps(irreps), "irreps_out": o3.Irreps(target), "correlation": order}
        with default_dtype(torch.float64):
            expected = library.U_matrix_real(**arguments, use_cueq_cg=False, dtype=torch.float64)[-1]
        couplings = product_couplings(irreps, target, order)
        assert couplings.shape == expected.shape, order
        assert torch.allclose(couplings, expected, rtol=0, atol=1e-12), order


def their_layer(irreps_in: str, irreps_out: str, order: int, n_species: int) -> Any:
    modules = import_mace()
    from e3nn import o3

    with default_dtype(torch.float64), torch.random.fork_rng():
        torch.manual_seed(1)
        return modules.symmetric_contraction.SymmetricContraction(
            o3.Irreps(irreps_in), o3.Irreps(irreps_out), order, num_elements=n_species
        )


def source_of(layer: nn.Module) -> TensorSource:
    return TensorSource(dict(layer.named_parameters()) | dict(layer.named_buffers()))


def step_for(species: Tensor) -> Step:
    plan = make_plan(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3), species)
    empty = torch.zeros(0, 1, dtype=torch.float64)
    return Step(plan, Phase(), empty, empty, None, nn.functional.one_hot(plan.species, 4).double())


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out", "order"),
    [
        ("3x0e+3x1o", "3x0e+3x1o", 3),
        ("3x0e+3x1o+3x2e", "3x0e+3x1o+3x2e", 2),
        ("3x0e+3x0o+3x1o+3x1e", "3x0e+3x0o+3x1e", 3),
        ("2x0e+2x1o", "2x0e", 4),
    ],
)
@pytest.mark.parametrize("agnostic", [False, True])
def test_the_layer_is_that_of_mace(irreps_in: str, irreps_out: str, order: int, agnostic: bool) -> None:
    n_species = 1 if agnostic else 4
    theirs = their_layer(irreps_in, irreps_out, order, n_species)
    source = source_of(theirs)
    ours = SymmetricContraction(irreps_in, irreps_out, order, n_species, source)
    assert [name for name in source.left_over() if not name.endswith("zeroed")] == []
    species = torch.tensor([3, 0, 0, 1, 3, 3])  # one is absent
    step = step_for(species)
    generator = torch.Generator().manual_seed(2)
    channels = int(irreps_in.split("x")[0])
    size = ours._labels and len(ours._labels)
    x = torch.randn(6, channels, size, generator=generator, dtype=torch.float64, requires_grad=True)
    blocks, start = [], 0
    for part in irreps_in.split("+"):
        dim = 2 * int(part.split("x")[1][:-1]) + 1
        blocks.append(x[step.plan.order][:, :, start : start + dim].transpose(1, 2))
        start += dim
    outputs = ours(Features(blocks, geometric=True, trains=True), step).flat[step.plan.place]
    one_hot = torch.ones(6, 1) if agnostic else nn.functional.one_hot(species, 4)
    expected = theirs(x, one_hot.double())
    assert torch.allclose(outputs, expected, rtol=0, atol=1e-11 * float(expected.detach().abs().max()))
    weight = torch.linspace(-1, 2, outputs.numel(), dtype=torch.float64).view(outputs.shape)
    named = {name: value for name, value in theirs.named_parameters() if value.requires_grad}
    mine = {name: value for name, value in ours.named_parameters() if value.requires_grad}
    assert named.keys() == mine.keys()
    gradients = [
        torch.autograd.grad((value * weight).sum() + value.square().sum(), [x, *parameters.values()])
        for value, parameters in ((outputs, mine), (expected, named))
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11 * max(1.0, float(other.abs().max())))


def test_new_layers_are_those_that_mace_makes() -> None:
    """But for the weights, which are random: normal, over the number of couplings."""
    theirs = their_layer("8x0e+8x1o", "8x0e+8x1o", 3, 5)
    torch.manual_seed(0)
    ours = SymmetricContraction("8x0e+8x1o", "8x0e+8x1o", 3, 5, TensorSource(None))
    mine, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert {name: value.shape for name, value in mine.items()} == {n: v.shape for n, v in expected.items()}
    for name, value in mine.items():
        assert float(value.std()) * value.shape[1] == pytest.approx(1, abs=0.35), name
    buffers = {name: value for name, value in theirs.named_buffers() if "U_matrix" in name}
    assert all(torch.allclose(ours.get_buffer(name), value, atol=1e-12) for name, value in buffers.items())


def test_kept_coefficients_stay_with_their_layer() -> None:
    theirs = their_layer("2x0e+2x1o", "2x0e+2x1o", 2, 4)
    layer = SymmetricContraction("2x0e+2x1o", "2x0e+2x1o", 2, 4, source_of(theirs))
    layer.requires_grad_(False)
    step = step_for(torch.tensor([0, 1, 3]))
    x = make_features(torch.randn(3, 8, dtype=torch.float64), ((1, 2), (3, 2)))
    expected = layer(x, step).flat
    folded = layer.coefficients.fold([c.forward(None) for c in layer.contractions], step.plan.present)
    again = layer.coefficients.fold([c.forward(None) for c in layer.contractions], step.plan.present)
    assert all(one is other for one, other in zip(folded, again, strict=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, step).flat, expected)
        for parameter in other.parameters():
            parameter.mul_(2)
        assert torch.allclose(other(x, step).flat, 2 * expected)
    assert torch.equal(layer(x, step).flat, expected)
    # other species, other memory
    other = layer(x, step_for(torch.tensor([1, 2, 2]))).flat
    assert not torch.equal(other, expected)
    layer.contractions[0].weights_max.data = 2 * layer.contractions[0].weights_max.data
    assert not torch.equal(layer(x, step).flat, expected)


def test_irreps_with_different_numbers_of_channels_are_refused() -> None:
    with pytest.raises(UnfitError, match="several numbers of channels"):
        SymmetricContraction("2x0e+3x1o", "2x0e", 2, 1, TensorSource(None))
