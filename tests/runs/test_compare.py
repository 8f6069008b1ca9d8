"""Methods side by side at the command line."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import forcetune
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.config import load_config
from forcetune.errors import ForcetuneError, ForcetuneWarning, InputError
from forcetune.reports.comparison import read_comparison
from forcetune.runs import compare as comparison
from forcetune.utils.option_defaults import is_given, set_value
from forcetune.utils.processes import WorkerDiedError
from systems import write_labelled, write_model
from terminal import Command

SCRIPT = """
from pathlib import Path
import forcetune
with open("started", "a") as stream:
    stream.write("x")
config = forcetune.load_config(given={
    "data": {"train": ["a.xyz"], "valid": 4}, "model": {"model": "m.model"},
    "training": {"epochs": 1}, "output": {"run": "compared", "forgetting": False},
})
run = forcetune.compare(config, ["readout", "gain"], processes=2)
Path("losses").write_text(repr([row.valid_loss.mean for row in run.comparison.methods]))
"""


@pytest.mark.parametrize("way", ["file", "standard input"])
def test_a_script_without_a_guard_compares_in_processes(tmp_path: Path, way: str) -> None:
    """It hung, and every process ran the script once more."""
    write_labelled(tmp_path / "a.xyz", 8)
    write_model(tmp_path / "m.model")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    arguments = [sys.executable, "-W", "ignore", "script.py" if way == "file" else "-"]
    script = None if way == "file" else SCRIPT
    ended = subprocess.run(
        arguments, cwd=tmp_path, input=script, capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "started").read_text(encoding="utf-8") == "x"
    config = forcetune.load_config(
        given={
            "data": {"train": [str(tmp_path / "a.xyz")], "valid": 4},
            "model": {"model": str(tmp_path / "m.model")},
            "training": {"epochs": 1},
            "output": {"run": str(tmp_path / "one"), "forgetting": False},
        }
    )
    run = forcetune.compare(config, ["readout", "gain"])
    losses = [row.valid_loss.mean for row in run.comparison.methods]
    assert ast.literal_eval((tmp_path / "losses").read_text(encoding="utf-8")) == pytest.approx(losses, rel=1e-6)


def test_a_process_that_is_killed_leaves_the_other_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "as_they_end", _as_if_one_was_killed)
    options = {
        "data": {"train": [str(write_labelled(tmp_path / "a.xyz", 8))], "valid": 4},
        "model": {"model": str(write_model(tmp_path / "m.model"))},
        "training": {"epochs": 1},
        "output": {"run": str(tmp_path / "compared")},
    }
    config = forcetune.load_config(given=options)
    with pytest.raises(ForcetuneError, match=r"gain-1: a worker process was killed .* The other runs are kept"):
        forcetune.compare(config, ["readout", "gain"], processes=2)
    assert (tmp_path / "compared" / "readout-1" / "results.json").is_file()
    assert not (tmp_path / "compared" / "gain-1").exists()


def _as_if_one_was_killed(work: Any, jobs: Any, workers: int, *, option: str) -> Any:
    for job in jobs:
        killed = job.method.name == "gain"
        yield job, WorkerDiedError(job, -9, option) if killed else work(job)


def test_methods_and_seeds_side_by_side(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "compared"
    arguments = [forcetune.demo_file("train"), "--methods", "readout,elora", "--out", out, "--epochs", 2, "--valid", 10]
    arguments += ["--set", "training.batch_size=20"]
    code, text, _ = command("compare", *arguments, "--seeds", 2)
    assert code == 0
    assert "zero-shot" in text and "lowest validation loss" in text and "over 2 seeds" in text
    runs = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert runs == ["elora-1", "elora-2", "readout-1", "readout-2"]
    stored = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert stored["split"] == "valid"
    losses = {method["name"]: method["valid_loss"]["mean"] for method in stored["methods"]}
    assert losses[stored["recommended"]] == min(losses.values())
    for method in stored["methods"]:
        results = [
            json.loads((out / f"{method['name']}-{seed}" / "results.json").read_text(encoding="utf-8"))
            for seed in method["seeds"]
        ]
        actual = [one["errors"]["valid"]["after"]["forces_mae_mev_per_ang"] for one in results]
        errors = method["errors"]["forces_mae_mev_per_ang"]
        assert errors["values"] == actual and errors["mean"] == pytest.approx(sum(actual) / 2)
        assert method["steps"] == 4 and method["trainable"] == results[0]["parameters"]["trainable"]
        assert method["epochs_to_target"]["mean"] <= 2
    rates = {method["name"]: method["learning_rate"] for method in stored["methods"]}
    assert rates == {"readout": 5e-3, "elora": 5e-3}
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "Recommendation" in page and 'href="elora-2/report.html"' in page and page.count("<svg") == 4

    # finished runs are not repeated, a new method joins them, another option repeats all
    before = (out / "elora-1" / "results.json").stat().st_mtime_ns
    code, text, err = command("compare", *arguments, "--methods", "readout,elora,gain", "--json")
    assert code == 0 and "2 of 3 runs are finished already" in err
    assert [method["name"] for method in json.loads(text)["methods"]] == ["readout", "elora", "gain"]
    assert (out / "elora-1" / "results.json").stat().st_mtime_ns == before
    (out / "elora-1" / "results.json").unlink()  # as if it had died: it goes on from its last epoch
    assert command("compare", *arguments, "--methods", "elora")[0] == 0
    again = json.loads((out / "elora-1" / "results.json").read_text(encoding="utf-8"))
    elora = next(method for method in stored["methods"] if method["name"] == "elora")
    first = elora["errors"]["forces_mae_mev_per_ang"]["values"][0]
    assert again["errors"]["valid"]["after"]["forces_mae_mev_per_ang"] == first
    assert command("compare", *arguments, "--methods", "elora", "--set", "training.loss.energy=2")[0] == 0
    assert (out / "elora-1" / "results.json").stat().st_mtime_ns > before


def test_runs_that_join_earlier_ones_have_their_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored runs are as those of a version with other defaults."""
    config = forcetune.load_config(
        given={
            "data": {"train": [str(write_labelled(tmp_path / "a.xyz", 8))], "valid": 4},
            "model": {"model": str(write_model(tmp_path / "m.model"))},
            "training": {"epochs": 1},
            "output": {"run": str(tmp_path / "compared"), "forgetting": False},
        }
    )
    monkeypatch.setattr(MaceBackbone, "learning_rates", {"readout": 0.007})
    forcetune.compare(config, ["readout"])
    change_defaults(tmp_path / "compared" / "readout-1", {"training.loss.stress": 0.0})
    monkeypatch.setattr(MaceBackbone, "learning_rates", {"readout": 0.001, "gain": 0.002})
    capsys.readouterr()
    run = forcetune.compare(config, ["readout", "gain"], seeds=2)
    out = capsys.readouterr().err
    assert "1 of 4 runs are finished already" in out
    assert "as in the runs that are there: training.learning_rate=0.007 (readout), training.loss.stress=0" in out
    assert [row.learning_rate for row in run.comparison.methods] == [0.007, 0.002]
    for name in ("readout-2", "gain-1", "gain-2"):
        stored = load_config(tmp_path / "compared" / name / "config.yaml")
        assert stored.training.loss.stress == 0.0
        assert not is_given(stored, "training.loss.stress") and not is_given(stored, "training.learning_rate")
    # the same command finds everything done
    forcetune.compare(config, ["readout", "gain"], seeds=2)
    assert "4 of 4 runs are finished already" in capsys.readouterr().err

    change_defaults(tmp_path / "compared" / "gain-2", {"training.learning_rate": 0.005})
    before = (tmp_path / "compared" / "comparison.json").read_bytes()
    with pytest.raises(InputError, match=r"gain-2 has training.learning_rate 0.005 and gain-1 0.002, .* --set"):
        forcetune.compare(config, ["readout", "gain"], seeds=3)
    assert not (tmp_path / "compared" / "gain-3").exists()
    assert (tmp_path / "compared" / "comparison.json").read_bytes() == before
    # another method has a learning rate of its own, so that these may differ
    forcetune.compare(config, ["readout"], seeds=2)
    # given, it is the same for all, and runs with another one are made again
    config = forcetune.load_config(
        given=config.model_dump(exclude_unset=True) | {"training": {"epochs": 1, "learning_rate": 0.003}}
    )
    run = forcetune.compare(config, ["readout", "gain"], seeds=2)
    assert [row.learning_rate for row in run.comparison.methods] == [0.003, 0.003]


def test_runs_that_join_those_of_another_optimizer_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a version whose methods trained with Adam."""
    options: dict[str, Any] = {
        "data": {"train": [str(write_labelled(tmp_path / "a.xyz", 8))], "valid": 4},
        "model": {"model": str(write_model(tmp_path / "m.model"))},
        "training": {"epochs": 1},
        "output": {"run": str(tmp_path / "compared"), "forgetting": False},
    }
    config = forcetune.load_config(given=options)
    forcetune.compare(config, ["elora"])
    earlier = {"training.optimizer": "adam", "training.learning_rate": 0.002, "training.ema": 0.995}
    change_defaults(tmp_path / "compared" / "elora-1", earlier)
    capsys.readouterr()
    message = r"trained by another version: elora with adam \(now soap\)\. Write --set training\.optimizer="
    with pytest.warns(ForcetuneWarning, match=message):
        forcetune.compare(config, ["elora", "full"], seeds=2)
    out = capsys.readouterr().err
    assert "1 of 4 runs are finished already" in out
    assert "training.learning_rate=0.002 (elora), training.optimizer=adam (elora)" in out
    chosen = {
        name: load_config(tmp_path / "compared" / name / "config.yaml").training
        for name in ("elora-1", "elora-2", "full-1", "full-2")
    }
    settings = {name: (one.optimizer, one.learning_rate, one.ema) for name, one in chosen.items()}
    adam, soap = ("adam", 0.002, 0.995), ("soap", 0.02, None)
    assert settings == {"elora-1": adam, "elora-2": adam, "full-1": soap, "full-2": soap}
    with pytest.warns(ForcetuneWarning, match=message):
        forcetune.compare(config, ["elora", "full"], seeds=2)
    assert "4 of 4 runs are finished already" in capsys.readouterr().err


def change_defaults(run: Path, values: dict[str, Any]) -> None:
    """Other defaults in a stored configuration, as another version of forcetune would have written them."""
    content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    for name, value in values.items():
        set_value(content, name, value)
        content["defaults"]["values"][name] = value
        if name in content["defaults"]["for"]:
            content["defaults"]["for"][name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def test_several_processes_give_the_same(tmp_path: Path) -> None:
    config = forcetune.load_config(
        given={
            "data": {"train": [str(forcetune.demo_file("train"))], "valid": 10},
            "training": {"epochs": 1, "batch_size": 20},
            "output": {"run": str(tmp_path / "one")},
        }
    )
    one = forcetune.compare(config, ["readout", "gain"])
    config = config.model_copy(update={"output": config.output.model_copy(update={"run": str(tmp_path / "two")})})
    two = forcetune.compare(config, ["readout", "gain"], processes=2)
    for first, second in zip(one.comparison.methods, two.comparison.methods, strict=True):
        assert first.valid_loss.mean == pytest.approx(second.valid_loss.mean, rel=1e-6)


def test_bad_input(tmp_path: Path, command: Command) -> None:
    frames, out = forcetune.demo_file("train"), tmp_path / "out"
    for options, message in (
        (["--methods", "elora,elora"], "name every method once"),
        (["--methods", "elora,peft"], "there is no method 'peft'"),
        (["--methods", "elora", "--set", "data.energy_key=nothing"], "nothing"),
        (["--methods", "readout,full", "--set", "method.rank=4"], "none of the methods readout, full has this option"),
    ):
        code, _, err = command("compare", frames, "--out", out, *options)
        assert code == 2 and message in err and not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    code, _, err = command("compare", frames, "--out", out, "--methods", "elora")
    assert code == 2 and "thesis.tex: is not of a comparison" in err
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(InputError):
        read_comparison({"elora": {1: tmp_path / "unfinished"}})


def test_options_are_searched_and_then_used(tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    arguments = ["compare", forcetune.demo_file("train"), "--methods", "readout", "--out", out, "--epochs", 2]
    arguments += ["--valid", 10, "--set", "training.batch_size=20", "--json"]
    code, text, _ = command(*arguments, "--search", 4)
    assert code == 0
    content = json.loads((out / "comparison.json").read_text(encoding="utf-8"))["search"]["readout"]
    assert len(content["trials"]) == 4
    first = content["trials"][0]
    assert first["training.learning_rate"] == 5e-3 and first["training.loss.forces"] == 1000 and not first["pruned"]
    best = min((trial for trial in content["trials"] if not trial["pruned"]), key=lambda trial: trial["score"])
    assert content["score"] == best["score"]
    assert content["settings"] == {key: best[key] for key in ("training.learning_rate", "training.loss.forces")}
    results = json.loads((out / "readout-1" / "results.json").read_text(encoding="utf-8"))
    assert results["training"]["learning_rate"] == content["settings"]["training.learning_rate"]
    assert json.loads(text)["methods"][0]["learning_rate"] == content["settings"]["training.learning_rate"]
    # the journal holds what was tried: nothing is tried again, and the run stands
    before = (out / "readout-1" / "results.json").stat().st_mtime_ns
    assert command(*arguments, "--search", 4)[0] == 0
    assert (out / "readout-1" / "results.json").stat().st_mtime_ns == before
    code, _, err = command(
        *arguments, "--search", 4, "--set", "training.learning_rate=0.01", "--set", "training.loss.forces=10"
    )
    assert code == 2 and "all set for readout" in err
