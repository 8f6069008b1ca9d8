"""The loss: published form, variants, missing labels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from forcetune.backbones.protocol import Prediction
from forcetune.config import LossConfig, TrainingConfig
from forcetune.graphs.graph import Batch, build_graph, collate, split_batch
from forcetune.training.label_weights import settle
from forcetune.training.losses import LossSums, compute_loss, label_weights
from systems import cluster, frames_of


def batch_of(energies: list[float], forces: float = 0.0) -> Batch:
    graphs = []
    for size, energy in zip((2, 4), energies, strict=True):
        graph = build_graph(frames_of(cluster(atoms=size))[0], 4.0)
        label = torch.tensor([energy], dtype=torch.float64)
        graphs.append(replace(graph, energy=label, forces=torch.full((size, 3), forces, dtype=torch.float64)))
    return collate(graphs)


def prediction(energy: list[float], forces: float = 0.0, stress: float | None = None) -> Prediction:
    tensor = torch.tensor(energy, dtype=torch.float64, requires_grad=True)
    stresses = None if stress is None else torch.full((2, 3, 3), stress, dtype=torch.float64)
    return Prediction(tensor, torch.full((6, 3), forces, dtype=torch.float64), stresses)


def test_published_form() -> None:
    loss = compute_loss(LossConfig(), prediction([1.0, 5.0], forces=0.3), batch_of([0.0, 2.0], forces=0.1))
    assert float(loss.detach()) == pytest.approx((1 + 9) / 2 + 1000 * 0.2**2)


def test_energy_per_atom() -> None:
    config = LossConfig(energy=2.0, forces=0.0, energy_per_atom=True)
    loss = compute_loss(config, prediction([1.0, 5.0]), batch_of([0.0, 2.0]))
    assert float(loss.detach()) == pytest.approx(2 * ((1 / 2) ** 2 + (3 / 4) ** 2) / 2)


@pytest.mark.parametrize(
    ("form", "expected"), [("mae", (0.004 + 3.0) / 2), ("huber", (0.5 * 0.004**2 + 0.01 * (3.0 - 0.005)) / 2)]
)
def test_other_forms(form: str, expected: float) -> None:
    config = LossConfig.model_validate({"forces": 0.0, "form": form, "huber_delta": 0.01})
    loss = compute_loss(config, prediction([0.004, 5.0]), batch_of([0.0, 2.0]))
    assert float(loss.detach()) == pytest.approx(expected)


def test_missing_labels_count_for_nothing_and_have_finite_gradients() -> None:
    predicted = prediction([1.0, 5.0], stress=0.1)
    batch = batch_of([0.0, math.nan], forces=math.nan)
    loss = compute_loss(LossConfig(stress=7.0), predicted, batch)
    assert float(loss.detach()) == pytest.approx(1.0)
    loss.backward()
    assert predicted.energy.grad is not None
    assert predicted.energy.grad.tolist() == [2.0, 0.0]


def test_lengths_of_force_errors_count_once_for_each_atom_with_a_label() -> None:
    config = LossConfig(energy=0.0, forces=2.0, form="l1l2")
    batch = batch_of([0.0, 2.0], forces=0.1)
    batch.forces[0, 1] = math.nan
    predicted = prediction([1.0, 5.0], forces=0.3)
    predicted.forces.requires_grad_()
    predicted.forces.data[1] = 0.1  # no error, where a length has no derivative
    loss = compute_loss(config, predicted, batch)
    assert float(loss.detach()) == pytest.approx(2 * 4 / 5 * 0.2 * math.sqrt(3))
    loss.backward()
    assert predicted.forces.grad is not None
    expected = torch.full((6, 3), 2 / 5 / math.sqrt(3), dtype=torch.float64)
    expected[:2] = 0.0
    assert torch.allclose(predicted.forces.grad, expected)
    assert [float(weights) for weights in label_weights(config, batch)] == [2.0, 5.0]
    sums = LossSums(config)
    sums.add(predicted, batch)
    assert sums.loss() == pytest.approx(float(loss.detach()))


def test_a_prediction_that_is_no_number_is_never_passed_over() -> None:
    for form in ("mse", "huber", "mae", "universal", "l1l2"):
        config = LossConfig.model_validate({"form": form})
        predicted = prediction([1.0, 5.0])
        predicted.forces[3, 1] = math.nan
        assert math.isnan(float(compute_loss(config, predicted, batch_of([0.0, 2.0])).detach()))


def test_stress_per_atom_is_the_virial_of_each_atom() -> None:
    """Two atoms in 8 Å³ and four in 27 Å³; an atom without a cell has no stress."""
    cells = torch.stack([2.0 * torch.eye(3), 3.0 * torch.eye(3)]).double()
    batch = replace(batch_of([0.0, 0.0]), cell=cells, stress=torch.full((2, 3, 3), 0.1, dtype=torch.float64))
    config = LossConfig(stress=10.0, stress_per_atom=True)
    loss = compute_loss(config, prediction([0.0, 0.0], stress=0.3), batch)
    sizes = [int(count) for count in batch.atoms_per_graph]
    expected = 10 * ((0.2 * 8 / sizes[0]) ** 2 + (0.2 * 27 / sizes[1]) ** 2) / 2
    assert float(loss.detach()) == pytest.approx(expected)


def test_stress_term() -> None:
    batch = batch_of([0.0, 0.0])
    stress = torch.full((2, 3, 3), 0.1, dtype=torch.float64)
    stress[1] = math.nan
    loss = compute_loss(LossConfig(stress=10.0), prediction([0.0, 0.0], stress=0.3), replace(batch, stress=stress))
    assert float(loss.detach()) == pytest.approx(10 * 0.2**2)


def test_weights_of_the_file_multiply_errors_and_not_the_number_of_labels() -> None:
    config = LossConfig(forces=10.0, stress=7.0)
    factors = torch.tensor([[2.0, 0.5, 3.0, 1.0], [1.0, 4.0, 1.0, 1.0]], dtype=torch.float64)
    stress = torch.zeros(2, 3, 3, dtype=torch.float64)
    batch = replace(batch_of([0.0, 2.0], forces=0.1), stress=stress, file_weights=factors)
    predicted = prediction([1.0, 5.0], forces=0.3, stress=0.1)
    energy, forces, of_stress = (2 * 1 + 9) / 2, 0.2**2 * (2 * 0.5 + 4 * 4.0) / 6, 0.1**2 * (3 + 1) / 2
    expected = energy + 10 * forces + 7 * of_stress
    assert float(compute_loss(config, predicted, batch).detach()) == pytest.approx(expected)
    sums = LossSums(config)
    sums.add(predicted, batch)
    assert sums.loss() == pytest.approx(expected)
    # all frames ten times as heavy are ten times the loss, in batches of one, too
    heavy = replace(batch, file_weights=10 * factors)
    assert float(compute_loss(config, predicted, heavy).detach()) == pytest.approx(10 * expected)


def test_weights_of_a_file_reach_batches_and_their_parts() -> None:
    frames = [
        replace(frame, energy_weight=2.0 + k, stress_weight=0.5) for k, frame in enumerate(frames_of(*3 * [cluster()]))
    ]
    batch = collate([build_graph(frame, 4.0) for frame in frames]).to(dtype=torch.float32)
    assert batch.file_weights.dtype == torch.float64
    assert batch.file_weights.tolist() == [[2.0 + k, 1.0, 0.5, 1.0] for k in range(3)]
    assert torch.cat([part.file_weights for part in split_batch(batch, 2)]).equal(batch.file_weights)


@pytest.mark.parametrize(
    ("loss", "labelled", "magnetic", "stress"),
    [
        ({}, {"energy", "forces", "stress"}, False, 1e5),
        ({}, {"energy", "forces"}, False, 0.0),
        ({"stress": 0.0}, {"energy", "forces", "stress"}, False, 0.0),
        ({"stress": 7.0}, {"energy", "forces", "stress"}, False, 7.0),
        ({"forces": 10.0, "form": "huber"}, {"energy", "forces", "stress"}, False, 100.0),
        ({"forces": 1.0, "form": "huber"}, {"energy", "forces", "stress"}, True, 1.0),
        ({"forces": 10.0, "stress_per_atom": True}, {"energy", "forces", "stress"}, False, 10.0),
        ({"forces": 10.0, "form": "universal"}, {"energy", "forces", "stress"}, False, 100.0),
        ({"stress": 7.0}, {"energy", "forces"}, False, 7.0),
    ],
)
def test_weight_of_stress(loss: dict[str, Any], labelled: set[str], magnetic: bool, stress: float) -> None:
    config = TrainingConfig.model_validate({"loss": loss})
    settled = settle(config, labelled, magnetic)
    assert settled.loss.stress == settled.loss.stress_weight == stress
    assert config.loss.stress is loss.get("stress") or config.loss.stress == loss.get("stress")


def test_a_second_stage_has_a_weight_of_stress_of_its_own() -> None:
    assert settle(TrainingConfig(), {"energy", "forces", "stress"}).second_stage.loss.stress == 1e4


@pytest.mark.parametrize("label", ["energy", "forces"])
def test_labels_that_are_not_read_weigh_nothing(label: str) -> None:
    settled = settle(TrainingConfig(), {"energy", "forces"} - {label})
    assert getattr(settled.loss, label) == getattr(settled.second_stage.loss, label) == 0
    assert settled.loss.energy + settled.loss.forces > 0


def test_prediction_that_is_no_number_shows() -> None:
    assert math.isnan(float(compute_loss(LossConfig(), prediction([math.nan, 5.0]), batch_of([0.0, 2.0])).detach()))
