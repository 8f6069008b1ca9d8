"""Compiled radial networks against PyTorch's operations, and their derivatives against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import collate
from forcetune.kernels import radial
from forcetune.kernels.compiled import choice, radial_network, threads
from forcetune.kernels.compiled.choice import choose_kernels
from forcetune.kernels.tensors import TensorSource
from systems import backbone, cluster, frames_of

pytestmark = pytest.mark.skipif(choice.missing_reason() is not None, reason="there are no compiled kernels")

WIDTHS = {"three hidden layers": (8, 64, 64, 64, 96), "one, of odd widths": (5, 7, 3), "two": (3, 16, 9, 20)}
FACTOR = 1.7


def random_matrices(widths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = pairwise(widths)
    return [(torch.randn(*s, generator=generator, dtype=dtype) / s[0] ** 0.5).requires_grad_() for s in shapes]


def random_inputs(pairs: int, widths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, and the gradient that R is pulled by."""
    generator = torch.Generator().manual_seed(5)
    return tuple(  # pyright: ignore[reportReturnType]
        (3 * torch.randn(pairs, width, generator=generator, dtype=dtype)).requires_grad_()
        for width in (widths[0], widths[-1])
    )


def fused(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    return radial_network.radial_network(x, matrices, [FACTOR] * (len(matrices) - 1))


def plain(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    for matrix in matrices[:-1]:
        x = functional.silu(x @ matrix) * FACTOR
    return x @ matrices[-1]


def derivatives(network: Callable[..., Tensor], pairs: int, widths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """R, its first gradients, and gradients of a loss of all of them."""
    matrices, (x, g) = random_matrices(widths, dtype), random_inputs(pairs, widths, dtype)
    everything = [x, g, *matrices]
    out = network(x, matrices)
    (force,) = torch.autograd.grad(out, x, g, create_graph=True)
    by_matrices = torch.autograd.grad(out, matrices, g, create_graph=True)
    loss = force.square().sum() + out.square().sum() / 5
    as_trained = torch.autograd.grad(loss, everything, retain_graph=True)
    loss = loss + sum(one.square().sum() for one in by_matrices) / 5
    return [out, force, *by_matrices, *as_trained, *torch.autograd.grad(loss, everything)]


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("pairs", [0, 1, 7, 50])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_equals_the_operations_up_to_second_derivatives(
    name: str, pairs: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Within the tolerance of the largest value of each."""
    own, expected = (derivatives(network, pairs, WIDTHS[name], dtype) for network in (fused, plain))
    for mine, theirs in zip(own, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == dtype
        largest = max(1.0, float(theirs.detach().abs().max())) if theirs.numel() else 1.0
        assert torch.allclose(mine, theirs, rtol=0, atol=tolerance * largest)


def test_several_threads_and_inputs_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, (x, _) = random_matrices(WIDTHS["two"], torch.float64), random_inputs(50, WIDTHS["two"], torch.float64)
    monkeypatch.setattr(threads, "thread_count", lambda work: 3)
    turned = x.t().contiguous().t()
    assert torch.allclose(fused(turned, matrices), plain(x, matrices), rtol=0, atol=1e-13)


def test_derivatives_are_those_of_finite_differences() -> None:
    matrices, (x, _) = random_matrices((3, 5, 4, 2), torch.float64), random_inputs(3, (3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda x, *rest: fused(x, rest), (x, *matrices), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, *rest: fused(x, rest), (x, *matrices), fast_mode=True)


def test_forces_do_not_wait_for_gradients_by_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[bool]] = []
    inner = radial_network._pull  # pyright: ignore[reportPrivateUsage]

    def watched(setting: object, wanted: list[bool], *rest: object, **options: object) -> object:
        asked.append(list(wanted))
        return inner(setting, wanted, *rest, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(radial_network, "_pull", watched)
    weights, (x, g) = random_matrices((3, 5, 2), torch.float64), random_inputs(4, (3, 2), torch.float64)
    lengths = x * 1
    out = fused(lengths, [weight * 2 for weight in weights])
    (force,) = torch.autograd.grad(out, lengths, g, create_graph=True)
    assert asked == [[True, False, False]]
    force.square().sum().backward()
    assert all(weight.grad is not None and bool(weight.grad.abs().max() > 0) for weight in weights)


def test_other_activations_and_kernels_take_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    inner = radial_network.radial_network
    monkeypatch.setattr(radial, "radial_network", lambda *a, **options: calls.append(1) or inner(*a, **options))
    x = random_inputs(6, (4, 2), torch.float64)[0]
    with_silu = radial.RadialNetwork((4, 5, 2), TensorSource(None))
    expected = with_silu[1](with_silu[0](x))
    assert torch.allclose(with_silu(x), expected, rtol=0, atol=1e-13) and len(calls) == 1
    choose_kernels(with_silu, "torch")
    assert torch.equal(with_silu(x), expected) and len(calls) == 1
    radial.RadialNetwork((4, 5, 2), TensorSource(None), activation=torch.tanh)(x)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["elora", "full", "gain"])
def test_gradients_of_a_training_step(name: str) -> None:
    """What an adapter makes of the weights, one atom without neighbours included."""
    model = backbone()
    parameters = list(attach(model, method(name)).parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    batch = collate(build_graphs(model, frames_of(cluster(), cluster()[:1]))).to(dtype=model.dtype)
    found = []
    for kernels in ("torch", "compiled"):
        choose_kernels(model.model, kernels)
        prediction = model.predict(batch, stress=True, create_graph=True)
        assert prediction.stress is not None
        loss = prediction.energy.square().sum() + prediction.forces.square().sum() + prediction.stress.square().sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append([prediction.energy, prediction.forces, *(g for g in gradients if g is not None)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10 * max(1.0, float(one.detach().abs().max())))
