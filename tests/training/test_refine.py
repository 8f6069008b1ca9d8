"""Second-order refinement: it lowers the training loss, keeps the best of the validation, and survives a crash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forcetune
from forcetune.adapters.attach import attach, require_adapter
from forcetune.adapters.methods import method
from forcetune.config import TrainingConfig
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.read import read_frames
from forcetune.graphs.graph import Batch, collate
from forcetune.runs import fit as run
from forcetune.runs import fitting
from forcetune.training.losses import compute_loss
from forcetune.training.refine import refine
from systems import backbone, write_labelled, write_model


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    frames = read_frames([write_labelled(tmp_path_factory.mktemp("data") / "frames.xyz", 12)]).frames
    return build_graphs(backbone(), frames)


@pytest.mark.parametrize("name", ["elora", "mmea"])
def test_lowers_the_training_loss_and_never_raises_the_validation_loss(graphs: list[Batch], name: str) -> None:
    model = backbone()
    attach(model, method(name))
    model.set_reference_energies({1: -500.0, 6: -500.0, 8: -500.0})
    config = TrainingConfig.model_validate({"refine": 8})
    seen: list[int] = []
    refinement = refine(model, config, graphs[:8], graphs[8:], progress=seen.append)
    assert refinement.train_loss_after < refinement.train_loss_before
    assert refinement.valid_loss_after < refinement.valid_loss_before
    assert 0 < refinement.best_iteration <= refinement.iterations <= 8 and seen == list(
        range(1, refinement.iterations + 1)
    )
    # the parameters left are those of the best iteration
    again = refine(model, TrainingConfig.model_validate({"refine": 1}), graphs[:8], graphs[8:])
    assert again.valid_loss_before == pytest.approx(refinement.valid_loss_after, rel=1e-9)


def test_the_loss_is_that_of_all_frames_at_once_whatever_their_labels(graphs: list[Batch]) -> None:
    """Batches in which few labels are known do not count as those with many."""
    model = backbone()
    attach(model, method("readout"))
    sparse = [
        replace(g, forces=torch.full_like(g.forces, torch.nan)) if i % 5 else g for i, g in enumerate(12 * graphs)
    ]
    config = TrainingConfig.model_validate({"refine": 1})
    expected = compute_loss(config.loss, model.predict(collate(sparse)).detached(), collate(sparse))
    refinement = refine(model, config, sparse, graphs[:2])
    assert refinement.train_loss_before == pytest.approx(float(expected), rel=1e-10)


def test_an_adapter_that_only_gets_worse_is_left_as_it_was(graphs: list[Batch]) -> None:
    model = backbone()
    attach(model, method("readout"))
    before = {name: value.clone() for name, value in require_adapter(model).state_dict().items()}
    # validation labels that the untouched model meets exactly
    perfect = []
    for graph in graphs[4:6]:
        result = model.predict(graph).detached()
        perfect.append(replace(graph, energy=result.energy, forces=result.forces))
    result = refine(model, TrainingConfig.model_validate({"refine": 20}), graphs[:4], perfect)
    assert result.best_iteration == 0 and result.iterations == 5 and result.valid_loss_after == result.valid_loss_before
    assert all(torch.equal(value, before[name]) for name, value in require_adapter(model).state_dict().items())


def test_a_run_refines_and_one_that_died_meanwhile_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, model = write_labelled(tmp_path / "frames.xyz", 12), write_model(tmp_path / "small.model")
    settings: dict[str, Any] = {"training.batch_size": 4, "training.refine": 3, "training.threads": 1}

    def fit(name: str) -> run.Run:
        return forcetune.fit(
            frames, model=model, method="elora", valid=4, epochs=2, out=tmp_path / name, settings=settings
        )

    peace = fit("peace")
    refinement = peace.results["training"]["refinement"]
    assert refinement["valid_loss_after"] <= refinement["valid_loss_before"]
    real = fitting.refine

    def dies(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        raise RuntimeError("killed")

    monkeypatch.setattr(fitting, "refine", dies)
    with pytest.raises(RuntimeError, match="killed"):
        fit("killed")
    monkeypatch.undo()
    again = forcetune.resume(tmp_path / "killed")
    assert again.results["training"]["refinement"] == refinement
    one, other = (load_file(actual.adapter / "adapter_model.safetensors") for actual in (peace, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    page = (tmp_path / "peace" / "report.html").read_text(encoding="utf-8")
    assert "refinement" in page
