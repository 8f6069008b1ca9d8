"""Training that begins from another run's adapter, and frames that are trained on only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import forcetune
from forcetune.config import load_config
from forcetune.errors import InputError
from forcetune.frames.dataset import read_dataset
from systems import write_labelled

SETTINGS = {"training.compile": "off", "output.forgetting": False, "data.doctor": "off"}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs on methanol held by springs."""
    folder = tmp_path_factory.mktemp("first")
    train = write_labelled(folder / "train.xyz", 10)
    forcetune.fit(train, valid=0.3, model="mini", method="elora", epochs=3, out=folder / "run", settings=SETTINGS)
    return folder


def _fit(first: Path, out: Path, **settings: Any) -> forcetune.Run:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    options = {"model": "mini", "method": "elora", "valid": 0.3, "epochs": 1, "out": out}
    return forcetune.fit(first / "train.xyz", **options, settings=SETTINGS | named)


def test_training_begins_with_the_values_of_the_adapter(first: Path, tmp_path: Path) -> None:
    rate = {"training__learning_rate": 1e-30, "training__ema": None, "training__optimizer": "adam"}
    # an adapter of a version with other defaults of the training is of the same method
    earlier = shutil.copytree(first / "run" / "adapter", tmp_path / "earlier")
    described = json.loads((earlier / "adapter_config.json").read_text(encoding="utf-8"))
    described["method"] |= {"optimizer": "adam", "learning_rate": 0.003, "description": "as it was"}
    (earlier / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    run = _fit(first, tmp_path / "next", training__start_from=str(earlier), **rate)
    before = load_file(first / "run" / "adapter" / "adapter_model.safetensors")
    after = load_file(run.adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    results = json.loads((first / "run" / "results.json").read_text(encoding="utf-8"))
    for name, errors in run.after.items():
        expected = results["errors"][name]["after"]["forces_mae_mev_per_ang"]
        assert errors.forces_mae_mev_per_ang == pytest.approx(expected, rel=1e-6)


def test_what_no_training_can_start_from_is_refused(first: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"training__start_from": str(tmp_path / "nothing")}, "is no run or adapter folder"),
        ({"training__start_from": str(first / "run"), "method__rank": 3}, "another method than this run"),
        ({"training__start_from": str(first / "run"), "model__elements": "keep"}, "elements"),
    ):
        with pytest.raises(InputError, match=message):
            _fit(first, tmp_path / "next", **settings)
        assert not (tmp_path / "next").exists()


def test_the_run_that_a_training_starts_from_is_not_overwritten(first: Path) -> None:
    adapter = first / "run" / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    with pytest.raises(InputError, match="which this run reads, so it is not overwritten"):
        _fit(first, first / "run", training__start_from=str(first / "run"), output__overwrite=True)
    assert adapter.read_bytes() == before


@pytest.mark.parametrize("stream", ["off", "on"])
def test_no_validation_frame_comes_from_train_only(first: Path, tmp_path: Path, stream: str) -> None:
    more = write_labelled(tmp_path / "more.xyz", 4, seed=8)
    named = {"data": {"train": [str(first / "train.xyz")], "valid": 0.3, "stream": stream, "workers": 0}}
    alone = read_dataset(load_config(given=named).data)
    named["data"]["train_only"] = [str(more)]
    both = read_dataset(load_config(given=named).data)
    assert [frame.origin for frame in both.valid.frames] == [frame.origin for frame in alone.valid.frames]
    assert [frame.origin for frame in both.train.frames][:7] == [frame.origin for frame in alone.train.frames]
    assert [(frame.origin.file, frame.origin.index) for frame in both.train.frames][7:] == [
        (str(more), index) for index in range(4)
    ]
    assert both.train.sha256 != alone.train.sha256
    named["data"]["train_only"] = [str(first / "train.xyz")]
    with pytest.raises(InputError, match=r"named by data\.train and by data\.train_only"):
        read_dataset(load_config(given=named).data)
