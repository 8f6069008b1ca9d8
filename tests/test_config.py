"""The run configuration: one place for every option, priorities, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from forcetune.config import RunConfig, load_config, parse_setting
from forcetune.errors import InputError

LEAST: dict[str, Any] = {"data": {"train": ["a.xyz"]}, "model": {"model": "m"}}


def test_defaults_are_those_of_the_published_runs() -> None:
    training = load_config(given=LEAST).training
    assert (training.epochs, training.batch_size, training.ema, training.clip) == (500, 5, 0.995, 100.0)
    assert (training.loss.energy, training.loss.forces, training.loss.form) == (1.0, 1000.0, "mse")
    assert (training.schedule.factor, training.schedule.patience) == (0.8, 5)


def test_settings_win_over_options_and_options_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {epochs: 1, batch_size: 2, seed: 3}\nmodel: {model: x}\n", encoding="utf-8")
    given = LEAST | {"training": {"batch_size": 20, "seed": 30, "epochs": None}}
    found = load_config(path, ["training.seed=300", "training.ema=null", "training.schedule.name=cosine"], given)
    assert (found.training.epochs, found.training.batch_size, found.training.seed) == (1, 20, 300)
    assert found.training.ema is None
    assert found.training.schedule.name == "cosine"
    assert found.model.model == "m"
    other = load_config(given=LEAST, overrides={"training.learning_rate": 1e-3, "method.rank": 8})
    assert (other.training.learning_rate, other.method.rank) == (1e-3, 8)


def test_on_and_off_are_words_also_where_yaml_reads_them_as_truth_values(tmp_path: Path) -> None:
    found = load_config(settings=["data.doctor=off", "model.kernels=off"], given=LEAST)
    assert (found.data.doctor, found.model.kernels) == ("off", "off")
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: [a.xyz], doctor: off}\nmodel: {kernels: off}\n", encoding="utf-8")
    assert load_config(path).data.doctor == "off"
    with pytest.raises(InputError, match=r"model\.kernels"):
        load_config(settings=["model.kernels=on"], given=LEAST)


def test_saved_configuration_is_complete_and_reads_back(tmp_path: Path) -> None:
    config = load_config(given=LEAST | {"method": {"name": "elora", "rank": 4}})
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    again = tmp_path / "again.yaml"
    load_config(tmp_path / "config.yaml").save(again)
    assert again.read_bytes() == (tmp_path / "config.yaml").read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.b=1e-3", 1e-3), ("a.b=3", 3), ("a.b=null", None), ("a.b=[H, C]", ["H", "C"]), ("a.b=cosine", "cosine")],
)
def test_setting_values(text: str, expected: object) -> None:
    keys, value = parse_setting(text)
    assert keys == ["a", "b"]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": {}}, "data: is needed"),
        ({"training": {"epoch": 3}}, "training.epoch: there is no such option"),
        ({"training": {"epochs": 0}}, r"training.epochs: .*\(given: 0\)"),
        ({"training": {"ema": 1.5}}, "training.ema"),
        ({"training": {"epochs": 5, "second_stage": {"start": 9}}}, "lies after the last epoch"),
        ({"training": {"epochs": 5, "valid_every": 9}}, "valid_every is larger"),
        ({"training": {"epochs": 9, "valid_every": 4, "second_stage": {"start": 9}}}, r"last validation \(epoch 8\)"),
        ({"training": {"optimizer": "schedulefree", "schedule": {"name": "cosine"}}}, "takes warmup_epochs only"),
        ({"references": {"mode": "table"}}, "go together"),
        ({"references": {"table": {"H": 1.0}}}, "go together"),
        (
            {"data": {"train": ["a"], "stress_key": "none"}, "training": {"loss": {"stress": 1.0}}},
            "needs stress labels",
        ),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(given=LEAST | given)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for content, message in (("a: [", "not valid YAML"), ("- a", "is a mapping"), ("\x00", "not valid YAML")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            load_config(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_every_option_says_what_it_is() -> None:
    def check(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                check(inner)
            else:
                assert field.description, f"{section.__name__}.{name}"

    check(RunConfig)
