"""Models that mace itself computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from forcetune.adapters.attach import attach, detach, merge_weights
from forcetune.adapters.methods import method
from forcetune.backbones.loading import load
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.trusted import LibraryMace
from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.protocol import Backbone
from forcetune.errors import ForcetuneError, ForcetuneWarning, InputError
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from models import make_mace, oracle
from systems import cluster, crystal, frames_of, perturb, write_model

UNKNOWN: dict[str, Any] = {"later": "RealAgnosticAttResidualInteractionBlock"}


def predictions(model: NetworkBackbone) -> Predictions:
    return predict(model, build_graphs(model, frames_of(crystal(), cluster())), stress=True)


def trusted(path: Path, **options: Any) -> LibraryMace:
    with pytest.warns(ForcetuneWarning, match="it is loaded as pickled code, as --trust allows"):
        model = load(path, trust=True, device="cpu", **options)
    assert isinstance(model, LibraryMace) and isinstance(model, Backbone)
    return model


def same(actual: Predictions, expected: Predictions, tolerance: float = 1e-10) -> None:
    for one, other in ((actual.energy, expected.energy), (actual.forces, expected.forces)):
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max()


def test_trust_lets_mace_compute(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.model", **UNKNOWN)
    with pytest.raises(
        InputError, match=r"RealAgnosticAttResidualInteractionBlock.*--trust runs its code and lets mace"
    ):
        load(path)
    model = trusted(path)
    same(predictions(model), predictions(oracle(make_mace(**UNKNOWN))), 1e-14)
    assert model.paired is None and model.elements == (1, 6, 7, 8) and "AttResidual" in model.reason
    single = trusted(path, dtype="float32")
    same(predictions(single), predictions(model), 1e-4)
    with pytest.raises(InputError, match="cannot be trained from scratch"):
        model.fresh_weights(0)


def test_trust_is_not_needed_for_what_forcetune_computes(tmp_path: Path) -> None:
    assert isinstance(load(write_model(tmp_path / "a.model"), trust=True), MaceBackbone)


@pytest.mark.parametrize("options", [UNKNOWN, UNKNOWN | {"hidden_irreps": "4x0e+4x0o+4x1o"}])
def test_adapters_train_merge_and_are_written(options: dict[str, Any], tmp_path: Path) -> None:
    """Also with weights that mace holds at zero, and that cannot be copied."""
    model = trusted(write_model(tmp_path / "a.model", **options))
    before = predictions(model)
    adapter = attach(model, method("elora"))
    perturb(adapter)
    tuned = predictions(model)
    assert np.abs(tuned.forces - before.forces).max() > 1e-6
    batch = build_graphs(model, frames_of(cluster()))[0]
    model.predict(batch, create_graph=True).forces.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    with pytest.raises(ForcetuneError, match="while an adapter is attached"):
        model.save(tmp_path / "b.model")
    merge_weights(model)
    model.save(tmp_path / "b.model")
    same(predictions(model.read_back(tmp_path / "b.model")), tuned)
    attach(model, method("mmea"))
    detach(model)
    same(predictions(model), tuned)


def test_heads_and_elements_of_trusted_models(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a.model", heads=("one", "two"), **UNKNOWN)
    with pytest.warns(ForcetuneWarning), pytest.raises(InputError, match="has the heads one, two; choose one"):
        load(path, trust=True)
    with pytest.warns(ForcetuneWarning), pytest.raises(InputError, match="no head 'three'"):
        load(path, trust=True, head="three")
    with pytest.warns(ForcetuneWarning), pytest.raises(InputError, match="does not know the atomic numbers 79"):
        load(path, trust=True, head="one", elements=[79])
    one, two = (trusted(path, head=head, elements=[1, 6]) for head in ("one", "two"))
    assert one.elements == (1, 6, 7, 8)
    assert abs(predictions(one).energy[0] - predictions(two).energy[0]) > 1e-3
    two.set_reference_energies({1: 3.0})
    two.save(tmp_path / "b.model")
    assert two.read_back(tmp_path / "b.model").reference_energies[1] == 3.0
    assert trusted(tmp_path / "b.model", head="one").reference_energies == one.reference_energies


def test_what_is_no_potential_of_mace_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.model")
    with pytest.warns(ForcetuneWarning), pytest.raises(InputError, match="is a Linear and no potential of mace"):
        load(tmp_path / "a.model", trust=True)
    (tmp_path / "b.model").write_bytes(b"nothing")
    with pytest.raises(InputError):
        load(tmp_path / "b.model", trust=True)


def test_unknown_elements_are_named() -> None:
    from ase import Atoms

    model = oracle(make_mace())
    with pytest.raises(InputError, match="element Au is unknown to"):
        model.predict(build_graphs(model, frames_of(Atoms("Au")))[0])
