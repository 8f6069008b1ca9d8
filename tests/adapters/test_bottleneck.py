"""The conventional adapter: what it breaks is measured, and it is refused for use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import forcetune
from forcetune.adapters.attach import attach, detach
from forcetune.adapters.methods import METHODS, method
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.evaluation.symmetry import rotation_error
from systems import backbone, cluster, crystal, frames_of, perturb


def test_it_starts_as_the_model_and_then_breaks_rotational_symmetry() -> None:
    model = backbone()
    frames = frames_of(cluster(), crystal(), cluster((1, 6), 5, seed=2))
    before = predict(model, build_graphs(model, frames))
    assert rotation_error(model, frames).forces_mev_per_ang < 1e-6
    adapter = attach(model, method("adapter"))
    fresh = predict(model, build_graphs(model, frames))
    assert np.abs(fresh.forces - before.forces).max() < 1e-12
    perturb(adapter)
    broken = rotation_error(model, frames)
    assert broken.energy_mev_per_atom > 1e-2 and broken.forces_mev_per_ang > 1e-1
    detach(model)
    assert np.abs(predict(model, build_graphs(model, frames)).forces - before.forces).max() < 1e-12


def test_only_this_method_is_not_equivariant() -> None:
    assert [name for name in METHODS if not method(name).equivariant] == ["adapter"]
    model = backbone()
    frames = frames_of(cluster(), crystal())
    for name in ("mmea", "gain", "sparse"):
        perturb(attach(model, method(name)))
        assert rotation_error(model, frames).forces_mev_per_ang < 1e-6
        detach(model)


def test_it_is_reported_and_refused_in_ase(tmp_path: Path) -> None:
    options = {"training.batch_size": 20, "output.adapter_dtype": "float64"}
    frames = forcetune.demo_file("train")
    run = forcetune.fit(
        frames, model="mini", method="adapter", valid=10, epochs=1, out=tmp_path / "run", settings=options
    )
    stored = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))["rotation_error"]
    assert stored["forces_mev_per_ang"] > 0.1
    assert "Error under rotation" in (run.folder / "report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="breaks rotational symmetry"):
        forcetune.calculator(run.folder)
    with pytest.raises(InputError):
        forcetune.merge(run.folder, tmp_path / "merged.model")
