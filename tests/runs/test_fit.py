"""Whole runs on published data and in Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import forcetune
from forcetune.adapters.config import read_adapter_config
from forcetune.errors import ForcetuneWarning, InputError
from systems import labelled, write_labelled, write_model


def test_aspirin_starts_within_tens_of_mev_per_atom(reference_data: Path, tmp_path: Path) -> None:
    aspirin = reference_data / "rmd17" / "aspirin"
    model = write_model(tmp_path / "random.model")
    options = {"model": model, "method": "readout", "valid": 0.5, "epochs": 1, "out": tmp_path / "run"}
    with pytest.warns(ForcetuneWarning, match="forces-unrelated"):  # random weights know no chemistry
        run = forcetune.fit(aspirin / "train.xyz", **options)
    references = run.results["reference_energies"]
    assert references["offset_before_mev_per_atom"] > 100_000
    assert references["offset_after_mev_per_atom"] < 50
    assert (references["rank"], references["n_elements"]) == (1, 3)
    before = run.before["train"].energy_mae_mev_per_atom
    assert before == pytest.approx(references["offset_after_mev_per_atom"], rel=1e-6)
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "minimum norm" in report


def test_loaded_backbone_carries_the_adapter_afterwards(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "a.xyz")
    backbone = forcetune.load(write_model(tmp_path / "m.model"), elements=[1, 6, 8])
    run = forcetune.fit(data, model=backbone, method="elora", valid=4, epochs=2, out=tmp_path / "run")
    assert run.backbone is backbone
    atoms = labelled(1)[0]
    atoms.calc = forcetune.calculator(backbone)
    mine = atoms.get_potential_energy()
    atoms.calc = forcetune.calculator(tmp_path / "m.model", adapter=run.folder)
    assert atoms.get_potential_energy() == pytest.approx(mine, rel=1e-13)


def test_run_repeats_itself_from_its_configuration(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "a.xyz")
    model = write_model(tmp_path / "m.model")
    first = forcetune.fit(data, model=model, valid=4, epochs=2, out=tmp_path / "one")
    again = forcetune.fit(config=tmp_path / "one" / "config.yaml", out=tmp_path / "two")
    for name in ("adapter_model.safetensors",):
        assert (first.adapter / name).read_bytes() == (again.adapter / name).read_bytes()
    assert first.after == again.after
    config = read_adapter_config(first.adapter)
    assert config.training_data_sha256 == first.results["data"]["train"]["sha256"]
    assert config.metrics["errors"]["valid"] == first.results["errors"]["valid"]["after"]


def test_overwriting_replaces_a_run_and_nothing_else(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "a.xyz")
    model = write_model(tmp_path / "m.model")
    options = {"output.overwrite": True}
    forcetune.fit(data, model=model, method="full", valid=4, epochs=1, out=tmp_path / "run")
    with pytest.raises(InputError, match="is not empty"):
        forcetune.fit(data, model=model, valid=4, epochs=1, out=tmp_path / "run")
    forcetune.fit(data, model=model, method="readout", valid=4, epochs=1, out=tmp_path / "run", settings=options)
    assert json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["method"]["name"] == "readout"


def test_float32_run(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "a.xyz")
    run = forcetune.fit(
        data,
        model=write_model(tmp_path / "m.model"),
        valid=4,
        test=write_labelled(tmp_path / "b.xyz", 5, seed=9),
        epochs=4,
        out=tmp_path / "run",
        settings={"model.dtype": "float32", "model.kernels": "torch"},
    )
    assert run.results["model"]["dtype"] == "float32"
    assert run.results["model"]["kernels"] == "torch"
    before, after = run.before["valid"].forces_mae_mev_per_ang, run.after["valid"].forces_mae_mev_per_ang
    assert before is not None
    assert after is not None
    assert after < before


def test_a_fit_that_made_the_model_worse_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = forcetune.fit(
        write_labelled(tmp_path / "a.xyz"),
        model=write_model(tmp_path / "m.model"),
        method="full",
        valid=2,
        epochs=1,
        out=tmp_path / "run",
        settings={"training.learning_rate": 1.0, "output.forgetting": False, "data.doctor": "off"},
    )
    (warning,) = [text for text in run.results["warnings"] if "worse than the untouched" in text]
    assert "on the valid frames: " in warning
    assert "training.learning_rate (now 1)" in warning
    assert warning in capsys.readouterr().err
