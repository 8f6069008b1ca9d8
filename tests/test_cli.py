"""The command line: what it prints, and how bad input is met."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read, write

from systems import labelled, write_labelled, write_model
from terminal import Command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small.model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_labelled(tmp_path / "train.xyz")


def fit(command: Command, data: Path, model: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return command("fit", data, "--valid", "0.25", "--model", model, "--out", out, "--epochs", "2", *more)


def test_fit_evaluate_and_report(command: Command, data: Path, model: Path, tmp_path: Path) -> None:
    test = write_labelled(tmp_path / "test.xyz", count=5, seed=9)
    run = tmp_path / "run"
    code, out, err = fit(command, data, model, run, "--method", "mmea", "--rank", "4", "--test", test)
    assert code == 0, err
    assert "energy from 'REF_energy'" in err
    assert "reference energies (estimate)" in err
    assert "epoch 2/2" in err
    assert "after/before" in out
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.yaml", "adapter", "metrics.csv", "results.json", "predictions.npz"),
        *("report.html", "environment.json", "checkpoints"),
    }
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["status"] == "finished"
    assert results["data"]["train"]["n_frames"] == 9
    assert results["data"]["train"]["keys"] == {"energy": "REF_energy", "forces": "REF_forces", "stress": None}
    references = results["reference_energies"]
    assert references["offset_after_mev_per_atom"] < 50 < references["offset_before_mev_per_atom"]
    assert results["method"]["rank"] == 4

    code, out, err = command("evaluate", run, test, "--json")
    assert code == 0, err
    content = json.loads(out)
    assert content["n_frames"] == 5
    assert content == pytest.approx(results["errors"]["test"]["after"], rel=1e-9)
    code, out, _ = command("evaluate", run / "adapter", test, "--model", model)
    assert code == 0
    assert "meV/Å" in out
    code, out, _ = command("evaluate", model, test, "--json")
    assert json.loads(out)["forces_mae_mev_per_ang"] == pytest.approx(
        results["errors"]["test"]["before"]["forces_mae_mev_per_ang"], rel=1e-9
    )
    (run / "report.html").unlink()
    code, out, _ = command("report", run)
    assert code == 0
    assert Path(out.strip()).is_file()


def test_merge_from_the_command_line(command: Command, data: Path, model: Path, tmp_path: Path) -> None:
    assert fit(command, data, model, tmp_path / "elora", "--method", "elora")[0] == 0
    merged = tmp_path / "tuned.model"
    code, out, err = command("merge", tmp_path / "elora", "-o", merged)
    assert code == 0, err
    assert "differs from base + adapter" in out
    code, out, _ = command("evaluate", merged, data, "--json")
    by_file = json.loads(out)
    code, out, _ = command("evaluate", tmp_path / "elora", data, "--json")
    assert by_file == pytest.approx(json.loads(out), rel=1e-9)

    assert fit(command, data, model, tmp_path / "mmea", "--method", "mmea")[0] == 0
    code, _, err = command("merge", tmp_path / "mmea", "-o", tmp_path / "no.model")
    assert code == 2
    assert "depend on the input of their layer (GateActivation)" in err
    assert "forcetune.calculator(model, adapter=...)" in err
    assert not (tmp_path / "no.model").exists()


def test_configuration_file_and_settings_share_every_option(
    command: Command, data: Path, model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{train: ['{data}'], valid: 3}}\nmodel: {{model: '{model}'}}\nmethod: {{name: readout}}\n"
        "training: {epochs: 9, batch_size: 2}\n",
        encoding="utf-8",
    )
    run = tmp_path / "run"
    code, _, err = command(
        "fit", "--config", config, "--epochs", 1, "--set", "training.learning_rate=1e-4", "--out", run
    )
    assert code == 0, err
    from forcetune.config import load_config

    resolved = load_config(run / "config.yaml")
    assert resolved.training.epochs == 1
    assert resolved.training.batch_size == 2
    assert resolved.training.learning_rate == 1e-4
    assert resolved.method.name == "readout"
    assert resolved.data.valid == 3


# ---- bad input: exit code 2, a message that names what, where and the fix, nothing written -----------------------


def refused(ended: tuple[int, str, str], folder: Path, *parts: str) -> None:
    code, _, err = ended
    assert code == 2, err
    assert err.startswith("error: ") or "\nerror: " in err
    for part in parts:
        assert part in err, err
    assert "Traceback" not in err
    assert not folder.exists()


def rewritten(path: Path, change: Callable[[list[Atoms]], None]) -> Path:
    frames = labelled(12)
    change(frames)
    write(path, frames, format="extxyz")
    return path


def test_missing_label_key(command: Command, data: Path, model: Path, tmp_path: Path) -> None:
    ended = fit(command, data, model, tmp_path / "run", "--energy-key", "dft")
    refused(ended, tmp_path / "run", "no frame has energy under 'dft'", "'REF_energy'", str(data))


def test_no_forces_at_all(command: Command, model: Path, tmp_path: Path) -> None:
    def without(frames: list[Atoms]) -> None:
        for atoms in frames:
            del atoms.arrays["REF_forces"]

    data = rewritten(tmp_path / "a.xyz", without)
    refused(fit(command, data, model, tmp_path / "run"), tmp_path / "run", "no forces found", str(data))


def test_nan_force(command: Command, model: Path, tmp_path: Path) -> None:
    def break_one(frames: list[Atoms]) -> None:
        frames[7].arrays["REF_forces"][2, 1] = np.nan

    data = rewritten(tmp_path / "a.xyz", break_one)
    refused(fit(command, data, model, tmp_path / "run"), tmp_path / "run", f"{data}, frame 7", "atom 2", "nan")


def test_element_the_model_does_not_know(command: Command, model: Path, tmp_path: Path) -> None:
    def exchange(frames: list[Atoms]) -> None:
        frames[3].numbers[0] = 14

    data = rewritten(tmp_path / "a.xyz", exchange)
    refused(fit(command, data, model, tmp_path / "run"), tmp_path / "run", "Si", "small")


def test_one_frame_without_energy(command: Command, model: Path, tmp_path: Path) -> None:
    def drop(frames: list[Atoms]) -> None:
        del frames[5].info["REF_energy"]

    data = rewritten(tmp_path / "a.xyz", drop)
    code, _, err = fit(command, data, model, tmp_path / "run")
    assert code == 0, err
    assert "1 of 12 frames have no energy" in err and f"{data}, frame 5" in err


def test_empty_file(command: Command, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.xyz"
    data.touch()
    refused(fit(command, data, model, tmp_path / "run"), tmp_path / "run", str(data), "empty")


def test_truncated_file(command: Command, data: Path, model: Path, tmp_path: Path) -> None:
    content = data.read_text(encoding="utf-8")
    data.write_text(content[: int(len(content) * 0.6)], encoding="utf-8")
    refused(fit(command, data, model, tmp_path / "run"), tmp_path / "run", str(data))


def test_missing_file_and_unknown_model(command: Command, data: Path, model: Path, tmp_path: Path) -> None:
    refused(fit(command, tmp_path / "none.xyz", model, tmp_path / "run"), tmp_path / "run", "none.xyz", "no such file")
    ended = fit(command, data, Path("mace-off23-medum"), tmp_path / "run")
    refused(ended, tmp_path / "run", "mace-off23-medium")


def test_wrong_adapter_for_the_base(command: Command, data: Path, model: Path, tmp_path: Path) -> None:
    assert fit(command, data, model, tmp_path / "first", "--method", "readout")[0] == 0
    other = write_model(tmp_path / "other.model", seed=3)
    ended = command("evaluate", tmp_path / "first", data, "--model", other)
    refused(ended, tmp_path / "run", "was trained on small", "other", "fingerprint")


def test_method_that_matches_nothing(command: Command, data: Path, model: Path, tmp_path: Path) -> None:
    ended = fit(command, data, model, tmp_path / "run", "--set", "method.target=readout_0.weight")
    refused(ended, tmp_path / "run", "matches none of the model's", "readout_0.weight")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--method", "dora"], ["no method 'dora'", "elora"]),
        (["--method", "full", "--rank", "4"], ["method full has no use for 'rank'"]),
        (["--set", "training.epoch=3"], ["training.epoch: there is no such option"]),
        (["--set", "training.epochs=none"], ["training.epochs", "none"]),
        (["--learning-rate", "inf"], ["training.learning_rate", "finite"]),
        (["--set", "training.epochs=1_000"], ["training.epochs", "'1_000' is not a number"]),
        (["--set", "epochs"], ["write it as section.key=value"]),
        (["--set", "data.valid=0"], ["data", "valid must be files"]),
        (["--dtype", "float16"], ["model.dtype", "float16"]),
        (["--device", "tpu9"], ["no device 'tpu9'"]),
        (["--head", "nothing"], ["nothing"]),
        (["--references", "isolated"], ["No isolated atom of"]),
        (["--set", "training.loss.stress=1"], ["no training frame has stress labels"]),
        (["--set", "training.optimizer=schedulefree", "--set", "training.ema=0.9"], ["averages by itself"]),
    ],
)
def test_bad_options(
    command: Command, data: Path, model: Path, tmp_path: Path, options: Sequence[str], parts: Sequence[str]
) -> None:
    refused(fit(command, data, model, tmp_path / "run", *options), tmp_path / "run", *parts)


def test_run_folder_in_use(command: Command, data: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    for more in ((), ("--overwrite",)):
        code, _, err = fit(command, data, model, tmp_path / "run", *more)
        assert code == 2
        assert "thesis.tex" in [path.name for path in (tmp_path / "run").iterdir()]
        assert "overwrit" in err


class _Command:
    """Pickles to a call of ``open``, which would leave a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


def test_model_whose_pickle_would_run_a_command(command: Command, data: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hostile = tmp_path / "hostile.model"
    torch.save(_Command(mark), hostile)
    plain = tmp_path / "plain.model"
    plain.write_bytes(pickle.dumps(_Command(mark)))
    for path in (hostile, plain):
        refused(fit(command, data, path, tmp_path / "run"), tmp_path / "run", path.name)
        assert not mark.exists()
        assert command("evaluate", path, data)[0] == 2
        assert not mark.exists()
    with zipfile.ZipFile(io.BytesIO(hostile.read_bytes())) as archive:
        assert any(b"open" in archive.read(name) for name in archive.namelist())


def test_help_and_version_are_plain(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    for name in ("fit", "evaluate", "methods", "merge", "report", "models"):
        assert name in out
    code, out, _ = command("fit", "--help")
    assert code == 0
    assert "--method" in out
    code, out, _ = command("--version")
    assert out.startswith("forcetune ")


@pytest.mark.parametrize(
    ("name", "precision", "head"),
    [
        ("fit", "Precision of the model during training", "needed then"),
        ("evaluate", "Precision to predict in", "an adapter knows that of its base"),
        ("merge", "Precision of the written model", None),
        ("export", "Precision of what is written", "an adapter knows that of its base"),
    ],
)
def test_help_says_what_an_option_does_in_this_command(
    command: Command, name: str, precision: str, head: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = command(name, "--help")
    words = " ".join(out.split())
    assert code == 0
    assert precision in words and (head is None or head in words)


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_of_commands_are_finite(command: Command, value: str, tmp_path: Path) -> None:
    for words in (
        ("demo", "--picoseconds", value, "--out", tmp_path / "demo"),
        ("merge", tmp_path, "-o", tmp_path / "plain.model", "--approximate", "--bound", value),
    ):
        code, _, err = command(*words)
        assert code == 2
        # a minimum refuses what is no number
        assert ("finite" if value == "inf" else "greater than") in err
    assert list(tmp_path.iterdir()) == []


def test_models_are_listed(command: Command) -> None:
    code, out, _ = command("models", "--json")
    assert code == 0
    names = {row["name"]: row for row in json.loads(out)}
    assert names["mace-off23-medium"]["licence"] == "ASL"
    code, out, _ = command("models")
    assert "mace-mp-0b3" in out
    code, _, err = command("models", "fetch")
    assert code == 2
    assert "forcetune models download NAME" in err


def test_written_data_reads_back(data: Path) -> None:
    frames = read(data, ":")
    assert len(frames) == 12
    assert "REF_energy" in frames[0].info
