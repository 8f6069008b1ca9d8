"""Defaults that follow from other options: another method has its own, and a stored run repeats itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import forcetune
from forcetune.adapters.methods import build_method, method
from forcetune.config import RunConfig, load_config
from forcetune.errors import InputError
from forcetune.runs.method_defaults import with_run_defaults
from systems import write_labelled, write_model
from terminal import Command

LEAST: dict[str, Any] = {"data": {"train": ["a.xyz"]}, "model": {"model": "m"}}


def resolved(config: RunConfig) -> RunConfig:
    return with_run_defaults(config)


def stored(path: Path, *, record: bool = True, **options: Any) -> Path:
    """The ``config.yaml`` of a run; without the record as versions before it wrote it."""
    resolved(
        load_config(given=LEAST, overrides={key.replace("__", "."): value for key, value in options.items()})
    ).save(path)
    if not record:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        del content["defaults"]
        content["method"] = {"rank": None, "alpha": None, "wrap": None} | content["method"]
        if content["training"]["optimizer"] == "soap":  # which they did not know
            rate = {"full": 1e-3}.get(content["method"]["name"], 5e-3)
            theirs = {"optimizer": "adam", "learning_rate": rate, "ema": 0.995}
            given = {key.removeprefix("training__") for key in options}
            content["training"] |= {key: value for key, value in theirs.items() if key not in given}
        if "method__table" in options:
            content["method"]["name"] = "mmea"  # their default
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def chosen(config: RunConfig) -> tuple[Any, ...]:
    training = resolved(config).training
    return training.optimizer, training.learning_rate, training.ema


@pytest.mark.parametrize("record", [True, False], ids=["with record", "of an earlier version"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("mmea", "sparse", ("schedulefree", 1e-2, None)),
        ("sparse", "mmea", ("soap", 5e-3, None)),
        ("sparse-h", "full", ("soap", 2e-2, None)),
        ("scratch", "elora", ("soap", 5e-3, None)),
        ("elora", "scratch", ("adam", 1e-2, 0.995)),
        ("full", "sparse", ("schedulefree", 1e-2, None)),
    ],
)
def test_another_method_has_its_own_optimizer_and_rate(
    tmp_path: Path, first: str, second: str, expected: tuple[Any, ...], record: bool
) -> None:
    path = stored(tmp_path / "config.yaml", record=record, method__name=first)
    assert chosen(load_config(path, given={"method": {"name": second}})) == expected
    assert chosen(load_config(path, settings=[f"method.name={second}"])) == expected


@pytest.mark.parametrize("record", [True, False])
def test_what_was_given_stays(tmp_path: Path, record: bool) -> None:
    options = {"training__learning_rate": 7e-4, "training__ema": None}
    path = stored(tmp_path / "config.yaml", record=record, method__name="mmea", **options)
    assert chosen(load_config(path, given={"method": {"name": "sparse"}})) == ("schedulefree", 7e-4, None)
    assert chosen(load_config(path, given={"method": {"name": "full"}})) == ("soap", 7e-4, None)
    now = {"method": {"name": "full"}, "training": {"learning_rate": 2e-3}}
    assert chosen(load_config(path, given=now)) == ("soap", 2e-3, None)


@pytest.mark.parametrize("name", ["elora", "full", "mmea"])
def test_the_same_method_repeats_a_run_of_an_earlier_version(tmp_path: Path, name: str) -> None:
    path = stored(tmp_path / "config.yaml", record=False, method__name=name)
    adam = ("adam", 1e-3 if name == "full" else 5e-3, 0.995)
    assert chosen(load_config(path)) == chosen(load_config(path, given={"method": {"name": name}})) == adam
    # what decides today decided nothing then
    assert chosen(load_config(path, settings=["training.ema=null"])) == (*adam[:2], None)
    cosine = {"training__schedule__name": "cosine", "training__second_stage__start": 3}
    path = stored(tmp_path / "cosine.yaml", record=False, method__name=name, **cosine)
    plain = ["training.schedule.name=plateau", "training.second_stage.start=null"]
    assert chosen(load_config(path, settings=plain)) == adam
    # the same in a file that says what its defaults were chosen for
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = ("training.optimizer", "training.learning_rate", "training.ema")
    values = dict(zip(names, adam, strict=True))
    content["defaults"] = {"values": values, "for": {"method.name": name, "method.table": None, "model.model": "m"}}
    content["defaults"]["for"] |= {"training.optimizer": "adam"}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert chosen(load_config(path, settings=plain)) == adam
    assert chosen(load_config(path, given={"method": {"name": "gain"}}, settings=plain))[0] == "adam"
    other = "full" if name == "elora" else "elora"
    assert chosen(load_config(path, given={"method": {"name": other}}, settings=plain))[0] == "soap"


def test_what_was_given_stays_even_where_it_equals_a_default(tmp_path: Path) -> None:
    path = stored(tmp_path / "config.yaml", method__name="mmea", training__learning_rate=5e-3)
    assert chosen(load_config(path, given={"method": {"name": "full"}})) == ("soap", 5e-3, None)
    # a file that a user wrote holds what the user wants
    path.write_text("data: {train: [a]}\nmethod: {name: mmea}\ntraining: {learning_rate: 0.005}\n", encoding="utf-8")
    assert chosen(load_config(path, given={"method": {"name": "sparse"}})) == ("schedulefree", 5e-3, None)


def test_the_average_follows_the_optimizer(tmp_path: Path) -> None:
    path = stored(tmp_path / "config.yaml", method__name="sparse")
    assert chosen(load_config(path, settings=["training.optimizer=adamw"])) == ("adamw", 1e-2, 0.995)
    path = stored(tmp_path / "config.yaml", method__name="mmea")
    assert chosen(load_config(path, settings=["training.optimizer=schedulefree"])) == ("schedulefree", 5e-3, None)
    assert chosen(load_config(path, settings=["training.optimizer=adam"])) == ("adam", 5e-3, 0.995)


@pytest.mark.parametrize(
    "setting",
    [
        "training.ema=0.9",
        "training.schedule.name=cosine",
        "training.schedule.patience=2",
        "training.schedule.minimum=0",
    ],
)
def test_a_schedule_or_an_average_asks_for_an_optimizer_that_takes_it(tmp_path: Path, setting: str) -> None:
    ema = 0.9 if "ema" in setting else 0.995
    assert chosen(load_config(given=LEAST | {"method": {"name": "full"}}, settings=[setting])) == ("adam", 1e-3, ema)
    path = stored(tmp_path / "config.yaml", method__name="full")
    assert chosen(load_config(path)) == ("soap", 2e-2, None)
    # the rate follows the optimizer, which follows the setting
    assert chosen(load_config(path, settings=[setting])) == ("adam", 1e-3, ema)
    # what schedule-free optimizers take, or is their default, decides nothing
    for harmless in ("training.schedule.warmup_epochs=3", "training.ema=null", "training.schedule.name=plateau"):
        assert chosen(load_config(path, settings=[harmless])) == ("soap", 2e-2, None)
    # nor does it go with a magnetic layer or a second stage
    assert chosen(load_config(path, given={"magnetism": {"layer": "spin"}})) == ("adam", 1e-3, 0.995)
    assert chosen(load_config(path, settings=["training.second_stage.start=3"])) == ("adam", 1e-3, 0.995)
    with pytest.raises(InputError, match="schedule-free AdamW"):
        resolved(load_config(given=LEAST | {"method": {"name": "sparse"}}, settings=[setting]))


def test_soap_has_rates_of_its_own(tmp_path: Path) -> None:
    for name, rate, adam in (("full", 2e-2, 1e-3), ("elora", 5e-3, 5e-3), ("sparse", 1e-2, 1e-2), ("mmea", 5e-3, 5e-3)):
        path = stored(tmp_path / "config.yaml", method__name=name, training__optimizer="soap")
        assert chosen(load_config(path)) == ("soap", rate, None)
        assert chosen(load_config(path, settings=["training.optimizer=adamw"])) == ("adamw", adam, 0.995)
        path = stored(tmp_path / "config.yaml", method__name=name)
        assert chosen(load_config(path, settings=["training.optimizer=soap"])) == ("soap", rate, None)
    # on every base, while the other optimizers have those of the base
    assert method("elora").default_rate("soap", {"elora": 2e-3}) == 5e-3
    assert method("elora").default_rate(None, {"elora": 2e-3}) == 5e-3
    assert method("elora").default_rate("adam", {"elora": 2e-3}) == 2e-3
    with pytest.raises(InputError, match="schedule-free SOAP averages by itself"):
        load_config(given=LEAST, settings=["training.optimizer=soap", "training.ema=0.9"])
    with pytest.raises(InputError, match="schedule-free SOAP takes warmup_epochs only"):
        load_config(given=LEAST, settings=["training.optimizer=soap", "training.schedule.name=cosine"])


def test_a_stored_file_can_be_edited(tmp_path: Path) -> None:
    path = stored(tmp_path / "config.yaml", method__name="mmea")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("\n  learning_rate: 0.005\n  weight", "\n  learning_rate: 0.03\n  weight"), "utf-8")
    assert chosen(load_config(path, given={"method": {"name": "full"}})) == ("soap", 0.03, None)
    path.write_text(text.replace("method:\n  name: mmea", "method:\n  name: sparse"), "utf-8")
    assert chosen(load_config(path)) == ("schedulefree", 1e-2, None)


def test_a_default_that_changed_since_repeats_the_run(tmp_path: Path) -> None:
    """The stored value counts, whatever this version would choose."""
    config = load_config(given=LEAST | {"method": {"name": "elora"}}).with_method_defaults(3e-3, "adamw")
    config.save(tmp_path / "config.yaml")
    assert chosen(load_config(tmp_path / "config.yaml")) == ("adamw", 3e-3, 0.995)
    assert chosen(load_config(tmp_path / "config.yaml", given={"method": {"name": "gain"}})) == ("adam", 5e-3, 0.995)


@pytest.mark.parametrize("record", [True, False])
def test_the_loss_follows_the_magnetic_layer(tmp_path: Path, record: bool) -> None:
    def loss(config: RunConfig) -> tuple[Any, ...]:
        loss_config = resolved(config).training.loss
        return (
            loss_config.energy,
            loss_config.forces,
            loss_config.moments,
            loss_config.form,
            loss_config.energy_per_atom,
        )

    plain = stored(tmp_path / "plain.yaml", record=record)
    assert loss(load_config(plain)) == (1.0, 1000.0, 0.0, "mse", False)
    assert loss(load_config(plain, given={"magnetism": {"layer": "spin"}})) == (1.0, 1.0, 1.0, "huber", True)
    options = {"training__loss__forces": 30.0, "training__second_stage__start": 3, "training__second_stage__loss": {}}
    magnetic = stored(tmp_path / "magnetic.yaml", record=record, magnetism__layer="spin", **options)
    assert loss(load_config(magnetic)) == (1.0, 30.0, 1.0, "huber", True)
    assert resolved(load_config(magnetic)).training.second_stage.loss.energy == 10.0
    off = load_config(magnetic, settings=["magnetism.layer=off"])
    assert loss(off) == (1.0, 30.0, 0.0, "mse", False)
    second = resolved(off).training.second_stage.loss
    assert (second.energy, second.moments, second.form, second.energy_per_atom) == (1000.0, 0.0, "mse", True)
    # a second stage that begins only now
    without = stored(tmp_path / "without.yaml", record=record, magnetism__layer="spin")
    begun = resolved(load_config(without, settings=["training.second_stage.start=3"])).training.second_stage.loss
    assert (begun.energy, begun.forces, begun.form) == (10.0, 1.0, "huber")


@pytest.mark.parametrize("record", [True, False])
def test_a_table_of_its_own(tmp_path: Path, record: bool) -> None:
    table = {"linear": [{"update": "SoftThreshold"}], "readout": [{"update": "Dense"}]}
    path = stored(tmp_path / "config.yaml", record=record, method__table=table)
    assert build_method(load_config(path).method).name == "custom"
    assert chosen(load_config(path)) == ("schedulefree", 5e-3, None)
    assert build_method(load_config(path, given={"method": {"name": "mine"}}).method).name == "mine"
    with pytest.raises(InputError, match="leave the table out"):
        build_method(load_config(path, given={"method": {"name": "full"}}).method)
    other = load_config(path, settings=["method.table=null"], given={"method": {"name": "full"}})
    assert chosen(other) == ("soap", 2e-2, None)


@pytest.mark.parametrize("content", ["[1]", "{values: 3}", "{values: {training.seed: 3}, for: {}}", "nonsense"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"data: {{train: [a.xyz]}}\ndefaults: {content}\n", encoding="utf-8")
    with pytest.raises(InputError, match="defaults is written by forcetune; remove this part"):
        load_config(path)


def settings_of(run: Path) -> tuple[str, float]:
    config = load_config(run / "config.yaml").training
    assert config.optimizer is not None and config.learning_rate is not None
    return config.optimizer, config.learning_rate


def test_fit_and_compare_start_from_the_configuration_of_a_run(tmp_path: Path, command: Command) -> None:
    data, model = write_labelled(tmp_path / "a.xyz", 8), write_model(tmp_path / "m.model")
    first = forcetune.fit(data, model=model, method="mmea", valid=4, epochs=1, out=tmp_path / "one")
    config = first.folder / "config.yaml"
    assert command("fit", "--config", config, "--method", "sparse", "--out", tmp_path / "two")[0] == 0
    assert settings_of(tmp_path / "two") == ("schedulefree", 1e-2)
    assert command("compare", "--config", config, "--methods", "full,sparse", "--out", tmp_path / "both")[0] == 0
    assert settings_of(tmp_path / "both" / "full-1") == ("soap", 2e-2)
    assert settings_of(tmp_path / "both" / "sparse-1") == ("schedulefree", 1e-2)
    two, other = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("two", "both/sparse-1"))
    assert two.read_bytes() == other.read_bytes()
    # the same command finds its runs
    _, _, err = command("compare", "--config", config, "--methods", "full,sparse", "--out", tmp_path / "both")
    assert "2 of 2 runs are finished already" in err


def test_the_demo_has_options_for_every_optimizer(tmp_path: Path, command: Command) -> None:
    arguments = ("--out", tmp_path / "demo", "--picoseconds", 0.01, "--set", "training.epochs=2")
    assert command("demo", "--method", "sparse", *arguments)[0] == 0
    assert settings_of(tmp_path / "demo") == ("schedulefree", 1e-2)
    # an average asks for Adam, which has the demo's schedule
    again = ("--overwrite", "--method", "readout", "--set", "training.ema=0.9")
    for more in (again, (*again, "--method", "freeze")):
        assert command("demo", *arguments, *more)[0] == 0
        training = load_config(tmp_path / "demo" / "config.yaml").training
        assert (training.optimizer, training.ema, training.schedule.name) == ("adam", 0.9, "cosine")
