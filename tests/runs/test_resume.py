"""A run that dies at any moment, and its continuation, against the run that was left in peace."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.io import write
from safetensors.torch import load_file

import forcetune
from forcetune.errors import ForcetuneError, InputError
from forcetune.runs import fit as run
from forcetune.runs import fitting
from forcetune.runs import folder as run_folder
from forcetune.training.module import FineTuning
from systems import labelled, write_labelled, write_model
from terminal import Command

EPOCHS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "adam, average, plateau": {"method.name": "mmea", "training.schedule.patience": 0},
    "schedule-free": {"method.name": "sparse"},
    "SOAP, second stage": {
        "method.name": "elora",
        "training.optimizer": "soap",
        "training.second_stage.start": 4,
        "training.schedule.warmup_epochs": 1,
    },
    "second stage, cosine, every other epoch": {
        "method.name": "elora",
        "training.second_stage.start": 4,
        "training.schedule.name": "cosine",
        "training.valid_every": 2,
    },
    "replay": {"method.name": "readout", "replay.ratio": 0.75, "replay.weight": 2.0, "replay.head": "own"},
    "penalty beside replay": {
        "method.name": "mmea",
        "training.penalty.l2sp": 0.1,
        "training.penalty.ewc": 1.0,
        "training.penalty.gates": 0.3,
        "replay.ratio": 0.5,
    },
    "compiled": {"method.name": "mmea", "training.compile": "on", "training.threads": 2},
    "Hessians beside compiled steps": {
        "method.name": "elora",
        "training.loss.hessian": 10.0,
        "training.loss.hessian_directions": 2,
        "training.compile": "on",
        "training.second_stage.start": 5,
    },
    "early stop": {"method.name": "readout", "training.early_stopping": 1, "training.learning_rate": 30.0},
}


def fit(out: Path, **more: Any) -> run.Run:
    """A run in a folder beside which the data and the model are made once."""
    frames, model = out.parent / "frames.xyz", out.parent / "small.model"
    if not model.exists():
        write_labelled(frames, 12)
        write_model(model)
    if "training.loss.hessian" in more:
        structures = labelled(12)
        for atoms in structures[::2]:
            atoms.info["REF_hessian"] = np.eye(18) - np.kron(np.full((6, 6), 1 / 6), np.eye(3))
        write(frames, structures, format="extxyz")
    if "replay.ratio" in more:
        more["replay.data"] = [str(write_labelled(out.parent / "replay.xyz", 9, seed=8))]
    settings = {"training.batch_size": 4, "training.seed": 3, "training.threads": 1}
    return forcetune.fit(frames, model=model, valid=4, epochs=EPOCHS, out=out, settings=settings | more)


def content(folder: Path) -> dict[str, Any]:
    """All that must be the same: adapter bits, metrics but for times, errors, predictions."""
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        rows = [{key: text for key, text in row.items() if key != "seconds"} for row in csv.DictReader(stream)]
    predictions = np.load(folder / "predictions.npz")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {
        "adapter": {n: t.numpy() for n, t in load_file(folder / "adapter" / "adapter_model.safetensors").items()},
        "config": (folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"),
        "metrics": rows,
        "predictions": {name: predictions[name] for name in predictions.files},
        "errors": results["errors"],
        "status": results["status"],
        "best": (results["training"]["best_epoch"], results["training"]["steps"]),
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("adapter", "predictions"):
        assert one[key].keys() == other[key].keys()
        for name, values in one[key].items():
            assert np.array_equal(values, other[key][name], equal_nan=True), name
    for key in ("config", "metrics", "errors", "status", "best"):
        assert one[key] == other[key], key


class PowerLossError(BaseException):
    """Nothing catches it."""


MOMENTS = ("after the second checkpoint", "before it", "while the adapter is replaced")


ALWAYS = (*list(OPTIONS)[:3], "replay", "penalty beside replay", "compiled", "Hessians beside compiled steps")
NAMES = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_runs_end_as_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options = OPTIONS[name]
    expected = content(fit(tmp_path / "peace", **options).folder)
    assert (expected["status"] == "stopped early") == (name == "early stop")
    for moment in MOMENTS if name == next(iter(OPTIONS)) else MOMENTS[:1]:
        folder = tmp_path / moment.replace(" ", "-")
        calls = 0

        def dying(place: Path, state: dict[str, Any], moment: str = moment) -> None:
            nonlocal calls
            calls += 1
            if calls == 2 and moment.startswith("before"):
                raise PowerLossError
            run_folder.write_checkpoint(place, state)
            if calls == 2:
                if moment.startswith("while"):
                    (place / "adapter").rename(place / ".adapter.old.abc")
                raise PowerLossError

        with monkeypatch.context() as patch:
            patch.setattr(fitting, "write_checkpoint", dying)
            with pytest.raises(PowerLossError):
                fit(folder, **options)
        assert not (folder / "results.json").exists()
        assert_same(content(forcetune.resume(folder).folder), expected)
        assert not list(folder.glob(".adapter*"))


def script(out: Path) -> str:
    return f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from pathlib import Path
from test_resume import OPTIONS, fit
fit(Path({str(out)!r}), **OPTIONS["adam, average, plateau"])
"""


def killed_after(out: Path, seconds: float) -> None:
    """Run in a process of its own and kill it so long after the run folder appeared."""
    process = subprocess.Popen(
        [sys.executable, "-c", script(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (out / "config.yaml").exists():
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def finish(out: Path) -> None:
    if not (out / "results.json").exists():
        forcetune.resume(out)


def test_killed_once(tmp_path: Path) -> None:
    expected = content(fit(tmp_path / "peace", **OPTIONS["adam, average, plateau"]).folder)
    killed_after(tmp_path / "killed", 1.0)
    finish(tmp_path / "killed")
    assert_same(content(tmp_path / "killed"), expected)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    began = time.monotonic()
    expected = content(fit(tmp_path / "peace", **OPTIONS["adam, average, plateau"]).folder)
    length = time.monotonic() - began
    moments = np.random.default_rng(int(time.time())).uniform(0, length, 20)
    for index, moment in enumerate(moments):
        folder = tmp_path / f"killed-{index}"
        killed_after(folder, float(moment))
        finish(folder)
        assert_same(content(folder), expected)


def test_what_cannot_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        forcetune.resume(tmp_path)
    done = fit(tmp_path / "done", **{"method.name": "readout", "training.epochs": 2}).folder
    code, _, err = command("resume", done)
    assert code == 2 and "this run is finished" in err

    (done / "results.json").unlink()
    state = torch.load(done / run_folder.CHECKPOINT, weights_only=True)
    for key, message in (("data", "the training frames changed"), ("base", "the model changed")):
        run_folder.write_checkpoint(done, state | {key: "other"})
        with pytest.raises(InputError, match=message):
            forcetune.resume(done)
    (done / run_folder.CHECKPOINT).write_bytes(b"PK nonsense")
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        forcetune.resume(done)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ForcetuneError, match=r"No space left on device.*forcetune resume"):
        fit(tmp_path / "full", **{"method.name": "readout"})
    monkeypatch.undo()
    assert forcetune.resume(tmp_path / "full").results["status"] == "finished"


def die_at_the_second_checkpoint(monkeypatch: pytest.MonkeyPatch, out: Path, **options: Any) -> None:
    calls = 0

    def dying(place: Path, state: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        run_folder.write_checkpoint(place, state)
        if calls == 2:
            raise PowerLossError

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "write_checkpoint", dying)
        with pytest.raises(PowerLossError):
            fit(out, **options)


def test_a_second_stage_that_begins_early_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {1: 5.0, 2: 6.0, 3: 9.0, 4: 8.0}
    validate = FineTuning._validation
    monkeypatch.setattr(FineTuning, "_validation", lambda self, *given: (losses[self.epoch], validate(self, *given)[1]))
    options = {"method.name": "readout", "training.early_stopping": 1, "training.second_stage.start": 5}
    whole = content(fit(tmp_path / "peace", **options).folder)
    assert [row["stage"] for row in whole["metrics"]] == ["1", "1", "2", "2"]
    assert whole["status"] == "finished"
    die_at_the_second_checkpoint(monkeypatch, tmp_path / "cut", **options)
    assert_same(content(forcetune.resume(tmp_path / "cut").folder), whole)


def edit(config: Path, old: str, new: str) -> None:
    text = config.read_text(encoding="utf-8")
    assert old in text
    config.write_text(text.replace(old, new), encoding="utf-8")


def test_a_configuration_that_changed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    die_at_the_second_checkpoint(monkeypatch, tmp_path / "cut", **{"method.name": "elora", "method.rank": 2})
    config = tmp_path / "cut" / "config.yaml"
    edit(config, f"epochs: {EPOCHS}\n", "epochs: 1\n")
    code, _, err = command("resume", tmp_path / "cut")
    assert code == 2
    assert "config.yaml: training.epochs is 1, but 2 epochs are behind the run; set it to 2 to end the run" in err
    assert "Traceback" not in err and "of 1" not in err
    edit(config, "epochs: 1\n", "epochs: 4\n")
    edit(config, "rank: 2\n", "rank: 3\n")
    code, _, err = command("resume", tmp_path / "cut")
    assert code == 2 and "its checkpoint does not fit config.yaml, which has changed since" in err
    edit(config, "rank: 3\n", "rank: 2\n")
    assert not (tmp_path / "cut" / "results.json").exists()
    code, _, err = command("resume", tmp_path / "cut")
    assert code == 0 and "going on after epoch 2 of 4" in err
    assert len(content(tmp_path / "cut")["metrics"]) == 4


def test_a_run_that_is_ended_where_it_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    die_at_the_second_checkpoint(monkeypatch, tmp_path / "cut", **{"method.name": "readout"})
    edit(tmp_path / "cut" / "config.yaml", f"epochs: {EPOCHS}\n", "epochs: 2\n")
    code, _, err = command("resume", tmp_path / "cut")
    assert code == 0 and "training ended after epoch 2: making the results" in err
    done = content(tmp_path / "cut")
    assert (done["status"], len(done["metrics"])) == ("finished", 2)
