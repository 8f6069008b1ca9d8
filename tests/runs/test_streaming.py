"""A run on frames that stay on disk gives what a run in memory gives."""

from __future__ import annotations

import csv
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import forcetune
from forcetune.diagnostics import run_checks
from forcetune.errors import ForcetuneWarning
from forcetune.evaluation import streamed
from forcetune.frames.store import streaming
from forcetune.graphs.graph import Batch
from forcetune.runs import console as telling
from forcetune.runs import fitting
from forcetune.runs import folder as run_folder
from forcetune.runs.fit import Run
from frames.formats import write_xyz
from systems import cluster, labelled, write_labelled, write_model
from terminal import Command
from utils.test_distributed import assert_same as assert_same_runs
from utils.test_distributed import fit as fit_in_processes
from utils.test_distributed import frames as frames_for_processes

OPTIONS: dict[str, dict[str, Any]] = {
    "frames a batch": {"method.name": "mmea", "training.schedule.patience": 0},
    "edges a batch": {"method.name": "readout", "training.batch_edges": 120},
    "replay and refinement": {"method.name": "readout", "replay.ratio": 0.5, "training.refine": 2},
    "several tests": {"method.name": "elora", "test": 2, "method.init": "gradient"},
    "stress, huber, schedule-free": {
        "method.name": "sparse",
        "training.loss.form": "huber",
        "training.loss.energy_per_atom": True,
    },
}


def fit(out: Path, mode: str, **more: Any) -> Run:
    frames, model = out.parent / "frames.xyz", out.parent / "small.model"
    if not model.exists():
        structures = labelled(24)
        for index in range(0, 24, 3):
            structures[index] = cluster((1, 6, 8), atoms=3 + index // 3, seed=index)
            structures[index].info["REF_energy"] = -100.0 * len(structures[index])
            structures[index].arrays["REF_forces"] = np.random.default_rng(index).standard_normal(
                (len(structures[index]), 3)
            )
        write_xyz(frames, structures)
        write_model(model)
    if "replay.ratio" in more:
        more["replay.data"] = [str(write_labelled(out.parent / "replay.xyz", 9, seed=8))]
    tests = [write_labelled(out.parent / f"test{k}.xyz", 5, seed=k) for k in range(more.pop("test", 0))]
    settings = {
        "training.batch_size": 4,
        "training.threads": 1,
        "output.adapter_dtype": "float64",
        "data.doctor": "off",
        "data.stream": mode,
        "data.store": str(out.parent / "store"),
        "data.workers": 0,
    }
    return forcetune.fit(frames, model=model, valid=6, test=tests, epochs=3, out=out, settings=settings | more)


def assert_equal(one: Path, other: Path) -> None:
    """Adapters in every bit; losses and errors, which are summed in another order, to twelve digits."""
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        assert np.array_equal(value.numpy(), tensors[1][name].numpy()), name
    tables = []
    for folder in (one, other):
        with (folder / "metrics.csv").open(encoding="utf-8") as stream:
            tables.append([[float(v or 0) for k, v in row.items() if k != "seconds"] for row in csv.DictReader(stream)])
    assert np.allclose(*tables, rtol=1e-12, atol=0)
    ours, theirs = (np.load(folder / "predictions.npz") for folder in (one, other))
    assert set(ours.files) == set(theirs.files)
    for name in ours.files:
        assert np.allclose(ours[name], theirs[name], rtol=1e-10, atol=1e-12, equal_nan=True), name
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in (one, other)]
    assert results[0]["reference_energies"] == results[1]["reference_energies"]
    for split, figures in results[0]["errors"].items():
        for when in ("before", "after"):
            assert results[1]["errors"][split][when] == pytest.approx(figures[when], rel=1e-10), (split, when)
    for split, figures in results[0]["data"].items():
        assert not figures.pop("streamed") and results[1]["data"][split].pop("streamed")
        assert figures == results[1]["data"][split]


NAMES = [name if index < 3 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(OPTIONS)]


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_is_that_of_a_run_in_memory(tmp_path: Path, name: str) -> None:
    for mode in ("off", "on"):
        fit(tmp_path / mode, mode, **OPTIONS[name])
    assert_equal(tmp_path / "off", tmp_path / "on")


class PowerLossError(BaseException):
    """Nothing catches it."""


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the store that it made, and without."""
    options = OPTIONS["edges a batch"]
    fit(tmp_path / "off", "off", **options)
    for keeps_store in (True, False):
        folder = tmp_path / f"kept-{keeps_store}"

        def dying(place: Path, state: dict[str, Any]) -> None:
            run_folder.write_checkpoint(place, state)
            if state["training"]["epochs_done"] == 2:
                raise PowerLossError

        with monkeypatch.context() as patch:
            patch.setattr(fitting, "write_checkpoint", dying)
            with pytest.raises(PowerLossError):
                fit(folder, "on", **options)
        with monkeypatch.context() as patch:
            if keeps_store:
                patch.setattr(streaming, "_read", None)  # nothing is read again
            else:
                shutil.rmtree(tmp_path / "store")
            forcetune.resume(folder)
        assert_equal(tmp_path / "off", folder)


@pytest.mark.parametrize("batch", [(), ("--set", "training.batch_edges=150")], ids=["frames", "edges"])
def test_two_processes_train_the_same_from_one_store(tmp_path: Path, batch: tuple[str, ...]) -> None:
    data, model = frames_for_processes(tmp_path / "frames.xyz"), write_model(tmp_path / "small.model")
    store = ("--set", "data.stream=on", "--set", f"data.store={tmp_path / 'store'}", "--set", "data.workers=1")
    method = ("--method", "elora", "--optimizer", "adam")  # SOAP makes more of rounding (tests/utils)
    fit_in_processes(tmp_path / "1", data, model, 1, *method, *batch)
    fit_in_processes(tmp_path / "2", data, model, 2, *method, *batch, *store)
    assert_same_runs(tmp_path / "1", tmp_path / "2")
    assert sorted(place.name[:6] for place in (tmp_path / "store").iterdir()) == ["frames", "graphs"]


def test_large_sets_are_shown_and_examined_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "SHOWN", 5)
    monkeypatch.setattr(telling, "SHOWN", 5)
    monkeypatch.setattr(run_checks, "SAMPLE_OF_STREAM", 10)
    whole = fit(tmp_path / "off", "off", **{"method.name": "readout"})
    with pytest.warns(ForcetuneWarning) as warned:
        run = fit(tmp_path / "on", "on", **{"method.name": "readout", "data.doctor": "on"})
    texts = [str(warning.message) for warning in warned]
    assert any("errors of the training frames are those of 5 of 18" in text for text in texts)
    assert any("only on 10 of 18 (train)" in text for text in texts)
    assert [errors.n_frames for errors in (run.before["train"], run.after["train"])] == [5, 5]
    # of the other sets every frame counts
    for split in ("before", "after"):
        ours, theirs = getattr(run, split)["valid"], getattr(whole, split)["valid"]
        assert ours.n_frames == 6
        assert ours.to_json() == pytest.approx(theirs.to_json(), rel=1e-10)
    assert len(np.load(tmp_path / "on" / "predictions.npz")["valid/after/energy_per_atom"]) == 5
    report = (tmp_path / "on" / "report.html").read_text(encoding="utf-8")
    assert "errors of the training frames are those of 5 of 18" in report
    assert run.results["reference_energies"] == whole.results["reference_energies"]


def test_graphs_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 graphs those in use are in memory; the garbage of other tests and of the other run does not count."""

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, Batch) for one in gc.get_objects())

    counts: list[int] = []

    def counting(place: Path, state: dict[str, Any]) -> None:
        counts.append(alive())
        run_folder.write_checkpoint(place, state)

    monkeypatch.setattr(fitting, "write_checkpoint", counting)
    sizes = {}
    for mode in ("off", "on"):
        others = alive()
        counts.clear()
        fit(tmp_path / mode, mode, **{"method.name": "readout"})
        sizes[mode] = max(counts) - others
    assert sizes["off"] >= 24
    assert sizes["on"] <= 3


def test_bad_frames_end_a_streamed_run_before_anything_is_written(tmp_path: Path, command: Command) -> None:
    frames = labelled(20)
    frames[17].arrays["REF_forces"][0, 0] = np.nan
    path, model = write_xyz(tmp_path / "a.xyz", frames), write_model(tmp_path / "small.model")
    options = ("--set", "data.stream=on", "--set", f"data.store={tmp_path / 'store'}", "--set", "data.workers=2")
    code, _, err = command("fit", path, "--model", model, "--out", tmp_path / "run", *options)
    assert code == 2 and f"{path}, frame 17: the forces of atom 0 under 'REF_forces' is nan" in err
    assert not (tmp_path / "run").exists() and not list((tmp_path / "store").iterdir())
    frames[17].arrays["REF_forces"][0, 0] = 0.0
    frames[18].symbols[0] = "Xe"
    write_xyz(path, frames)
    code, _, err = command("fit", path, "--model", "mini", "--out", tmp_path / "run", *options)
    assert code == 2 and "Xe" in err and not (tmp_path / "run").exists()
