"""Weights that are stored transposed, (outputs, inputs), as the radial layers of newer MACE models are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from forcetune.adapters.attach import Adapter, attach, detach
from forcetune.adapters.changes import weight_changes
from forcetune.adapters.file import CONFIG_NAME, TENSORS_NAME, load_adapter, save_adapter
from forcetune.adapters.gradients import within_budget
from forcetune.adapters.methods import Method, custom_method, method
from forcetune.adapters.updates.base import WeightUpdate
from forcetune.adapters.updates.gain import GainWeight
from forcetune.adapters.updates.low_rank import LowRankWeight
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.protocol import Site
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from models import make_mace
from systems import cluster, frames_of, perturb

NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"


@pytest.fixture(scope="module")
def model() -> MaceBackbone:
    # layers of 6 → 16 → 12 → …: a square one would hide which axis is which
    made = make_mace(elements=(1, 6, 8), first=NONLINEAR, later=NONLINEAR, radial_MLP=[16, 12])
    return MaceBackbone.from_module(made)


def radial_sites(adapter: Adapter) -> list[Site]:
    sites = [site for site in adapter.sites if site.kind == "radial_mlp" and site.paths[0].transposed]
    assert len(sites) > 2
    return sites


def weight_of(model: MaceBackbone, site: Site) -> Tensor:
    weight = model.model.get_submodule(site.module)._parameters[site.parameter]
    assert weight is not None
    return weight.detach()


def effective(model: MaceBackbone, adapter: Adapter, site: Site) -> Tensor:
    with torch.no_grad():
        return adapter.part(site, WeightUpdate)(weight_of(model, site))


def test_a_gain_scales_an_output(model: MaceBackbone) -> None:
    adapter = attach(model, method("gain"))
    for site in radial_sites(adapter):
        part, weight = adapter.part(site, GainWeight), weight_of(model, site)
        gains = part.gains["out->in"]
        assert gains.numel() == weight.shape[0]
        with torch.no_grad():
            gains.view(-1)[-1] = 0.5
        expected = weight.clone()
        expected[-1] *= 1.5
        assert torch.equal(effective(model, adapter, site), expected)
    changed = [row for row in weight_changes(model) if row.kind == "radial_mlp" and row.path == "out->in"]
    for row, site in zip(changed, radial_sites(adapter), strict=True):
        assert row.channels == pytest.approx(1 / site.paths[0].shape[0])
    detach(model)


def test_norms_are_those_of_outputs(model: MaceBackbone) -> None:
    adapter = attach(model, method("elora", rank=2, norms=True))
    perturb(adapter, 0.3)
    for site in radial_sites(adapter):
        part, weight = adapter.part(site, LowRankWeight), weight_of(model, site)
        norm = part.norm["out->in"]
        assert norm.shape == weight.shape[:1]
        norms = torch.linalg.vector_norm(effective(model, adapter, site), dim=1)
        torch.testing.assert_close(norms, norm.detach().abs(), rtol=1e-12, atol=0)
    detach(model)
    adapter = attach(model, method("elora", rank=2, norms=True))
    for site in radial_sites(adapter):  # a fresh one changes nothing
        torch.testing.assert_close(effective(model, adapter, site), weight_of(model, site), rtol=1e-12, atol=1e-15)
    detach(model)


def test_a_budget_counts_the_norms_of_outputs(model: MaceBackbone) -> None:
    whole = method("elora", norms=True)
    gradients = {site.name: torch.randn_like(weight_of(model, site)) for site in model.sites()}
    for budget in (9000, 12000):
        shared = within_budget(replace(whole, budget=budget), model.sites(), gradients)
        used = attach(model, shared).trainable
        detach(model)
        # what is left over is less than the next unit of rank
        assert budget - 200 < used <= budget


def earlier(name: str) -> Method:
    """The method as the version before wrote it: factors and norms along the last axis."""
    chosen = method(name) if name == "gain" else method(name, rank=2, norms=True)
    table = {
        kind: tuple(replace(update, axis="last") if hasattr(update, "axis") else update for update in updates)
        for kind, updates in chosen.table.items()
    }
    return replace(chosen, table=table)


@pytest.mark.parametrize("name", ["gain", "elora"])
def test_adapters_of_earlier_versions_give_the_same_numbers(model: MaceBackbone, tmp_path: Path, name: str) -> None:
    graphs = build_graphs(model, frames_of(cluster((1, 6, 8))))
    adapter = attach(model, earlier(name))
    perturb(adapter, 0.3)
    inputs = [weight_of(model, site).shape[1] for site in radial_sites(adapter)]
    shapes = [
        (adapter.part(site, GainWeight).gains if name == "gain" else adapter.part(site, LowRankWeight).norm)[
            "out->in"
        ].numel()
        for site in radial_sites(adapter)
    ]
    assert shapes == inputs
    expected = predict(model, graphs).forces
    save_adapter(model, tmp_path / "adapter")
    detach(model)
    # these had no such option
    path = tmp_path / "adapter" / CONFIG_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    removed = [update.pop("axis", None) for updates in content["method"]["table"].values() for update in updates]
    assert "last" in removed and "out" not in removed
    path.write_text(json.dumps(content), encoding="utf-8")
    for _ in range(2):  # and once more from what this version writes of it
        load_adapter(model, tmp_path / "adapter")
        assert np.array_equal(predict(model, graphs).forces, expected)
        save_adapter(model, tmp_path / "adapter")
        detach(model)
    assert '"axis": "last"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["gain", "elora"])
def test_new_adapters_come_back(model: MaceBackbone, tmp_path: Path, name: str) -> None:
    graphs = build_graphs(model, frames_of(cluster((1, 6, 8))))
    chosen = method(name) if name == "gain" else method(name, rank=2, norms=True)
    adapter = attach(model, chosen)
    perturb(adapter, 0.3)
    expected = predict(model, graphs).forces
    save_adapter(model, tmp_path / "adapter")
    detach(model)
    assert load_adapter(model, tmp_path / "adapter").method.table == chosen.table
    assert np.array_equal(predict(model, graphs).forces, expected)
    detach(model)
    assert (tmp_path / "adapter" / TENSORS_NAME).is_file()


def test_low_rank_without_norms_is_written_as_before() -> None:
    for chosen in (method("elora"), method("lora"), method("mmea")):
        assert "axis" not in json.dumps(chosen.to_json())
        assert Method.from_json(chosen.to_json()).table == chosen.table


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(InputError, match="axis: Input should be 'out' or 'last'"):
        custom_method("mine", {"linear": [{"update": "Gain", "axis": "first"}]})
