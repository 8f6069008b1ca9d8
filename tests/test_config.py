"""The run configuration: one place for every option, priorities, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from forcetune.config import DataConfig, LossConfig, RunConfig, TrainingConfig, load_config, parse_setting
from forcetune.errors import ForcetuneWarning, InputError

LEAST: dict[str, Any] = {"data": {"train": ["a.xyz"]}, "model": {"model": "m"}}


def test_defaults_are_those_of_the_published_runs() -> None:
    training = load_config(given=LEAST).training
    assert (training.epochs, training.batch_size, training.ema, training.clip) == (500, 5, 0.995, 100.0)
    assert (training.loss.energy, training.loss.forces, training.loss.form) == (1.0, 1000.0, "mse")
    assert (training.schedule.factor, training.schedule.patience) == (0.8, 5)


def test_settings_win_over_options_and_options_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {epochs: 1, batch_size: 2, seed: 3}\nmodel: {model: x}\n", encoding="utf-8")
    options = LEAST | {"training": {"batch_size": 20, "seed": 30, "epochs": None}}
    config = load_config(path, ["training.seed=300", "training.ema=null", "training.schedule.name=cosine"], options)
    assert (config.training.epochs, config.training.batch_size, config.training.seed) == (1, 20, 300)
    assert config.training.ema is None
    assert config.training.schedule.name == "cosine"
    assert config.model.model == "m"
    other = load_config(given=LEAST, overrides={"training.learning_rate": 1e-3, "method.rank": 8})
    assert (other.training.learning_rate, other.method.rank) == (1e-3, 8)


def test_on_and_off_are_words_also_where_yaml_reads_them_as_truth_values(tmp_path: Path) -> None:
    config = load_config(settings=["data.doctor=off", "training.compile=off"], given=LEAST)
    assert (config.data.doctor, config.training.compile) == ("off", "off")
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: [a.xyz], doctor: off}\n", encoding="utf-8")
    assert load_config(path).data.doctor == "off"
    with pytest.raises(InputError, match=r"data\.doctor"):
        load_config(settings=["data.doctor=auto"], given=LEAST)


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_kernels_that_are_off_are_those_of_torch(word: str, tmp_path: Path) -> None:
    path, written = tmp_path / "run.yaml", tmp_path / "again.yaml"
    path.write_text(f"data: {{train: [a.xyz]}}\nmodel: {{model: m, kernels: {word}}}\n", encoding="utf-8")
    with pytest.warns(ForcetuneWarning, match="model.kernels=off is an option of earlier versions") as warned:
        config = load_config(path)
    assert len(warned) == 1 and len(str(warned[0].message).splitlines()) == 1
    assert config.model.kernels == "torch" and config.model.model == "m"
    config.save(written)
    assert "kernels: torch" in written.read_text(encoding="utf-8")
    assert load_config(written) == config


def test_kernels_are_one_of_five(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: [a.xyz]}\nmodel: {kernels: auto}\n", encoding="utf-8")
    assert load_config(path).model.kernels == "auto"
    for name in ("compiled", "torch", "triton", "cuequivariance"):
        assert load_config(settings=[f"model.kernels={name}"], given=LEAST).model.kernels == name
    for word in ("on", "fast", "[1]", "{a: 1}", "null"):
        with pytest.raises(InputError, match=r"model\.kernels"):
            load_config(settings=[f"model.kernels={word}"], given=LEAST)


SWITCHES = {
    "data.doctor": ("on", "off"),
    "data.stream": ("auto", "on", "off"),
    "learn.check": ("on", "off"),
    "magnetism.layer": ("off",),
    "output.phonons": ("auto", "on", "off"),
    "training.compile": ("auto", "on", "off"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_takes_its_words_wherever_they_stand(name: str, tmp_path: Path) -> None:
    section, key = name.split(".")

    def get_value(config: RunConfig) -> str:
        return getattr(getattr(config, section), key)

    for word in SWITCHES[name]:
        assert get_value(load_config(settings=[f"{name}={word}"], given=LEAST)) == word
        assert get_value(load_config(given=LEAST, overrides={name: word})) == word
        path = tmp_path / f"{word}.yaml"
        content = {"data": "{train: [a.xyz]}", section: f"{{{key}: {word}}}"}
        if section == "data":
            content["data"] = f"{{train: [a.xyz], {key}: {word}}}"
        path.write_text("\n".join(f"{one}: {text}" for one, text in content.items()), encoding="utf-8")
        assert get_value(load_config(path)) == word
        if word in ("on", "off"):
            assert get_value(load_config(given=LEAST, overrides={name: word == "on"})) == word
            saved = tmp_path / "saved.yaml"
            load_config(path).save(saved)
            assert get_value(load_config(saved)) == word


def test_no_switch_is_left_out() -> None:
    """Every option with the word ``off`` is one of :data:`SWITCHES`."""
    switches = {
        f"{section}.{key}"
        for section, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key, option in field.annotation.model_fields.items()
        if "off" in get_args(option.annotation)
    }
    assert switches == set(SWITCHES)


@pytest.mark.parametrize("way", ["file", "set", "dotted", "nested", "models"])
def test_a_part_of_the_second_stage_leaves_its_other_options_as_they_are(way: str, tmp_path: Path) -> None:
    """The rest has the defaults of the second stage, which are not those of the first."""
    if way == "file":
        path = tmp_path / "run.yaml"
        text = "data: {train: [a.xyz]}\ntraining: {second_stage: {start: 3, loss: {energy: 500}}}\n"
        path.write_text(text, encoding="utf-8")
        config = load_config(path)
    elif way == "set":
        config = load_config(settings=["training.second_stage.loss.energy=500"], given=LEAST)
    elif way == "dotted":
        config = load_config(given=LEAST, overrides={"training.second_stage.loss.energy": 500})
    elif way == "nested":
        config = load_config(given=LEAST, overrides={"training": {"second_stage": {"loss": {"energy": 500}}}})
    else:
        training = TrainingConfig(second_stage={"loss": LossConfig(energy=500.0)})  # pyright: ignore
        config = RunConfig(data=DataConfig(train=["a.xyz"]), training=training)
    stage = config.training.second_stage
    assert (stage.loss.energy, stage.loss.forces, stage.loss.stress) == (500.0, 100.0, None)
    assert stage.loss.energy_per_atom and stage.learning_rate == 1e-3
    assert stage.loss.model_fields_set == {"energy"}
    assert (config.training.loss.forces, config.training.loss.energy_per_atom) == (1000.0, False)


def test_a_part_of_the_second_stage_beside_a_magnetic_layer() -> None:
    """There the defaults of the layer hold for what is not given."""
    settings = ["magnetism.layer=spin", "training.second_stage.start=3", "training.second_stage.loss.forces=7"]
    loss = load_config(settings=settings, given=LEAST).with_method_defaults(1e-3, "adam").training.second_stage.loss
    assert (loss.energy, loss.forces, loss.moments, loss.form) == (10.0, 7.0, 1.0, "huber")


def test_saved_configuration_is_complete_and_reads_back(tmp_path: Path) -> None:
    config = load_config(given=LEAST | {"method": {"name": "elora", "rank": 4}})
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    again = tmp_path / "again.yaml"
    load_config(tmp_path / "config.yaml").save(again)
    assert again.read_bytes() == (tmp_path / "config.yaml").read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1e-3", 1e-3),
        ("a.b=3", 3),
        ("a.b=-.5", -0.5),
        ("a.b=010", 10),
        ("a.b=0x10", 16),
        ("a.b=null", None),
        ("a.b=[H, C]", ["H", "C"]),
        ("a.b=cosine", "cosine"),
        ("a.b=1_000", "1_000"),
        ("a.b=infinity", "infinity"),
        ("a.b=nan", "nan"),
        ("a.b=1:30", "1:30"),
        ("a.b='12'", "12"),
    ],
)
def test_setting_values(text: str, expected: object) -> None:
    keys, value = parse_setting(text)
    assert keys == ["a", "b"]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": {}}, "data.train: name at least one file of training frames"),
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


NUMBERS = [
    *("training.learning_rate", "training.weight_decay", "training.clip", "training.schedule.minimum"),
    *("training.second_stage.learning_rate", "training.loss.energy", "training.loss.forces", "training.loss.stress"),
    *("training.loss.huber_delta", "training.second_stage.loss.forces", "replay.weight", "magnetism.learning_rate"),
    *("data.valid", "training.epochs", "references.table.H"),
]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "infinity", "nan", "1_000", "1:30"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite_and_written_as_numbers(name: str, value: str, tmp_path: Path) -> None:
    settings = ["references.mode=table"] if name.startswith("references") else []
    key = name.removesuffix(".H")
    with pytest.raises(InputError, match=rf"{key}.*: "):
        load_config(settings=[*settings, f"{name}={value}"], given=LEAST)
    content = value
    for part in reversed(name.split(".")[1:]):
        content = f"{{{part}: {content}}}"
    path = tmp_path / "run.yaml"
    path.write_text(f"{name.split('.')[0]}: {content}", encoding="utf-8")
    with pytest.raises(InputError, match=rf"run\.yaml: {key}.*: "):
        load_config(path, settings, {**LEAST, "data": {"train": ["a.xyz"]}})


def test_numbers_of_yaml_count_wherever_they_stand(tmp_path: Path) -> None:
    path, saved = tmp_path / "run.yaml", tmp_path / "saved.yaml"
    path.write_text(
        "data: {train: [a.xyz], valid: 1e-1}\nreferences: {mode: table, table: {H: -1.3e1}}\n"
        "method: {name: sparse, threshold: 1e-4, table: {linear: [{update: SoftThreshold, threshold: 2e-4}]}}\n"
        "training: {learning_rate: 1e-3, epochs: 012, clip: 5}\noutput: {run: 1e-3}\n",
        encoding="utf-8",
    )
    config = load_config(path)
    assert (config.data.valid, config.references.table) == (0.1, {"H": -13.0})
    assert (config.training.learning_rate, config.training.epochs, config.training.clip) == (1e-3, 12, 5.0)
    assert config.method.options() == {"threshold": 1e-4}
    assert config.method.table == {"linear": [{"update": "SoftThreshold", "threshold": 2e-4}]}
    assert config.output.run == "1e-3", "a name may look like a number"
    config.save(saved)
    assert load_config(saved) == config


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


def test_options_of_a_method_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    # earlier versions wrote every option that any method had
    path.write_text("data: {train: [a.xyz]}\nmethod: {name: elora, rank: 8, alpha: null, wrap: null}", encoding="utf-8")
    config = load_config(path)
    assert config.method.options() == {"rank": 8}
    config.save(path)
    assert load_config(path).method == config.method
    assert load_config(path, overrides={"method.rank": None}).method.options() == {}
    defaults = config.with_method_defaults(1e-3, "adam")
    assert defaults.method.options() == {"rank": 8} and "rank" in defaults.method.model_fields_set
