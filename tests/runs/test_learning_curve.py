"""`forcetune compare --learning-curve` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forcetune.config import load_config
from forcetune.frames.dataset import read_dataset
from systems import write_labelled
from terminal import Command


def test_learning_curve(tmp_path: Path, command: Command) -> None:
    train, valid = write_labelled(tmp_path / "a.xyz", 12), write_labelled(tmp_path / "v.xyz", 4, seed=3)
    out = tmp_path / "out"
    options = ("--model", "mini", "--methods", "readout", "--seeds", 2, "--valid", valid, "--epochs", 2, "--out", out)
    settings = ("--set", "output.forgetting=off", "--set", "data.doctor=off", "--set", "training.compile=off")
    curve = ("--learning-curve", "3,12", "--target-forces", 100)
    code, output, error = command("compare", train, *options, *settings, *curve, "--json")
    assert code == 0, error
    result = json.loads(output)
    stored = json.loads((out / "comparison.json").read_text())
    assert stored["learning_curve"] == result["learning_curve"]
    forces, energy = result["learning_curve"]
    assert (forces["method"], forces["quantity"]) == ("readout", "forces_mae_mev_per_ang")
    assert forces["frames"] == [3, 3, 12, 12]
    slope, level = np.polyfit(np.log(forces["frames"]), np.log(forces["errors"]), 1)
    assert forces["exponent"] == pytest.approx(-slope, rel=1e-9)
    assert forces["prefactor"] == pytest.approx(np.exp(level), rel=1e-9)
    assert [one["target"] for one in forces["needed"]] == [100.0]
    assert energy["needed"][0]["target"] == pytest.approx(0.5 * energy["prefactor"] * 12 ** -energy["exponent"])
    largest = result["methods"][0]["errors"]["forces_mae_mev_per_ang"]["values"]
    assert sorted(largest) == sorted(forces["errors"][2:])
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "Errors by the number of frames" in page

    configs = {name: load_config(out / name / "config.yaml") for name in ("readout-3-frames-1", "readout-12-frames-1")}
    steps = [one.training.epochs * (one.data.train_frames or 0) for one in configs.values()]
    assert steps == [24, 24]
    small, large = (read_dataset(one.data).train.frames for one in configs.values())
    assert len(small) == 3
    assert {frame.origin for frame in small} < {frame.origin for frame in large}

    code, output, _ = command("compare", train, *options, *settings, *curve)
    assert code == 0
    assert "Errors by the number of training frames" in output


def test_what_makes_no_curve_is_refused_before_any_run(tmp_path: Path, command: Command) -> None:
    train = write_labelled(tmp_path / "a.xyz", 8)
    options = ("--model", "mini", "--methods", "readout", "--valid", "2", "--out", tmp_path / "out")
    for curve, message in (
        (("--learning-curve", "3,five"), "write numbers of frames"),
        (("--learning-curve", "3"), "at least two different"),
        (("--learning-curve", "3,5"), "needs three runs"),
        (("--learning-curve", "3,5,60"), "there are 6 frames to train on"),
        (("--target-forces", "5"), "need a --learning-curve"),
        (("--learning-curve", "3,4,5", "--target-forces", "-5"), "never reached"),
    ):
        code, _, error = command("compare", train, *options, *curve)
        assert (code, message in error) == (2, True), error
        assert not (tmp_path / "out").exists()
