"""The sparse update: its equation, its file, its thresholds and how they are trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.build import molecule
from ase.io import write
from safetensors.torch import load_file

import forcetune
from forcetune.adapters.attach import attach, detach, require_adapter
from forcetune.adapters.changes import weight_changes
from forcetune.adapters.file import TENSORS_NAME, load_adapter, save_adapter
from forcetune.adapters.methods import Method, method
from forcetune.adapters.updates import SoftThreshold
from forcetune.adapters.updates.soft_threshold import SparseWeight
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.protocol import Site, WeightPath
from forcetune.config import TrainingConfig
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.training.optimizers import make_optimizer
from systems import backbone, cluster, frames_of, write_labelled, write_model

SITE = Site(
    "a.weight", "a", "weight", "a", "linear", (WeightPath("0e->0e", 0, (3, 4)), WeightPath("1o->1o", 12, (2, 4)))
)


def part(**options: object) -> SparseWeight:
    torch.manual_seed(0)
    return SparseWeight(SITE, torch.zeros(20, dtype=torch.float64), SoftThreshold(**options))  # pyright: ignore


def test_equation() -> None:
    layer = part(std=0.002)
    delta = 0.001
    assert layer.thresholds.item() == pytest.approx(delta, rel=1e-12)
    for x, value in zip(layer.change.tolist(), layer(torch.ones(20, dtype=torch.float64)).tolist(), strict=True):
        assert value == pytest.approx(1 + math.copysign(max(abs(x) - delta, 0), x), abs=1e-15)
    assert layer.n_changed() == sum(abs(x) > delta for x in layer.change.tolist()) < 20


def test_a_weight_below_the_threshold_has_no_gradient_and_the_threshold_has_one() -> None:
    layer = part(std=0.002)
    layer.update().square().sum().backward()
    assert layer.change.grad is not None and layer.tau.grad is not None
    below = layer.change.abs() < 0.001
    assert below.any()
    assert (layer.change.grad[below] == 0).all() and (layer.change.grad[~below] != 0).all()
    assert layer.tau.grad.item() < 0  # a higher threshold lowers this loss


def test_one_threshold_for_each_path() -> None:
    layer = part(per_path=True, std=1.0)
    with torch.no_grad():
        layer.tau.copy_(torch.tensor([-2.0, 50.0]))
    assert torch.count_nonzero(layer.update()[12:]) < 8
    with torch.no_grad():
        layer.change.fill_(0.9)
    assert torch.allclose(
        layer.update()[:12], torch.full((12,), 0.9 - torch.sigmoid(torch.tensor(-2.0)).item()).double()
    )
    assert (layer.update()[12:] == 0).all()


def test_packed_and_back() -> None:
    for per_path in (False, True):
        first, second = part(std=0.002, per_path=per_path), part(std=1.0, per_path=per_path)
        packed = first.packed()
        assert sum(len(packed[f"{path.name}/index"]) for path in SITE.paths) == first.n_changed()
        second.unpack(packed)
        assert (second.update() - first.update()).abs().max() < 1e-17
        assert second.n_changed() == first.n_changed()
    packed["0e->0e/index"] = packed["0e->0e/index"] + 12
    with pytest.raises(ValueError, match="outside of the weight"):
        second.unpack(packed)


@pytest.fixture
def model() -> MaceBackbone:
    return backbone()


def test_file_holds_the_changed_weights_only(model: MaceBackbone, tmp_path: Path) -> None:
    adapter = attach(model, method("sparse", threshold_decay=0.3))
    with torch.no_grad():
        for part in adapter.parts.values():
            assert isinstance(part, SparseWeight)
            part.tau.fill_(math.log(0.02 / 0.98))  # two standard deviations
    sparsity = adapter.sparsity()
    assert sparsity is not None
    assert 0.9 < sparsity.zeros_of_wrapped < sparsity.zeros_of_all < 1
    graphs = build_graphs(model, frames_of(cluster()))
    expected = predict(model, graphs)
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / TENSORS_NAME)
    assert sum(len(tensor) for name, tensor in stored.items() if name.endswith("/value")) == sparsity.changed
    assert (tmp_path / "adapter" / TENSORS_NAME).stat().st_size < 8 * sparsity.wrapped
    detach(model)
    load_adapter(model, tmp_path / "adapter")
    assert abs(predict(model, graphs).forces - expected.forces).max() < 1e-13
    assert require_adapter(model).sparsity() == sparsity
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["method"]["optimizer"] == "schedulefree"
    )


def test_thresholds_have_their_own_decoupled_decay(model: MaceBackbone) -> None:
    mine = Method("mine", {"linear": (SoftThreshold(threshold_decay=0.3, threshold_rate=2.0),)}, "")
    for optimizer in ("schedulefree", "adam", "adamw"):
        adapter = attach(model, mine)
        taus = {id(part.tau) for part in adapter.parts.values() if isinstance(part, SparseWeight)}
        made = make_optimizer(adapter, TrainingConfig(optimizer=optimizer), 1e-2, 10)  # pyright: ignore
        (own,) = [group for group in made.param_groups if any(id(p) in taus for p in group["params"])]
        assert {id(p) for p in own["params"]} == taus
        assert (own["weight_decay"], own["lr"], own["rate"]) == (0.3, 2e-2, 2.0)
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = adapter.parts[next(iter(adapter.parts))].tau.item()  # pyright: ignore
        if optimizer == "schedulefree":
            made.train()  # pyright: ignore
        made.step()
        after = adapter.parts[next(iter(adapter.parts))].tau.item()  # pyright: ignore
        assert after == pytest.approx(before * (1 - 2e-2 * 0.3), rel=1e-3)
        detach(model)


def test_wraps_and_bad_options() -> None:
    assert set(method("sparse", wrap="linears").table) == {"linear", "readout"}
    assert set(method("sparse-h", wrap="tensor_products").table) == {"tensor_product"}
    with pytest.raises(InputError, match="wrap: Input should be 'all'"):
        method("sparse", wrap="everything")
    with pytest.raises(InputError, match="threshold_decay: Input should be greater than or equal to 0"):
        method("sparse", threshold_decay=-1.0)


RESIDUAL = "RealAgnosticResidualInteractionBlock"
NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"


@pytest.mark.parametrize(
    ("first", "later", "replayed"),
    [("RealAgnosticInteractionBlock", RESIDUAL, False), (NONLINEAR, NONLINEAR, False), (RESIDUAL, RESIDUAL, True)],
)
def test_elements_that_nothing_is_trained_on_stay_as_they_were(
    tmp_path: Path, first: str, later: str, replayed: bool
) -> None:
    """In a model that is not cut, their rows would keep the noise of the start: they have no gradient."""
    model = write_model(tmp_path / "m.model", elements=(1, 6, 7, 8, 9), first=first, later=later)
    settings: dict[str, Any] = {"model.elements": "keep", "training.batch_size": 4}
    if replayed:
        amines = [molecule("CH3CONH2") for _ in range(8)]
        for seed, atoms in enumerate(amines):
            atoms.rattle(0.05, seed=seed)
        write(tmp_path / "replay.xyz", amines, format="extxyz")
        settings["replay.data"] = [str(tmp_path / "replay.xyz")]
    data = write_labelled(tmp_path / "a.xyz", 8)
    run = forcetune.fit(data, model=model, method="sparse", valid=4, epochs=2, out=tmp_path / "run", settings=settings)
    changes = [change for change in weight_changes(run.backbone) if change.elements]
    sites = {change.site for change in changes}
    assert "node_embedding.linear.weight" in sites
    assert any(name.endswith(("skip_tp.weight", "source_embedding.weight")) for name in sites)
    for change in changes:
        assert change.elements["F"] == 0
        assert (change.elements["N"] > 0) == replayed
        assert min(change.elements[symbol] for symbol in "HCO") > 0
