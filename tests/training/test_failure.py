"""Gradients that stay finite in mixed batches, and trainings that fail and say why."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from torch import Tensor

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones import network
from forcetune.config import LossConfig
from forcetune.errors import ForcetuneError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.magnetism.options import Magnetism
from forcetune.training.losses import compute_loss
from models import evaluate, make_mace
from systems import backbone, cluster, crystal, frames_of, perturb, write_model

# without a cell, with one, with two lattice vectors of three, with vacuum, and without a single edge
MOLECULE, CRYSTAL = cluster(), crystal()
SHEET = Atoms("CC", [[0, 0, 0], [0.7, 0.7, 1.2]], cell=[2.5, 2.5, 0], pbc=[True, True, False])
SLAB = Atoms("CC", [[0, 0, 0], [0.7, 0.7, 1.2]], cell=[2.5, 2.5, 15], pbc=[True, True, False])
LINE = Atoms("OCO", [[0, 0, -1.16], [0, 0, 0], [0, 0, 1.16]])
ATOM = Atoms("H", [[0, 0, 0]])
KINDS: dict[str, dict[str, Any]] = {
    "ScaleShiftMACE": {"kind": "ScaleShiftMACE"},
    "MACE": {"kind": "MACE"},
    "pair repulsion": {"pair_repulsion": True, "distance_transform": "Agnesi"},
}


def batch_of(model: Any, *structures: Atoms) -> Batch:
    """With labels of zeros; structures without a cell have no stress."""
    batch = collate(build_graphs(model, frames_of(*structures)))
    missing = torch.linalg.det(batch.cell).abs() == 0
    return replace(
        batch,
        energy=torch.zeros_like(batch.energy),
        forces=torch.zeros_like(batch.forces),
        stress=torch.where(missing[:, None, None], torch.nan, torch.zeros_like(batch.stress)),
        spins=torch.zeros_like(batch.spins),
        moments=torch.zeros_like(batch.moments),
    )


def gradients(model: Any, parameters: list[Any], config: LossConfig, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    loss = compute_loss(config, model.predict(batch, stress=True, create_graph=True), batch)
    slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, slopes, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mmea", "elora", "full", "sparse"])
def test_structures_without_a_volume_do_not_spoil_gradients(kind: str, name: str) -> None:
    """The loss of a mixed batch has the gradient that the loss over its parts adds up to, by both ways to compute."""
    structures = (MOLECULE, CRYSTAL, SHEET, SLAB, LINE, ATOM)
    config = LossConfig(stress=100.0)
    results = []
    for fast in (False, True):
        model = backbone(**KINDS[kind])
        adapter = attach(model, method(name))
        perturb(adapter)
        parameters = list(adapter.parameters())
        results.append(gradients(model, parameters, config, batch_of(model, *structures)))
        if not fast:
            # crystals alone have no volume to divide by that is zero
            alone = gradients(model, parameters, LossConfig(energy=0, forces=0, stress=1), batch_of(model, CRYSTAL))
            beside = LossConfig(energy=0, forces=0, stress=1)
            mixed = gradients(model, parameters, beside, batch_of(model, MOLECULE, CRYSTAL))
            for one, other in zip(alone[1], mixed[1], strict=True):
                torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    (loss, one), (again, other) = results
    assert loss.isfinite() and loss == pytest.approx(float(again), rel=1e-10)
    for left, right in zip(one, other, strict=True):
        assert left.isfinite().all()
        torch.testing.assert_close(right, left, rtol=1e-7, atol=1e-9 * float(left.abs().max()) + 1e-12)


@pytest.mark.parametrize("fast", [False, True], ids=["library", "kernels"])
@pytest.mark.parametrize("layer", ["spin", "magnitude"])
def test_magnetic_layers_without_spins_have_finite_gradients(layer: Any, fast: bool) -> None:
    model = backbone()
    options = Magnetism(
        layer=layer, inputs="moments", spin_orbit=layer == "spin", channels=8, radial=4, learning_rate=1e-3
    )
    adapter = attach(model, replace(method("elora"), magnetism=options))
    perturb(adapter)
    config = LossConfig(stress=100.0, moments=1.0)
    loss, slopes = gradients(model, list(adapter.parameters()), config, batch_of(model, MOLECULE, CRYSTAL, ATOM))
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in slopes)


@pytest.mark.parametrize("kind", KINDS)
def test_stress_is_that_of_the_library(kind: str) -> None:
    model = backbone(**KINDS[kind])
    expected = evaluate(make_mace(**KINDS[kind]), CRYSTAL).stress
    stress = model.predict(batch_of(model, MOLECULE, CRYSTAL), stress=True).stress
    assert stress is not None
    assert (stress[0] == 0).all()
    torch.testing.assert_close(stress[1], expected, rtol=1e-12, atol=1e-15)


def mixed(path: Path) -> Path:
    """Shaken molecules and crystals with labels of energy, forces and, where there is a cell, stress."""
    structures = []
    for seed in range(6):
        for make in (cluster, crystal):
            atoms = make(seed=seed + 1)
            results: dict[str, Any] = {"energy": -10.0 * len(atoms), "forces": torch.zeros(len(atoms), 3).numpy()}
            if atoms.pbc.all():
                results["stress"] = torch.zeros(6).numpy()
            atoms.calc = SinglePointCalculator(atoms, **results)
            structures.append(atoms)
    write(path, structures, format="extxyz")
    return path


@pytest.fixture
def fit(tmp_path: Path) -> Any:
    def run(**settings: Any) -> forcetune.Run:
        usual = {"data.doctor": "off", "training.loss.stress": 10.0, "training.compile": "off"}
        named = usual | {key.replace("__", "."): value for key, value in settings.items()}
        data, model = mixed(tmp_path / "a.xyz"), write_model(tmp_path / "m.model")
        return forcetune.fit(
            data, model=model, method="readout", valid=4, epochs=2, out=tmp_path / "run", settings=named
        )

    return run


def test_molecules_and_crystals_train_together(fit: Any) -> None:
    run = fit()
    assert run.after["train"].stress_mae_mev_per_ang3 is not None
    assert run.results["training"]["status"] == "finished"


def test_a_frame_with_a_gradient_that_is_not_finite_is_named(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library computes stress: a quotient by 0 that is replaced afterwards."""

    def as_the_library(slopes: Tensor, cell: Tensor) -> Tensor:
        quotient = slopes / torch.linalg.det(cell).abs().view(-1, 1, 1)
        return torch.where(quotient.abs() < 1e10, quotient, torch.zeros_like(quotient))

    monkeypatch.setattr(network, "per_volume", as_the_library)
    with pytest.raises(ForcetuneError) as failed:
        fit()
    text = str(failed.value)
    assert "not because of the learning rate" in text and "the gradient of the loss by the weights of" in text
    assert "a.xyz, frame" in text
    named = [int(number) for number in re.findall(r"a\.xyz, frame (\d+)", text)]
    assert named and all(number % 2 == 0 for number in named)  # the molecules


def test_a_rate_that_is_too_large_is_told_as_such(fit: Any) -> None:
    with pytest.raises(ForcetuneError, match=r"the weights diverged; lower training\.learning_rate \(now 1e\+"):
        fit(training__learning_rate=1e200, training__clip=None, training__ema=None)
