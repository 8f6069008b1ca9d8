"""Two processes train the same as one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.io import write
from safetensors.torch import load_file

from systems import labelled, write_model

SETTINGS = {"training.batch_size": "3", "output.adapter_dtype": "float64", "output.forgetting": "false"}


def frames(path: Path) -> Path:
    """Two kinds of molecules, so that parts of a batch differ in how many force components they hold."""
    structures = labelled(9)
    rng = np.random.default_rng(8)
    for _ in range(6):
        atoms = molecule("H2O")
        atoms.positions += 0.05 * rng.standard_normal((3, 3))
        atoms.info["REF_energy"] = -2000.0 + float(rng.standard_normal())
        atoms.arrays["REF_forces"] = rng.standard_normal((3, 3))
        structures.append(atoms)
    write(path, structures, format="extxyz")
    return path


def fit(folder: Path, data: Path, model: Path, processes: int, *more: str, resume: bool = False) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "forcetune"]
    options = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    words = [str(data), "--model", str(model), "--valid", "5", "--epochs", "3", "--out", str(folder), *options, *more]
    command = ["resume", str(folder)] if resume else ["fit", "--set", "data.doctor=off", *words]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else ["-m", "forcetune"]), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Errors before and after") == 1  # the first process tells, the others are silent


def assert_same(one: Path, other: Path, exact: float = 1e-10) -> None:
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other)]
    for name, value in tensors[0].items():
        scale = max(float(value.abs().max()), 1e-3)
        assert float((tensors[1][name] - value).abs().max()) <= exact * scale, name
    tables = []
    for folder in (one, other):
        with (folder / "metrics.csv").open(encoding="utf-8") as stream:
            tables.append(list(csv.DictReader(stream)))
    assert len(tables[0]) == len(tables[1]) == 3
    for first, second in zip(*tables, strict=True):
        for key in ("train_loss", "valid_loss", "valid_forces_mae_mev_per_ang"):
            assert float(second[key]) == pytest.approx(float(first[key]), rel=exact)
    errors = [json.loads((folder / "results.json").read_text(encoding="utf-8"))["errors"] for folder in (one, other)]
    for split, figures in errors[0].items():
        expected = figures["after"]["forces_mae_mev_per_ang"]
        assert errors[1][split]["after"]["forces_mae_mev_per_ang"] == pytest.approx(expected, rel=10 * exact)


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    data, model = frames(tmp_path / "frames.xyz"), write_model(tmp_path / "small.model")
    for processes in (1, 2):
        fit(tmp_path / str(processes), data, model, processes, "--method", "elora", "--optimizer", "adam")
    assert_same(tmp_path / "1", tmp_path / "2")
    # a run of two processes that died goes on in two
    (tmp_path / "2" / "results.json").unlink()
    fit(tmp_path / "2", data, model, 2, resume=True)
    assert_same(tmp_path / "1", tmp_path / "2")


def test_bases_of_soap_turn_alike_in_every_process(tmp_path: Path) -> None:
    """What rounding differs by is not made more of than bases need."""
    data, model = frames(tmp_path / "frames.xyz"), write_model(tmp_path / "small.model")
    for processes in (1, 2):
        fit(tmp_path / str(processes), data, model, processes, "--method", "elora")
    assert_same(tmp_path / "1", tmp_path / "2", exact=1e-6)


@pytest.mark.slow
def test_three_processes_with_less_than_a_frame_each(tmp_path: Path) -> None:
    """Also of replay frames, whose head some processes then have no frame for."""
    data, model = frames(tmp_path / "frames.xyz"), write_model(tmp_path / "small.model")
    for processes in (1, 3):
        replay = (f"replay.data=[{data}]", "replay.ratio=0.4", "replay.labels=file")
        settings = [part for setting in ("training.batch_size=2", *replay) for part in ("--set", setting)]
        more = ("--method", "mmea", "--optimizer", "adam", *settings)
        fit(tmp_path / str(processes), data, model, processes, *more)
    assert_same(tmp_path / "1", tmp_path / "3")
