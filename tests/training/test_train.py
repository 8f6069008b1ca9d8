"""Training: it learns, stops, keeps the best, and gives the same result for the same seed."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from forcetune.adapters.attach import attach, detach, get_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.config import ScheduleConfig, TrainingConfig
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Errors, build_graphs, predict
from forcetune.frames.read import frames_from_atoms
from forcetune.frames.references import reference_energies
from forcetune.runs.metrics import read_metrics
from forcetune.training.callbacks import METRICS_NAME, MetricsTable
from forcetune.training.module import FineTuning
from forcetune.training.optimizers import LearningRate
from forcetune.training.train import TrainingOutcome, train
from systems import backbone, labelled


@pytest.fixture(scope="module")
def model() -> MaceBackbone:
    """A small model with reference energies that fit the labels."""
    tuned = backbone(elements=(1, 6, 8))
    frames = frames_from_atoms(labelled(12)).frames
    energies = predict(tuned, build_graphs(tuned, frames)).energy
    fitted = reference_energies("estimate", frames, [], energies, tuned.reference_energies)
    tuned.set_reference_energies(fitted.energies)
    return tuned


def run(
    model: MaceBackbone, folder: Path, name: str = "mmea", rate: float = 5e-3, **options: Any
) -> tuple[TrainingOutcome, list[tuple[Errors, dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """Train for a few epochs; returns the outcome, what was saved as best and the last weights."""
    graphs = build_graphs(model, frames_from_atoms(labelled(12)).frames)
    adapter = attach(model, method(name))
    saved: list[tuple[Errors, dict[str, torch.Tensor]]] = []

    def keep(errors: Errors) -> None:
        saved.append((errors, {key: value.clone() for key, value in adapter.state_dict().items()}))

    config = TrainingConfig.model_validate({"epochs": 6, "batch_size": 3} | options)
    folder.mkdir(exist_ok=True)
    try:
        outcome = train(model, config, rate, graphs[:8], graphs[8:], folder, keep)
        return outcome, saved, {key: value.clone() for key, value in adapter.state_dict().items()}
    finally:
        if get_adapter(model) is not None:
            detach(model)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "schedulefree", "soap"])
def test_errors_fall(model: MaceBackbone, tmp_path: Path, optimizer: str) -> None:
    rate, share = (2e-3, 0.96) if optimizer == "soap" else (5e-3, 0.9)
    outcome, saved, _ = run(model, tmp_path, rate=rate, optimizer=optimizer, epochs=12)
    first, last = saved[0][0], saved[-1][0]
    assert first.forces_mae_mev_per_ang is not None
    assert last.forces_mae_mev_per_ang is not None
    assert last.forces_mae_mev_per_ang < share * first.forces_mae_mev_per_ang
    assert outcome.status == "finished"
    assert outcome.epochs_done == 12
    assert outcome.steps == 12 * 3
    table = rows(tmp_path)
    assert [row["epoch"] for row in table] == [str(epoch) for epoch in range(1, 13)]
    assert min(float(row["valid_loss"]) for row in table) == pytest.approx(outcome.best_valid_loss)


def test_same_seed_same_weights_other_seed_others(model: MaceBackbone, tmp_path: Path) -> None:
    first, again, other = (run(model, tmp_path, epochs=2, seed=seed)[2] for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_base_is_untouched(model: MaceBackbone, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    run(model, tmp_path, "full", epochs=2)
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_early_stopping_stops_and_best_is_not_last(model: MaceBackbone, tmp_path: Path) -> None:
    outcome, saved, last = run(
        model, tmp_path, "full", rate=0.3, epochs=40, early_stopping=3, ema=None, schedule={"name": "constant"}
    )
    assert outcome.status == "stopped early"
    assert outcome.epochs_done == outcome.best_epoch + 3 < 40
    assert len(rows(tmp_path)) == outcome.epochs_done
    assert any(not torch.equal(saved[-1][1][key], last[key]) for key in last)


def test_second_stage_changes_loss_and_rate_and_chooses_anew(model: MaceBackbone, tmp_path: Path) -> None:
    outcome, saved, _ = run(model, tmp_path, epochs=6, second_stage={"start": 4, "learning_rate": 1e-4})
    table = rows(tmp_path)
    assert [row["stage"] for row in table] == ["1", "1", "1", "2", "2", "2"]
    assert [float(row["learning_rate"]) for row in table] == pytest.approx([5e-3] * 3 + [1e-4] * 3)
    assert outcome.best_epoch >= 4
    assert len(saved) >= 2


@pytest.mark.parametrize(
    ("losses", "options", "stages", "ended"),
    [
        # losses of the validations; each stage stops after two without improvement
        ([5, 6, 7, 9, 8, 7], {"epochs": 40, "second_stage": {"start": 38}}, "111222", "finished"),
        ([5, 6, 7, 9, 10, 11], {"epochs": 40, "second_stage": {"start": 36}}, "111222", "stopped early"),
        ([5, 4, 3, 2], {"epochs": 4, "second_stage": {"start": 3}}, "1122", "finished"),
        ([5, 6, 7, 8], {"epochs": 4, "second_stage": {"start": 4}}, "1112", "finished"),
        # one planned epoch, and on to the next validation
        ([5, 6, 7, 9], {"epochs": 12, "valid_every": 2, "second_stage": {"start": 12}}, "11111122", "finished"),
        ([5, 6, 7], {"epochs": 40}, "111", "stopped early"),
    ],
)
def test_early_stopping_of_the_first_stage_begins_the_second(
    model: MaceBackbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
    options: dict[str, Any],
    stages: str,
    ended: str,
) -> None:
    validate, script = FineTuning._validation, iter(losses)
    monkeypatch.setattr(FineTuning, "_validation", lambda self, *given: (next(script), validate(self, *given)[1]))
    outcome, saved, _ = run(model, tmp_path, "readout", schedule={"name": "cosine"}, early_stopping=2, **options)
    table = rows(tmp_path)
    assert "".join(row["stage"] for row in table) == stages
    assert next(script, None) is None
    assert outcome.status == ended
    assert outcome.epochs_done == len(stages)
    second = [index for index, stage in enumerate(stages) if stage == "2"]
    if second:
        # the rate is that of the planned epochs
        skipped = options["second_stage"]["start"] - 1 - second[0]
        assert outcome.epochs_skipped == skipped
        schedule = LearningRate(ScheduleConfig(name="cosine"), 1e-3, options["epochs"])
        for index in second:
            assert float(table[index]["learning_rate"]) == pytest.approx(schedule.at(index + 1 + skipped))
        assert outcome.best_epoch > second[0]
        assert len(saved) >= 2


def test_moving_average_is_what_is_validated_and_saved(model: MaceBackbone, tmp_path: Path) -> None:
    _, saved, last = run(model, tmp_path, epochs=1)
    assert any(not torch.equal(saved[0][1][key], last[key]) for key in last)
    _, saved, last = run(model, tmp_path, epochs=1, ema=None)
    assert all(torch.equal(saved[0][1][key], last[key]) for key in last)


def test_budget_batches_take_every_frame_once(model: MaceBackbone, tmp_path: Path) -> None:
    outcome, _, _ = run(model, tmp_path, epochs=3, batch_atoms=13)
    assert outcome.steps == 3 * 4
    with pytest.raises(InputError, match=r"frame 0 of the set has 6 atoms, more than the budget of 5"):
        run(model, tmp_path, batch_atoms=5)


def test_validation_every_other_epoch_leaves_cells_empty(model: MaceBackbone, tmp_path: Path) -> None:
    run(model, tmp_path, epochs=4, valid_every=2)
    assert [row["valid_loss"] == "" for row in rows(tmp_path)] == [True, False, True, False]


def test_loss_that_leaves_the_numbers_is_told(model: MaceBackbone, tmp_path: Path) -> None:
    with pytest.raises(ForcetuneError, match=r"lower training\.learning_rate"):
        run(model, tmp_path, "full", rate=1e200, epochs=3, clip=None, ema=None)


def test_weights_without_labels_are_refused(model: MaceBackbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weighs stress by 1, but no training frame has stress labels"):
        run(model, tmp_path, loss={"stress": 1.0})
    with pytest.raises(InputError, match="every weight of the loss is zero"):
        run(model, tmp_path, loss={"energy": 0.0, "forces": 0.0})


def test_interrupt_keeps_what_was_best(model: MaceBackbone, tmp_path: Path) -> None:
    graphs = build_graphs(model, frames_from_atoms(labelled(12)).frames)
    attach(model, method("mmea"))
    saved: list[Errors] = []

    def interrupt_second(errors: Errors) -> None:
        saved.append(errors)
        if len(saved) == 2:
            raise KeyboardInterrupt

    config = TrainingConfig(epochs=50, batch_size=4)
    outcome = train(model, config, 5e-3, graphs[:8], graphs[8:], tmp_path, interrupt_second)
    detach(model)
    assert outcome.status == "interrupted"
    assert outcome.best_epoch == 1
    assert len(rows(tmp_path)) >= 1


def test_interrupt_before_anything_was_kept_goes_through(model: MaceBackbone, tmp_path: Path) -> None:
    graphs = build_graphs(model, frames_from_atoms(labelled(12)).frames)
    attach(model, method("mmea"))

    def interrupt(errors: Errors) -> None:
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(model, TrainingConfig(epochs=2), 5e-3, graphs[:8], graphs[8:], tmp_path, interrupt)
    detach(model)


def test_a_table_of_an_earlier_version_goes_on_with_more_columns(tmp_path: Path) -> None:
    earlier = "epoch,step,train_loss,seconds\n1,4,0.5,1.5\n2,8,0.4,3.0\n3,12"  # the last line was being written
    (tmp_path / METRICS_NAME).write_text(earlier, encoding="utf-8")
    MetricsTable(tmp_path).on_start(SimpleNamespace(epochs_done=2))  # pyright: ignore[reportArgumentType]
    metrics = read_metrics(tmp_path / METRICS_NAME)
    assert metrics is not None
    assert metrics["train_loss"].tolist() == [0.5, 0.4]
    assert np.isnan(metrics["valid_stress_mae_mev_per_ang3"]).all()
