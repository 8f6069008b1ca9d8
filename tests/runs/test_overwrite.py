"""Only what forcetune wrote is ever removed or replaced."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.file import load_adapter, save_adapter
from forcetune.adapters.methods import method
from forcetune.errors import InputError
from forcetune.runs.folder import own_files, recover_adapter
from forcetune.utils.files import atomic_folder, atomic_path
from systems import backbone, perturb, write_labelled, write_model
from terminal import Command

SHORT = ("--method", "readout", "--epochs", 1, "--valid", 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a model and a finished run."""
    place = tmp_path_factory.mktemp("finished")
    model = write_model(place / "m.model")
    settings: dict[str, Any] = {"output.tensorboard": True, "training.refine": 1, "output.forgetting": False}
    data = write_labelled(place / "a.xyz")
    forcetune.fit(data, model=model, method="readout", valid=4, epochs=1, out=place / "run", settings=settings)
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "place"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_has_no_file_that_is_not_known_as_its_own(place: Path) -> None:
    assert sorted(own_files(place / "run")) == sorted(path for path in (place / "run").rglob("*") if path.is_file())


def test_files_of_the_user_in_a_run_folder_stay(place: Path, command: Command) -> None:
    run = place / "run"
    foreign = [
        run / "notes.txt",
        run / "adapter" / "why.txt",
        run / "checkpoints" / "a.xyz",
        run / "own" / "config.yaml",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    before = (run / "environment.json").stat().st_mtime_ns
    code, _, err = command("fit", place / "a.xyz", *SHORT, "--model", place / "m.model", "--out", run, "--overwrite")
    assert code == 0, err
    assert "what forcetune did not write stays: adapter, checkpoints, notes.txt, own" in err
    assert all(path.read_text(encoding="utf-8") == "mine" for path in foreign)
    assert (run / "environment.json").stat().st_mtime_ns != before
    # said of this call, not of those that start from its configuration
    assert "overwrite: false" in (run / "config.yaml").read_text(encoding="utf-8")
    assert not (run / "tensorboard").exists() and not (run / "checkpoints" / "unrefined").exists()
    assert command("evaluate", run, place / "a.xyz")[0] == 0


@pytest.mark.parametrize("what", ["train", "valid", "test", "model", "replay", "config", "pattern", "link"])
def test_a_folder_with_an_input_of_the_run_is_refused(place: Path, command: Command, what: str) -> None:
    run = place / "run"
    data, model = place / "a.xyz", place / "m.model"
    inside = shutil.copy(model if what == "model" else data, run / ("m.model" if what == "model" else "b.xyz"))
    arguments: list[object] = ["fit", inside if what == "train" else data]
    arguments += ["--model", inside if what == "model" else model, "--method", "readout", "--epochs", 1]
    arguments += ["--valid", inside if what == "valid" else 4, *(("--test", inside) if what == "test" else ())]
    if what == "pattern":
        arguments[1] = str(run / "*.xyz")
    elif what == "replay":
        arguments += ["--set", f"replay.data=[{inside}]"]
    elif what == "config":
        arguments += ["--config", run / "config.yaml"]
    elif what == "link":
        (place / "linked").symlink_to(run, target_is_directory=True)
        arguments[1] = place / "linked" / "b.xyz"
    before = content(place)
    code, _, err = command(*arguments, "--out", run, "--overwrite")
    assert code == 2 and "which this run reads" in err
    assert content(place) == before


def test_a_folder_with_a_configuration_of_the_users_is_no_run_folder(tmp_path: Path, command: Command) -> None:
    """`fit --config job/config.yaml --out job --overwrite` removed the data beside the configuration."""
    job = tmp_path / "job"
    job.mkdir()
    data = write_labelled(job / "train.xyz")
    text = f"data: {{train: ['{data}'], valid: 4}}\nmethod: {{name: readout}}\ntraining: {{epochs: 1}}\n"
    (job / "config.yaml").write_text(text, encoding="utf-8")
    outside = shutil.copy(job / "config.yaml", tmp_path / "config.yaml")
    elsewhere = write_labelled(tmp_path / "b.xyz")
    before = content(job)
    for arguments in (
        ("--config", job / "config.yaml"),
        ("--config", outside),  # names the data in the folder
        (elsewhere, *SHORT),  # reads nothing in it
    ):
        code, _, err = command("fit", *arguments, "--model", "mini", "--out", job, "--overwrite")
        assert code == 2 and "not overwritten" in err
        assert content(job) == before


def test_links_and_folders_in_the_place_of_own_files_are_refused(place: Path, command: Command) -> None:
    other = Path(shutil.copytree(place / "run" / "adapter", place / "other"))
    before = content(other)
    arguments = ("fit", place / "a.xyz", *SHORT, "--model", place / "m.model", "--out", place / "run", "--overwrite")
    shutil.rmtree(place / "run" / "adapter")
    (place / "run" / "adapter").symlink_to(other, target_is_directory=True)
    code, _, err = command(*arguments)
    assert code == 2 and "is not what forcetune wrote there" in err and content(other) == before
    (place / "run" / "adapter").unlink()
    (place / "run" / "report.html").unlink()
    (place / "run" / "report.html").mkdir()
    code, _, err = command(*arguments)
    assert code == 2 and "report.html: is not what forcetune wrote there" in err


def test_comparisons_do_not_replace_what_they_read(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "cmp"
    folder.mkdir()
    data = write_labelled(tmp_path / "a.xyz")
    text = f"data: {{train: ['{data}'], valid: 4}}\ntraining: {{epochs: 1}}\n"
    (folder / "comparison.yaml").write_text(text, encoding="utf-8")
    code, _, err = command(
        "compare", "--config", folder / "comparison.yaml", "--methods", "readout", "--out", folder, "--model", "mini"
    )
    assert code == 2 and "which the runs read" in err
    assert [path.name for path in folder.iterdir()] == ["comparison.yaml"]
    assert (folder / "comparison.yaml").read_text(encoding="utf-8") == text


def test_adapters_are_written_beside_other_files_and_over_none(tmp_path: Path) -> None:
    model = backbone()
    perturb(attach(model, method("readout")))
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "train.xyz").write_text("mine", encoding="utf-8")
    (folder / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"is no adapter folder .* and its README\.md would be replaced"):
        save_adapter(model, folder)
    assert content(folder) == {"train.xyz": b"mine", "README.md": b"mine"}
    (folder / "README.md").unlink()
    for _ in range(2):
        save_adapter(model, folder)
        assert (folder / "train.xyz").read_bytes() == b"mine"
        assert len(content(folder)) == 4
    load_adapter(backbone(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]
    with pytest.raises(InputError, match="is a file"):
        save_adapter(model, folder / "train.xyz")


def test_files_of_the_user_survive_a_run_that_died_while_it_wrote_its_adapter(place: Path) -> None:
    adapter = place / "run" / "adapter"
    (adapter / "why.txt").write_text("mine", encoding="utf-8")
    adapter.rename(place / "run" / ".adapter.old.x1")
    shutil.copytree(place / "run" / ".adapter.old.x1", place / "run" / ".adapter.x2")
    (place / "run" / ".adapter.x2" / "why.txt").unlink()
    recover_adapter(adapter)
    assert (adapter / "why.txt").read_text(encoding="utf-8") == "mine"
    assert not list((place / "run").glob(".adapter*"))


def test_a_merged_model_replaces_no_base_and_nothing_that_is_no_model(place: Path, command: Command) -> None:
    for target, message in (
        (place / "m.model", "is the base"),
        (place / "a.xyz", "is no merged model"),
        (place / "run" / "config.yaml", "is no merged model"),
        (place / "run" / "adapter" / "adapter_model.safetensors", "is no merged model"),
        (place / "run", "is a folder"),
    ):
        before = content(place)
        code, _, err = command("merge", place / "run", "-o", target)
        assert code == 2 and message in err, target
        assert content(place) == before
    for _ in range(2):  # a merged model may be written again
        assert command("merge", place / "run", "-o", place / "tuned.model")[0] == 0


def test_pages_replace_pages_only(place: Path, command: Command) -> None:
    for target, message in ((place / "a.xyz", "is no HTML page"), (place / "run", "is a folder")):
        before = content(place)
        code, _, err = command("doctor", place / "a.xyz", "--model", place / "m.model", "--html", target)
        assert code == 2 and message in err
        assert content(place) == before
    job = place / "job"
    job.mkdir()
    shutil.copy(place / "run" / "config.yaml", job)
    (job / "report.html").write_text("mine", encoding="utf-8")
    code, _, err = command("report", job)
    assert code == 2 and "report.html" in err
    assert (job / "report.html").read_text(encoding="utf-8") == "mine"


def test_files_do_not_take_the_place_of_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a folder"), atomic_path(tmp_path / "folder"):
        pass
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="is a folder"):
        backbone(dtype=torch.float64).save(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
