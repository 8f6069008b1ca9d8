"""``forcetune config``, ``schema`` and ``cite``, completion in the shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from forcetune._version import __version__
from forcetune.adapters.methods import METHODS, option_names
from forcetune.backbones.registry import list_models
from forcetune.config import RunConfig, load_config
from forcetune.errors import InputError
from forcetune.runs.cite import LIBRARY_PAPERS, METHOD_PAPERS, OPTIMIZER_PAPERS, cite, read_bibliography
from forcetune.runs.schema import build_schema, explain_option, list_options, method_options
from systems import write_labelled, write_model
from terminal import Command

ROOT = Path(__file__).resolve().parents[2]


def cite_all() -> str:
    return "\n".join(read_bibliography().values())


def keys_of(text: str) -> list[str]:
    return re.findall(r"^@\w+\{([^,]+),", text, flags=re.MULTILINE)


def test_every_option_is_listed_with_a_description(command: Command) -> None:
    options = {option.name: option for option in list_options()}
    for section, field in RunConfig.model_fields.items():
        assert any(name.startswith(f"{section}.") for name in options), section
        assert field.annotation is not None
    assert [option.name for option in options.values() if not option.description] == []
    code, out, _ = command("config")
    assert code == 0
    assert out.splitlines()[0] == "data.train="
    assert "training.ema=0.995\n" in out
    assert "method.threshold_decay=0.01 (sparse), 0.3 (sparse-h)" in out


def test_options_of_methods_are_those_that_the_methods_take() -> None:
    for name, make in METHODS.items():
        assert set(method_options()[name]) == set(option_names(make))
    assert explain_option("method.rank").default == {"mmea": 16, "mmea-pure": 16, "elora": 16, "lora": 4, "adapter": 16}
    assert explain_option("method.layers").methods == ("freeze",)


def test_one_option_is_explained(command: Command) -> None:
    code, out, _ = command("config", "--explain", "training.epochs")
    assert code == 0
    words = [line.split(maxsplit=1) for line in out.splitlines()]
    assert words[0] == ["training.epochs"]
    assert ["type", "whole number, at least 1"] in words
    assert ["default", "500"] in words
    assert ["fit", "--epochs"] in words
    code, out, _ = command("config", "--explain", "method.rank", "--json")
    assert code == 0
    assert json.loads(out)["commands"] == {
        "demo": "--set method.rank=…",
        "fit": "--rank",
        "compare": "--set method.rank=…",
        "methods": "--rank",
        "learn": "--rank",
    }
    code, _, err = command("config", "--explain", "training.speed")
    assert code == 2
    assert "'training.speed': is no option; those of training are training.epochs" in err
    with pytest.raises(InputError, match="sections are data, model"):
        explain_option("speed")


VALID: list[dict[str, Any]] = [
    {"data": {"train": ["a.xyz"]}},
    {"data": {"train": ["a.xyz"], "valid": 0.2}, "method": {"rank": 8, "alpha": 4.0}},
    {"data": {"train": ["a.xyz"]}, "method": {"name": "mmea", "rank": 8, "gain": "linear"}},
    {"data": {"train": ["a.xyz"]}, "method": {"name": "elora", "budget": 100, "init": "gradient"}},
    {"data": {"train": ["a.xyz"]}, "method": {"name": "freeze", "layers": 2}, "training": {"ema": None}},
    {"data": {"train": ["a.xyz"]}, "method": {"name": "mine", "table": {"linear": [{"update": "Gate"}]}}},
    {"data": {"train": ["a.xyz"]}, "method": {"name": "lora", "alpha": None}},
]
INVALID: list[dict[str, Any]] = [
    {"data": {}},
    {"data": {"train": ["a.xyz"]}, "training": {"epochs": 0}},
    {"data": {"train": ["a.xyz"]}, "training": {"epoch": 3}},
    {"data": {"train": ["a.xyz"]}, "method": {"layers": 2}},
    {"data": {"train": ["a.xyz"]}, "method": {"gain": "linear"}},
    {"data": {"train": ["a.xyz"]}, "method": {"name": "freeze", "rank": 2}},
    {"data": {"train": ["a.xyz"]}, "method": {"name": "elora", "init": "zeros"}},
]


def test_the_schema_says_what_loading_says(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from forcetune.adapters.methods import build_method

    schema = build_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    path = tmp_path / "run.yaml"
    for content in VALID:
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        build_method(load_config(path).method)
        assert [error.message for error in validator.iter_errors(content)] == [], content
    for content in INVALID:
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        with pytest.raises(InputError):
            build_method(load_config(path).method)
        assert list(validator.iter_errors(content)), content
    config = load_config(given={"data": {"train": ["a.xyz"]}, "method": {"name": "sparse"}})
    config.save(path)
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert [error.message for error in validator.iter_errors(stored)] == []


def test_the_schema_is_printed_and_written(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("schema")
    assert code == 0
    schema = json.loads(out)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["data"]
    branches = {entry["if"]["properties"]["name"]["const"]: entry for entry in schema["$defs"]["MethodConfig"]["allOf"]}
    assert set(branches) == set(METHODS)
    layers = branches["freeze"]["then"]["properties"]["layers"]
    assert layers["anyOf"][0] == {"minimum": 1, "type": "integer"}
    assert layers["description"] == "How many interaction layers."
    code, out, _ = command("schema", "-o", tmp_path / "forcetune.schema.json")
    assert code == 0
    assert json.loads((tmp_path / "forcetune.schema.json").read_text(encoding="utf-8")) == schema
    code, _, err = command("schema", "-o", tmp_path)
    assert code == 2
    assert "is a folder" in err


def test_completion_in_the_shell() -> None:
    environment = os.environ | {
        "_FORCETUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": "forcetune mer",
        "COMP_CWORD": "1",
    }
    program = "from forcetune.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.stdout.split() == ["merge"]
    environment |= {"COMP_WORDS": "forcetune fit --learn", "COMP_CWORD": "2"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.stdout.split() == ["--learning-rate"]


def test_the_bibliography_is_whole() -> None:
    known = read_bibliography()
    papers = (*METHOD_PAPERS.values(), *LIBRARY_PAPERS.values(), *OPTIMIZER_PAPERS.values())
    used = {key for keys in papers for key in keys}
    for model in list_models():
        used |= set(keys_of(cite(model.name))) - {"forcetune"}
    used.add("liu2024dora")  # an option
    assert used == set(known)
    assert set(METHOD_PAPERS) == set(METHODS)
    for key, entry in known.items():
        assert entry.count("{") == entry.count("}"), key
        fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", entry, flags=re.MULTILINE))
        assert {"title", "author", "year"} <= set(fields), key
        assert {"doi", "eprint", "url"} & set(fields), key


def test_papers_of_models_and_methods() -> None:
    assert keys_of(cite("mmea")) == ["forcetune", "jin2026mmea", "wang2025elora"]
    assert keys_of(cite("mini")) == ["forcetune", "batatia2022mace", "bannwarth2019gfn2"]
    assert keys_of(cite("mace-off23-medium")) == ["forcetune", "batatia2022mace", "kovacs2023maceoff"]
    assert "kim2024multifidelity" in keys_of(cite("sevennet-mf-0"))
    assert keys_of(cite("sevennet-0-may2024"))[-1] == "chen2022m3gnet"
    assert "doi = {10.1021/jacs.4c07099}" in cite("mace-off23-medium")
    assert f"version = {{{__version__}}}" in cite("full")
    with pytest.raises(InputError, match="is no run folder, model or method"):
        cite("nobody")


def test_papers_of_a_run(command: Command, tmp_path: Path) -> None:
    data, model = write_labelled(tmp_path / "train.xyz"), write_model(tmp_path / "base.model")
    run = tmp_path / "run"
    settings = ("--method", "elora", "--set", "method.norms=true", "--set", "method.rank=2")
    code, _, err = command("fit", data, "--model", model, "--epochs", "1", "--out", run, *settings)
    assert code == 0, err
    code, out, _ = command("cite", run)
    assert code == 0
    soap = ["vyas2025soap", "defazio2024road"]
    assert keys_of(out) == ["forcetune", "wang2025elora", "liu2024dora", *soap, "batatia2022mace"]
    for optimizer, papers in (("soap", soap), ("schedulefree", soap[1:]), ("adam", [])):
        options = ("--method", "full", "--optimizer", optimizer, "--epochs", "1", "--out", tmp_path / optimizer)
        code, _, err = command("fit", data, "--model", model, *options)
        assert code == 0, err
        assert keys_of(cite(str(tmp_path / optimizer))) == ["forcetune", *papers, "batatia2022mace"]
    assert keys_of(cite(str(model))) == ["forcetune", "batatia2022mace"]


def test_the_citation_file_has_this_version() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert content["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    titles = {re.sub(r"[{}]", "", title) for title in re.findall(r"title = \{(.*)\},", cite_all())}
    assert {reference["title"].strip() for reference in content["references"]} <= titles
