"""Radial weights from splines: as accurate as they say, with forces that are the slopes of their energies."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nequip_models
import sevennet_models
from convolutions import PATHS, plan_for, tensors
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.mace.network import pairs_of_elements
from forcetune.deployment.calculator import ForcetuneCalculator
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.kernels import splines
from forcetune.kernels.compiled import choice, convolution, splined_convolution, threads
from forcetune.kernels.compiled.choice import choose_kernels
from forcetune.kernels.compiled.splined_convolution import SplinedWeights
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.phase import Phase
from forcetune.kernels.splines import DEGREE, TOLERANCE, Tables, tabulate
from systems import backbone, cluster, crystal, frames_of

compiled_only = pytest.mark.skipif(choice.missing_reason() is not None, reason="there are no compiled kernels")


def waves(ratio: Tensor, kind: float = 0.0) -> list[Tensor]:
    """Smooth functions that are 0 at the cutoff and behind it, for two networks."""
    frequencies = torch.arange(1, 9, dtype=torch.float64)
    found = torch.sin(math.pi * frequencies * ratio + kind) * (1 - ratio).clamp(min=0).pow(3)
    return [found[:, :6], found[:, 6:]]


CHANNELS = [[2, 4], [2]]


def evaluated(tables: Tables, network: int, ratio: Tensor, kind: int = 0) -> tuple[Tensor, Tensor]:
    """Values and slopes of a network, (n, outputs), and these."""
    grid = tables.grid
    kinds = torch.full((len(ratio),), kind)
    places, weights, slopes = torch.ops.forcetune.spline_locate(ratio, kinds, list(grid.breaks), list(grid.intervals))
    paths = CHANNELS[network]
    parts = tables.values[network].split([tables.values[network].numel() * c // sum(paths) for c in paths])
    table = torch.cat([part.view(-1, c) for part, c in zip(parts, paths, strict=True)], dim=1)
    rows = table[places.unsqueeze(1) + torch.arange(DEGREE + 1)]
    return torch.einsum("er,erc->ec", weights, rows), torch.einsum("er,erc->ec", slopes, rows)


def test_values_and_slopes_of_every_kind_and_network() -> None:
    kinds = (0.0, 0.7)
    tables = tabulate(waves, kinds, (), CHANNELS)
    assert tables is not None
    assert tables.error <= TOLERANCE
    ratio = torch.linspace(splines.LEAST, 0.99999, 997, dtype=torch.float64).unsqueeze(1).requires_grad_()
    for index, kind in enumerate(kinds):
        for network in range(2):
            expected = waves(ratio, kind)[network]
            found, slopes = evaluated(tables, network, ratio, index)
            assert torch.allclose(found, expected, rtol=0, atol=2e-13)
            for column in range(expected.shape[1]):
                (by_ratio,) = torch.autograd.grad(expected[:, column].sum(), ratio, retain_graph=True)
                assert torch.allclose(slopes[:, column], by_ratio[:, 0], rtol=0, atol=1e-10)


def test_nothing_is_left_from_the_cutoff_on() -> None:
    tables = tabulate(waves, (0.0,), (), CHANNELS)
    assert tables is not None
    found, slopes = evaluated(tables, 0, torch.tensor([[1.0], [1.3], [2.0]], dtype=torch.float64))
    assert not found.any()
    assert not slopes.any()


def test_a_kink_needs_a_break() -> None:
    def kinked(ratio: Tensor, kind: float) -> list[Tensor]:
        return [values * (1 + (ratio - 0.6).clamp(min=0)) for values in waves(ratio)]

    assert tabulate(kinked, (0.0,), (), CHANNELS) is None
    tables = tabulate(kinked, (0.0,), (0.6,), CHANNELS)
    assert tables is not None
    ratio = torch.linspace(0.1, 0.999, 300, dtype=torch.float64).unsqueeze(1)
    assert torch.allclose(evaluated(tables, 0, ratio)[0], kinked(ratio, 0.0)[0], rtol=0, atol=2e-13)


def test_functions_that_do_not_end_at_the_cutoff_have_no_tables() -> None:
    assert tabulate(lambda ratio, _: [values + 0.1 for values in waves(ratio)], (0.0,), (), CHANNELS) is None


def test_tables_that_would_be_too_large_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splines, "LARGEST", 1000)
    assert tabulate(waves, (0.0,), (), CHANNELS) is None


def test_distances_below_the_tables_are_refused() -> None:
    with pytest.raises(splines.TooCloseError):
        torch.ops.forcetune.spline_locate(
            torch.tensor([[splines.LEAST / 2]]), torch.zeros(1, dtype=torch.int64), [0.04, 1.0], [512]
        )


# ---- convolution -----------------------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("name", ["cluster", "crystal", "one way", "no edges"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_convolution_is_that_of_its_weights(
    name: str, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "thread_count", lambda _: count)
    plan, _ = plan_for(name)
    splined, radial, joined, features = random_splines(plan, dtype)
    flat = [splined.lengths, joined, *features]
    found, expected = (
        [*out, *torch.autograd.grad([(part**2).sum() for part in out], flat, materialize_grads=True)]
        for out in (
            [*splined_convolution.convolve(PATHS, plan, splined, joined, features)],
            [*convolution.convolve(PATHS, plan, radial, joined, features)],
        )
    )
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        assert torch.allclose(one, other, rtol=0, atol=scale * (1e-12 if dtype == torch.float64 else 2e-5))


def random_splines(
    plan: Plan, dtype: torch.dtype, *, contiguous: bool = True
) -> tuple[SplinedWeights, Tensor, Tensor, list[Tensor]]:
    """Splined weights, the same as a matrix that depends on their distances, coupled harmonics and features."""
    _, angular, features = tensors(plan)
    joined = torch.cat([x.detach().to(dtype) for x in angular], dim=1).requires_grad_()
    inputs = [x.detach().to(dtype) for x in features]
    if not contiguous:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    generator = torch.Generator().manual_seed(2)
    rows, n = 30, plan.n_pairs
    parts = [torch.randn(rows, c, generator=generator, dtype=dtype) for c in PATHS.channels]
    lengths = torch.rand(n, 1, generator=generator, dtype=dtype).requires_grad_()
    places = torch.randint(0, rows - DEGREE, (n,), generator=generator)
    weights, slopes = (torch.randn(n, DEGREE + 1, generator=generator, dtype=dtype) for _ in range(2))
    chosen = torch.cat(parts, dim=1)[places.unsqueeze(1) + torch.arange(DEGREE + 1)]
    # weights that change with the lengths at the rate of the slopes
    radial = torch.einsum("er,erc->ec", weights + slopes * (lengths - lengths.detach()), chosen)
    splined = SplinedWeights(lengths, torch.cat([part.flatten() for part in parts]), places, weights, slopes)
    return splined, radial, joined, [x.requires_grad_() for x in inputs]


@compiled_only
@pytest.mark.parametrize("name", ["cluster", "crystal", "one way", "no edges"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_derivatives_are_those_of_its_weights(
    name: str, count: int, dtype: torch.dtype, contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all gradients along any directions, by what the results are multiplied with, and by the features."""
    monkeypatch.setattr(threads, "thread_count", lambda _: count)
    plan, _ = plan_for(name)
    splined, radial, joined, features = random_splines(plan, dtype, contiguous=contiguous)
    generator = torch.Generator().manual_seed(3)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    geometry, phase = [splined.lengths, joined, *features], Phase()
    outputs = [
        splined_convolution.convolve(PATHS, plan, splined, joined, features, phase=phase),
        convolution.convolve(PATHS, plan, radial, joined, features),
    ]
    factors = [random(*out.shape).requires_grad_() for out in outputs[0]]
    directions = [random(*x.shape) for x in geometry]
    slopes_of = [
        torch.autograd.grad(out, geometry, factors, create_graph=True, materialize_grads=True) for out in outputs
    ]
    phase.forces_are_done()
    for chosen_directions in ([0], [1], [2], range(len(geometry))):
        found, expected = (
            torch.autograd.grad(
                torch.stack([(along[i] * directions[i]).sum() for i in chosen_directions]).sum(),
                [*factors, *features],
                retain_graph=True,
                materialize_grads=True,
            )
            for along in slopes_of
        )
        for one, other in zip(found, expected, strict=True):
            scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
            assert torch.allclose(one, other, rtol=0, atol=scale * (1e-12 if dtype == torch.float64 else 2e-5))


@compiled_only
def test_a_second_derivative_by_the_distances_is_an_error() -> None:
    plan, _ = plan_for("cluster")
    _, angular, features = tensors(plan)
    n = plan.n_pairs
    ones = torch.ones(n, DEGREE + 1, dtype=torch.float64)
    table = torch.ones((DEGREE + 1) * sum(PATHS.channels), dtype=torch.float64)
    lengths = torch.ones(n, 1, dtype=torch.float64, requires_grad=True)
    splined = SplinedWeights(lengths, table, torch.zeros(n, dtype=torch.int64), ones, ones)
    out = splined_convolution.convolve(PATHS, plan, splined, torch.cat(angular, dim=1), features)
    (slope,) = torch.autograd.grad(out[0].square().sum(), lengths, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives by the distances"):
        slope.sum().backward()


# ---- models ----------------------------------------------------------------------------------------------------------


def frozen(model: Any) -> Any:
    model.model.requires_grad_(False)
    return model


MACE: dict[str, dict[str, Any]] = {
    "default": {},
    "Agnesi": {"distance_transform": "Agnesi"},
    "Soft": {"distance_transform": "Soft"},
    "gaussian": {"radial_type": "gaussian"},
    "density": {
        "first": "RealAgnosticDensityInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
    },
    "float32": {"dtype": torch.float32},
}


def compared(model: Any, batch: Batch) -> bool:
    """Whether splines computed it; asserts that energies, forces and stress are the same with them and without."""
    tolerance = 1e-10 if model.dtype == torch.float64 else 1e-4
    choose_kernels(model.model, "torch")
    expected = model.predict(batch, stress=True)
    choose_kernels(model.model, "compiled")
    model.model._splines._cache = None
    found = model.predict(batch, stress=True)
    pairs = ((found.energy, expected.energy), (found.forces, expected.forces), (found.stress, expected.stress))
    for one, other in pairs:
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=0, atol=tolerance * max(1.0, float(other.detach().abs().max())))
    cached = model.model._splines._cache
    return cached is not None and cached.tables is not None


def batch_of(model: Any, *structures: Any) -> Batch:
    return collate(build_graphs(model, frames_of(*structures))).to(dtype=model.dtype)


@compiled_only
@pytest.mark.parametrize("name", list(MACE))
def test_mace_with_splines(name: str) -> None:
    model = frozen(backbone(**MACE[name]))
    assert compared(model, batch_of(model, cluster(), cluster()[:1], crystal()))


@compiled_only
@pytest.mark.parametrize("name", [name for name, r in sevennet_models.RECIPES.items() if r.species != "univ"])
def test_sevennet_with_splines(name: str) -> None:
    recipe = sevennet_models.RECIPES[name]
    model = frozen(sevennet_models.backbone_of(recipe))
    used = compared(model, batch_of(model, *sevennet_models.structures(recipe.symbols)))
    assert used == (model.model.architecture.radial_activation in ("silu", "tanh", "ssp"))


@compiled_only
@pytest.mark.parametrize("name", list(nequip_models.RECIPES))
def test_nequip_with_splines(name: str) -> None:
    model = frozen(nequip_models.backbone_of(nequip_models.RECIPES[name]))
    chosen = [z for z in (1, 6, 7, 8) if z in model.elements]
    assert compared(model, batch_of(model, cluster(chosen), cluster(chosen)[:1], crystal(chosen)))


@compiled_only
def test_forces_are_the_slopes_of_energies_across_the_cutoff() -> None:
    model = frozen(backbone())
    step = 1e-4
    for distance in (1.1, 2.3, model.cutoff - 0.05, model.cutoff - 1e-3):
        atoms = cluster()[:2]
        energies = []
        for change in (-step, step):
            atoms.positions = [[0, 0, 0], [0, 0, distance + change]]
            energies.append(float(model.predict(batch_of(model, atoms)).energy))
        atoms.positions = [[0, 0, 0], [0, 0, distance]]
        force = float(model.predict(batch_of(model, atoms)).forces[1, 2])
        assert force == pytest.approx(-(energies[1] - energies[0]) / (2 * step), abs=1e-6)


@compiled_only
def test_atoms_closer_than_the_tables_are_computed_exactly() -> None:
    model = frozen(backbone())
    atoms = cluster()
    atoms.positions[1] = atoms.positions[0] + [0, 0, 0.5 * splines.LEAST * model.cutoff]
    assert compared(model, batch_of(model, atoms))  # there are tables, but not so far down


@compiled_only
@pytest.mark.parametrize("place", ["radial_embedding.bessel_fn.bessel_weights", "interactions.1.conv_tp_weights"])
def test_tables_follow_the_weights(place: str) -> None:
    model = frozen(backbone())
    batch = batch_of(model, cluster())
    before = model.predict(batch).energy
    with torch.no_grad():
        if "bessel" in place:
            model.model.radial_embedding.bessel_fn.bessel_weights.mul_(1.01)
        else:
            model.model.interactions[1].conv_tp_weights.layer0.weight.mul_(1.01)
    after = model.predict(batch).energy
    assert abs(float(after - before)) > 1e-8
    choose_kernels(model.model, "torch")
    assert float(after) == pytest.approx(float(model.predict(batch).energy), abs=1e-10)


@compiled_only
def test_what_trains_is_not_splined() -> None:
    model = backbone()
    model.predict(batch_of(model, cluster()))
    assert model.model._splines._cache is None
    attach(model, method("elora"))
    model.predict(batch_of(model, cluster()))
    assert model.model._splines._cache is None
    # forces of positions that are differentiated outside have second derivatives by them
    frozen(model := backbone())
    batch = batch_of(model, cluster())
    batch.positions.requires_grad_()
    model.predict(batch)
    assert model.model._splines._cache is None


def gradients_of_a_step(model: Any, batch: Batch) -> list[Tensor]:
    """Of a loss of energies, forces and stress, by all that trains."""
    prediction = model.predict(batch, stress=True, create_graph=True)
    loss = prediction.energy.square().sum() + 10 * prediction.forces.square().sum()
    loss = loss + 10 * prediction.stress.square().sum()
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, trained))


def same_steps(model: Any, batch: Batch) -> bool:
    """Whether splines computed a step; asserts that every gradient is the same with them and without."""
    tolerance = 1e-10 if model.dtype == torch.float64 else 1e-3
    choose_kernels(model.model, "torch")
    expected = gradients_of_a_step(model, batch)
    choose_kernels(model.model, "compiled")
    model.model._splines._cache = None
    found = gradients_of_a_step(model, batch)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=tolerance * largest)
    cached = model.model._splines._cache
    return cached is not None and cached.tables is not None


@compiled_only
@pytest.mark.parametrize("chosen", ["mmea-pure", "readout", "adapter"])
@pytest.mark.parametrize("name", list(MACE))
def test_steps_of_mace_with_splines(name: str, chosen: str) -> None:
    model = frozen(backbone(**MACE[name]))
    attach(model, method(chosen))
    assert same_steps(model, batch_of(model, cluster(), cluster()[:1], crystal()))


@compiled_only
def test_steps_of_sevennet_with_splines() -> None:
    recipe = next(iter(sevennet_models.RECIPES.values()))
    model = frozen(sevennet_models.backbone_of(recipe))
    assert model.model.architecture.radial_activation == "silu"
    attach(model, method("readout"))
    assert same_steps(model, batch_of(model, *sevennet_models.structures(recipe.symbols)))


@compiled_only
def test_steps_of_nequip_with_splines() -> None:
    model = frozen(nequip_models.backbone_of(next(iter(nequip_models.RECIPES.values()))))
    attach(model, method("readout"))
    chosen = [z for z in (1, 6, 7, 8) if z in model.elements]
    assert same_steps(model, batch_of(model, cluster(chosen), cluster(chosen)[:1], crystal(chosen)))


@compiled_only
def test_gradients_of_steps_are_those_of_finite_differences() -> None:
    model = frozen(backbone())
    model.model.products[0].linear.requires_grad_(True)
    (weight,) = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    batch = batch_of(model, crystal())
    (gradient,) = gradients_of_a_step(model, batch)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    losses, step = [], 1e-5
    for sign in (-1, 1):
        with torch.no_grad():
            weight += sign * step * direction
            prediction = model.predict(batch, stress=True).detached()
            weight -= sign * step * direction
        terms = (prediction.energy.square(), 10 * prediction.forces.square(), 10 * prediction.stress.square())
        losses.append(float(sum(term.sum() for term in terms)))  # pyright: ignore[reportArgumentType]
    slope = (losses[1] - losses[0]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)


@compiled_only
def test_a_copy_has_tables_of_its_own() -> None:
    model = frozen(backbone())
    batch = batch_of(model, cluster())
    energy = model.predict(batch).energy
    other = copy.deepcopy(model)
    assert other.model._splines is not model.model._splines
    with torch.no_grad():
        other.model.interactions[0].conv_tp_weights.layer0.weight.mul_(1.1)
    assert abs(float(other.predict(batch).energy - energy)) > 1e-8
    assert float(model.predict(batch).energy) == float(energy)


@compiled_only
def test_recorded_predictions_have_splines_and_leave_them_where_atoms_come_too_close() -> None:
    model = frozen(backbone())
    atoms = cluster()
    atoms.calc = calculator = ForcetuneCalculator(model)
    rng = np.random.default_rng(0)
    forces = np.zeros(0)
    for _ in range(34):
        atoms.positions += rng.normal(scale=1e-3, size=atoms.positions.shape)
        forces = atoms.get_forces()
    assert calculator.compiled.recording is not None, calculator.compiled.eager_reason
    choose_kernels(model.model, "torch")
    expected = model.predict(batch_of(model, atoms)).forces.numpy()
    assert np.allclose(forces, expected, rtol=0, atol=1e-10)
    choose_kernels(model.model, "compiled")
    atoms.positions[1] = atoms.positions[0] + [0, 0, 0.9 * splines.LEAST * model.cutoff]
    forces = atoms.get_forces()
    choose_kernels(model.model, "torch")
    expected = model.predict(batch_of(model, atoms)).forces.numpy()
    assert np.allclose(forces, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def test_functions_that_no_density_fits_are_given_up_early() -> None:
    sizes = []

    def kinked(ratio: Tensor, kind: int) -> list[Tensor]:
        sizes.append(len(ratio))
        return [((ratio - 0.3712).abs() - (1 - 0.3712)) * (ratio < 1)]

    assert splines.tabulate(kinked, [0, 1, 2], (), [(1,)]) is None
    assert sum(sizes) < 8 * 1024  # two densities of one kind


@compiled_only
def test_distances_that_are_no_numbers_take_the_network() -> None:
    with pytest.raises(splines.TooCloseError):
        splines._locate(torch.tensor([0.5, math.nan]), torch.zeros(2, dtype=torch.int64), [0.04, 1.0], [512])
    _, weights, slopes = splines._locate(torch.tensor([1e30]), torch.zeros(1, dtype=torch.int64), [0.04, 1.0], [512])
    assert not weights.any() and not slopes.any()


def test_tables_are_for_all_elements_of_a_model_and_only_where_kernels_are_compiled() -> None:
    """With other kernels a plan is not asked which elements it has: on a GPU that would wait for the device."""
    kinds, table = pairs_of_elements((1, 6, 8))
    assert kinds == [(1, 1), (1, 6), (1, 8), (6, 6), (6, 8), (8, 8)]
    assert table.tolist() == [[0, 1, 2], [1, 3, 4], [2, 4, 5]]
    model = frozen(backbone(**MACE["Agnesi"]))
    choose_kernels(model.model, "torch")
    plan = SimpleNamespace()  # anything that is asked of it is an error
    assert model.model._splined(plan, Phase(twice=False), torch.ones(3, 1, dtype=torch.float64), None) is None
