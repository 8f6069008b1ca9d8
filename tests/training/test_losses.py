"""The loss: published form, variants, missing labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from forcetune.backbones.protocol import Prediction
from forcetune.config import LossConfig
from forcetune.graphs.graph import Batch, collate, graph_of
from forcetune.training.losses import loss_of
from systems import cluster, frames_of


def batch_of(energies: list[float], forces: float = 0.0) -> Batch:
    graphs = []
    for size, energy in zip((2, 4), energies, strict=True):
        graph = graph_of(frames_of(cluster(atoms=size))[0], 4.0)
        label = torch.tensor([energy], dtype=torch.float64)
        graphs.append(replace(graph, energy=label, forces=torch.full((size, 3), forces, dtype=torch.float64)))
    return collate(graphs)


def prediction(energy: list[float], forces: float = 0.0, stress: float | None = None) -> Prediction:
    tensor = torch.tensor(energy, dtype=torch.float64, requires_grad=True)
    stresses = None if stress is None else torch.full((2, 3, 3), stress, dtype=torch.float64)
    return Prediction(tensor, torch.full((6, 3), forces, dtype=torch.float64), stresses)


def test_published_form() -> None:
    found = loss_of(LossConfig(), prediction([1.0, 5.0], forces=0.3), batch_of([0.0, 2.0], forces=0.1))
    assert float(found.detach()) == pytest.approx((1 + 9) / 2 + 1000 * 0.2**2)


def test_energy_per_atom() -> None:
    config = LossConfig(energy=2.0, forces=0.0, energy_per_atom=True)
    found = loss_of(config, prediction([1.0, 5.0]), batch_of([0.0, 2.0]))
    assert float(found.detach()) == pytest.approx(2 * ((1 / 2) ** 2 + (3 / 4) ** 2) / 2)


@pytest.mark.parametrize(
    ("form", "expected"), [("mae", (0.004 + 3.0) / 2), ("huber", (0.5 * 0.004**2 + 0.01 * (3.0 - 0.005)) / 2)]
)
def test_other_forms(form: str, expected: float) -> None:
    config = LossConfig.model_validate({"forces": 0.0, "form": form, "huber_delta": 0.01})
    found = loss_of(config, prediction([0.004, 5.0]), batch_of([0.0, 2.0]))
    assert float(found.detach()) == pytest.approx(expected)


def test_missing_labels_count_for_nothing_and_have_finite_gradients() -> None:
    predicted = prediction([1.0, 5.0], stress=0.1)
    batch = batch_of([0.0, math.nan], forces=math.nan)
    found = loss_of(LossConfig(stress=7.0), predicted, batch)
    assert float(found.detach()) == pytest.approx(1.0)
    found.backward()
    assert predicted.energy.grad is not None
    assert predicted.energy.grad.tolist() == [2.0, 0.0]


def test_stress_term() -> None:
    batch = batch_of([0.0, 0.0])
    stress = torch.full((2, 3, 3), 0.1, dtype=torch.float64)
    stress[1] = math.nan
    found = loss_of(LossConfig(stress=10.0), prediction([0.0, 0.0], stress=0.3), replace(batch, stress=stress))
    assert float(found.detach()) == pytest.approx(10 * 0.2**2)


def test_prediction_that_is_no_number_shows() -> None:
    assert math.isnan(float(loss_of(LossConfig(), prediction([math.nan, 5.0]), batch_of([0.0, 2.0])).detach()))
