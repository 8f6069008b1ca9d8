"""Defaults that follow from the frames and the foundation model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import forcetune
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.config import RunConfig, load_config
from systems import write_labelled, write_model


def config_of(**training: object) -> RunConfig:
    return load_config(given={"data": {"train": ["a.xyz"]}, "training": training})


@pytest.mark.parametrize(
    ("frames", "epochs"), [(1, 500), (100, 500), (101, 476), (270, 185), (1000, 50), (2501, 20), (100_000, 20)]
)
def test_epochs_follow_from_the_number_of_frames(frames: int, epochs: int) -> None:
    assert config_of().with_default_epochs(frames).training.epochs == epochs


@pytest.mark.parametrize(
    "options", [{"epochs": 500}, {"epochs": 7}, {"second_stage": {"start": 400}}, {"batch_edges": 10_000}]
)
def test_epochs_that_were_asked_for_stay(options: dict[str, object]) -> None:
    config = config_of(**options)
    assert config.with_default_epochs(1000) == config


def test_fewer_epochs_never_leave_a_run_without_validation() -> None:
    assert config_of(valid_every=60).with_default_epochs(5000).training.epochs == 60


def test_default_rates_of_a_model_count_unless_one_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = write_labelled(tmp_path / "a.xyz"), write_model(tmp_path / "m.model")
    monkeypatch.setattr(MaceBackbone, "learning_rates", {"elora": 0.00125})
    options = {"model": model, "valid": 4, "epochs": 1}
    adam = {"training.optimizer": "adam"}
    chosen = forcetune.fit(data, method="elora", out=tmp_path / "chosen", settings=adam, **options)
    assert chosen.results["training"]["learning_rate"] == 0.00125
    given = forcetune.fit(
        data, method="elora", out=tmp_path / "given", settings={"training.learning_rate": 0.005}, **options
    )
    assert given.results["training"]["learning_rate"] == 0.005
    other = forcetune.fit(data, method="readout", out=tmp_path / "other", **options)
    assert other.results["training"]["learning_rate"] == 0.005

    # the configuration of a run repeats it, whatever the defaults are by then; another method has its own
    monkeypatch.setattr(MaceBackbone, "learning_rates", {"elora": 0.01, "readout": 0.02})
    repeated = forcetune.fit(config=tmp_path / "chosen" / "config.yaml", out=tmp_path / "repeated")
    assert repeated.results["training"]["learning_rate"] == 0.00125
    changed = forcetune.fit(config=tmp_path / "chosen" / "config.yaml", method="readout", out=tmp_path / "changed")
    assert changed.results["training"]["learning_rate"] == 0.02


def test_a_run_says_when_a_schedule_decides_for_an_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = write_labelled(tmp_path / "a.xyz"), write_model(tmp_path / "m.model")
    options = {"model": model, "valid": 4, "epochs": 1}
    said = "optimizer: adam, as a schedule or ema is given, instead of soap (full)"
    for setting, chosen in (("training.ema", "adam"), ("training.clip", "soap")):
        run = forcetune.fit(data, method="full", out=tmp_path / setting, settings={setting: 0.9}, **options)
        assert run.results["training"]["optimizer"] == chosen
        assert (said in capsys.readouterr().err) == (chosen == "adam")
    # nothing to say where it was asked for
    adam = {"training.ema": 0.9, "training.optimizer": "adam"}
    forcetune.fit(data, method="full", out=tmp_path / "asked", settings=adam, **options)
    assert "optimizer:" not in capsys.readouterr().err


def test_a_run_of_many_frames_says_its_epochs_and_repeats_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forcetune.config.run.DEFAULT_STEPS", 6)
    monkeypatch.setattr("forcetune.config.run.FEWEST_EPOCHS", 2)
    data, model = write_labelled(tmp_path / "a.xyz", 14), write_model(tmp_path / "m.model")
    settings = {"data.doctor": "off", "output.forgetting": False}  # ten frames of random weights
    first = forcetune.fit(data, model=model, method="readout", valid=4, out=tmp_path / "one", settings=settings)
    assert first.results["training"]["epochs"] == 3
    assert "epochs: 3, as 10 frames make 2 steps each; --epochs sets another number" in capsys.readouterr().err
    monkeypatch.setattr("forcetune.config.run.DEFAULT_STEPS", 12)
    again = forcetune.fit(config=tmp_path / "one" / "config.yaml", out=tmp_path / "two")
    assert again.results["training"]["epochs"] == 3
    assert first.after == again.after


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"second_stage": {"start": 450}}},
        {"training": {"batch_atoms": 200}},
        {"training": {"batch_size": 1}},
        {"data": {"train_frames": 50}},
        {"data": {"valid": 0.5}},
    ],
)
def test_epochs_are_settled_again_where_a_configuration_changes(tmp_path: Path, change: dict[str, Any]) -> None:
    config_of().with_default_epochs(1000).save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").training.epochs == 50
    changed = load_config(tmp_path / "config.yaml", given=change)
    assert changed.training.epochs == 500  # until the frames are counted
    assert changed.with_default_epochs(100).training.epochs in (100, 500)


def test_a_warm_up_is_never_most_of_a_run() -> None:
    assert config_of(schedule={"warmup_epochs": 30}).with_default_epochs(5000).training.epochs == 60
